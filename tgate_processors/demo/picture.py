"""One picture of a comparison, with a column for each prompt and the stock row above the gated one."""

import numpy as np
from PIL import Image
from torch import Tensor

from tgate_processors.demo.compare import Comparison
from tgate_processors.demo.world import caption
from tgate_processors.measure.sheet import sheet


ENLARGED = 3  # factor by which the pictures are enlarged


def side_by_side(comparison: Comparison, settings: str) -> Image.Image:
    """Return the pictures of both pipelines with labels that explain them.

    Args:
        comparison: Pictures and measurements of both pipelines.
        settings: Line that tells how the pictures were drawn.
    """
    saved = f"{comparison.summary.macs_saved:.0%} of the arithmetic saved"
    return sheet(
        [[_enlarged(picture) for picture in side.pictures] for side in (comparison.stock, comparison.gated)],
        title=f"The stock pipeline and the gated one: {saved}",
        settings=settings,
        rows=("stock", "gated"),
        columns=[caption(scene) for scene in comparison.scenes],
    )


def _enlarged(picture: Tensor) -> Image.Image:
    values = ((picture.clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 0).numpy().astype(np.uint8)
    image = Image.fromarray(values)
    return image.resize((image.width * ENLARGED, image.height * ENLARGED), Image.Resampling.NEAREST)
