"""Tables as text and in a notebook, and settings as a line of text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


Rows = Sequence[tuple[str, ...]]


def format_table(rows: Rows) -> str:
    """Return rows of text as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as one line of text."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Args:
        rows: The rows, of equal lengths.
        has_heading: Whether the first row is a heading. Otherwise the first column names the rows.
    """

    rows: Rows
    has_heading: bool = True

    def __str__(self) -> str:
        return format_table(self.rows)


class Shown:
    """Base of classes that print as lines and tables, and show the same in a notebook. Each has its own `repr`."""

    def _parts(self) -> Iterable[str | Table]:
        """Return the lines and tables to print, in order. An empty string prints an empty line."""
        raise NotImplementedError

    def __str__(self) -> str:
        return "\n".join(map(str, self._parts()))

    def _repr_html_(self) -> str:
        return "\n".join(_html(part) for part in self._parts() if part)


def _html(part: str | Table) -> str:
    if isinstance(part, str):
        return f"<p>{_escaped(part)}</p>"
    rows = "".join(
        f"<tr>{''.join(_cell(cell, row, column, part) for column, cell in enumerate(cells))}</tr>"
        for row, cells in enumerate(part.rows)
    )
    return f"<table>{rows}</table>"


def _cell(text: str, row: int, column: int, table: Table) -> str:
    tag = "th" if (row if table.has_heading else column) == 0 else "td"
    return f'<{tag} style="text-align: left">{_escaped(text)}</{tag}>'


def _escaped(text: str) -> str:
    return escape(text).replace("\n", "<br>")
