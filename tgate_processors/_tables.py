"""Tables of text, and settings as a line of it."""

from collections.abc import Mapping, Sequence
from typing import Any


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text as lines with aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def format_settings(settings: Mapping[str, Any]) -> str:
    """How something was made, as one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())
