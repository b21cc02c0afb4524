"""Tables of text."""

from collections.abc import Sequence


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text as lines with aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
