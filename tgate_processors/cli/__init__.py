"""The command `tgate-processors`."""

import sys
from collections.abc import Sequence

from tgate_processors.measure.interruption import INTERRUPTED


__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    try:
        from tgate_processors.cli.running import run  # here, to catch Ctrl-C during the imports too

        return run(arguments)
    except KeyboardInterrupt:
        print("tgate-processors: interrupted", file=sys.stderr)
        return INTERRUPTED
