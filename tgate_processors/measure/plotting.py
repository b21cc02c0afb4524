"""Figures and their colours. This module alone imports matplotlib, which is optional."""

from typing import Any

from tgate_processors.errors import MissingPackageError


BLUE, RED, ORANGE, GREY, PALE = "#2f6fb0", "#c0392b", "#f08c00", "#8a8a92", "#b9c2cc"


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, with its size in inches.

    Raises:
        MissingPackageError: `matplotlib` is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            "`matplotlib` must be installed to plot. Run `pip install 'tgate-processors[plot]'`."
        ) from error
    return Figure(figsize=(width, height), layout="constrained")
