"""Tables, as text and in a notebook, and settings as a line of text."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any


Rows = Sequence[tuple[str, ...]]


def format_table(rows: Rows) -> str:
    """Rows of text as lines with aligned columns, the first row a heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def format_settings(settings: Mapping[str, Any]) -> str:
    """How something was made, as one line."""
    return ", ".join(f"{key} {value}" for key, value in settings.items())


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Args:
        rows: The rows, of equal lengths.
        has_heading: Whether the first row is a heading; otherwise the first column says what a row is.
    """

    rows: Rows
    has_heading: bool = True

    def __str__(self) -> str:
        return format_table(self.rows)


class Shown:
    """What prints as lines and tables, and is shown as such in a notebook. Its `repr` is its own, of one line."""

    def _parts(self) -> Iterable[str | Table]:
        """What there is to print, in order; an empty line is one."""
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
