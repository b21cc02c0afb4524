"""One labelled picture of a comparison: a column for each prompt, the stock row above the gated one."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tgate_processors.demo.compare import Comparison
from tgate_processors.demo.world import caption


ENLARGED = 3  # screen pixels a picture pixel
MARGIN = 16  # pixels
LABELS = 96  # pixels left of the rows
HEADING = 64  # pixels above the pictures
CAPTION_LINES = 4
INK, GREY = (20, 20, 24), (110, 110, 118)


def side_by_side(comparison: Comparison, settings: str) -> Image.Image:
    """The pictures of both pipelines, labelled so that they stand alone.

    Args:
        comparison: The pictures and their figures.
        settings: A line that says how they were made.
    """
    size = comparison.stock.pictures.shape[-1] * ENLARGED
    count = len(comparison.scenes)
    text_height = CAPTION_LINES * 16
    width = LABELS + count * (size + MARGIN) + MARGIN
    height = HEADING + 2 * (size + MARGIN) + text_height + MARGIN
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    font, title = ImageFont.load_default(13), ImageFont.load_default(17)

    saved = f"{comparison.summary.macs_saved:.0%} of the arithmetic saved"
    draw.text((MARGIN, 12), f"The stock pipeline, and gated: {saved}", INK, title)
    draw.text((MARGIN, 36), settings, GREY, font)
    for row, (label, side) in enumerate((("stock", comparison.stock), ("gated", comparison.gated))):
        top = HEADING + row * (size + MARGIN)
        draw.text((MARGIN, top + size // 2 - 10), label, INK, title)
        for column in range(count):
            sheet.paste(_enlarged(side.pictures[column]), (LABELS + column * (size + MARGIN), top))
    for column, scene in enumerate(comparison.scenes):
        lines = textwrap.wrap(caption(scene), size // 7)[:CAPTION_LINES]
        place = (LABELS + column * (size + MARGIN), height - text_height - MARGIN)
        draw.multiline_text(place, "\n".join(lines), GREY, font)
    return sheet


def _enlarged(picture: Tensor) -> Image.Image:
    values = ((picture.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
    image = Image.fromarray(values)
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)
