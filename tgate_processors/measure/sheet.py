"""Sheets of labelled pictures in rows and columns."""

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont


MARGIN = 16  # pixels, as are the next ones
ROW_LABELS = 80
LEAST_COLUMN = 150  # room for the text below a column
LINE, TITLE_LINE = 18, 24
INK, GREY = (20, 20, 24), (110, 110, 118)


def sheet(
    pictures: Sequence[Sequence[Image.Image]],
    *,
    title: str,
    settings: str,
    rows: Sequence[str] = (),
    columns: Sequence[str],
) -> Image.Image:
    """Return a sheet of pictures of one size, with a title above and a caption below each column.

    Args:
        pictures: Rows of pictures.
        title: Title of the sheet.
        settings: Line below the title that tells how the pictures were drawn.
        rows: Label on the left of each row. If empty, the sheet keeps no room for labels.
        columns: Caption below each column.
    """
    width, height = pictures[0][0].size
    width = max(width, LEAST_COLUMN)
    body, headline = ImageFont.load_default(13), ImageFont.load_default(17)
    left = MARGIN + (ROW_LABELS if rows else 0)
    total = left + len(columns) * (width + MARGIN)
    titles, notes = (_wrapped(text, total - left, font) for text, font in ((title, headline), (settings, body)))
    captions = [_wrapped(text, width, body) for text in columns]
    top = MARGIN + len(titles) * TITLE_LINE + len(notes) * LINE + MARGIN
    bottom = top + len(pictures) * (height + MARGIN)
    page = Image.new("RGB", (total, bottom + max(map(len, captions)) * LINE + MARGIN), "white")
    draw = ImageDraw.Draw(page)
    _write(draw, (left, MARGIN), titles, INK, headline, TITLE_LINE)
    _write(draw, (left, MARGIN + len(titles) * TITLE_LINE), notes, GREY, body, LINE)
    for row, line in enumerate(pictures):
        y = top + row * (height + MARGIN)
        for column, picture in enumerate(line):
            page.paste(picture, (left + column * (width + MARGIN), y))
        if rows:
            draw.text((MARGIN, y + height // 2 - TITLE_LINE // 2), rows[row], INK, headline)
    for column, caption in enumerate(captions):
        _write(draw, (left + column * (width + MARGIN), bottom), caption, GREY, body, LINE)
    return page


def _wrapped(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    letter = font.getlength("n" * 10) / 10
    return textwrap.wrap(text, max(8, int(width / letter)))


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    lines: Sequence[str],
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    line_height: int,
) -> None:
    for number, line in enumerate(lines):
        draw.text((place[0], place[1] + number * line_height), line, colour, font)
