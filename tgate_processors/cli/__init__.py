"""The command `tgate-processors`."""

from tgate_processors.cli.options import main


__all__ = ["main"]
