"""Measure the original's benchmark table on this machine: `tgate-processors table`."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tgate_processors._validation import require_whole
from tgate_processors.demo.checker import read
from tgate_processors.demo.embedded import EMBEDDED, load_demo_pipeline
from tgate_processors.demo.evaluate import BATCH, held_out_scenes
from tgate_processors.demo.table_report import Pictures, Row, Table
from tgate_processors.demo.world import Scene, caption
from tgate_processors.measure import likeness
from tgate_processors.measure.architectures import Architecture, architecture, resized
from tgate_processors.measure.bench import Laps, Spread, machine, paired, take_rounds
from tgate_processors.measure.contestants import Contestant, by_way
from tgate_processors.measure.interruption import keeping
from tgate_processors.measure.intervals import difference, estimate
from tgate_processors.measure.published import PUBLISHED, Counted, PublishedRow, base_of, count_row
from tgate_processors.measure.quality import draw
from tgate_processors.measure.rig import Rig, reduced
from tgate_processors.measure.ways import said_of


KINDS = {  # published model: embedded model of its kind
    "sd-1.5": "sd",
    "sd-2.1": "sd",
    "sdxl": "sd",
    "lcm-sdxl": "lcm",
    "pixart-alpha": "pixart",
    "pixart-sigma": "pixart",
    "lcm-pixart": "pixart-lcm",
}
PIXELS = 256  # width and height of the timed pictures


def measure_table(*, count: int, seed: int, rounds: int, device: str, dtype: torch.dtype) -> Table:
    """Count every row at full size, time it at reduced size, and draw it on the embedded model of its kind.

    It shows progress bars. After Ctrl-C the table covers what was done until then.

    Args:
        count: Number of held-out prompts to draw, at least 2.
        seed: Seed of the prompts. Picture i starts from the noise of `seed + i`.
        rounds: Number of timed runs of each row. The rows of a model take turns.
        device: Name of the device, such as `cpu` or `cuda`.
        dtype: Type of weights and latents, in the timed models and in the embedded ones.

    Raises:
        ConfigError: `count` or `rounds` is too small.
        MissingPackageError: `torchmetrics`, `scipy` or `peft` is not installed.
    """
    require_whole("count", count, least=2)
    require_whole("rounds", rounds, least=1)
    estimate(torch.ones(2, dtype=torch.bool))  # raises before the work if a package is missing, as do the next lines
    likeness.psnr(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8))
    pipes = {name: load_demo_pipeline(name, dtype=dtype).to(device) for name in EMBEDDED}
    settings: dict[str, Any] = {"prompts": count, "seed": seed, "rounds": rounds}
    settings |= {"dtype": str(dtype).removeprefix("torch."), **machine(device)}
    counted: dict[PublishedRow, Counted] = {}
    speed_ups: dict[PublishedRow, Spread] = {}
    pictures: dict[PublishedRow, Pictures] = {}
    errors: dict[PublishedRow, str] = {}
    with keeping(counted, settings):
        for row in tqdm(PUBLISHED, desc="counting", unit="row", leave=False, disable=None):
            counted[row] = count_row(row)
        _time(rounds, device, dtype, speed_ups, errors)
        _draw(pipes, held_out_scenes(count, seed), seed, pictures, errors)
    return Table(
        settings,
        tuple(
            Row(row, KINDS[row.model], counted[row], speed_ups.get(row), pictures.get(row), errors.get(row))
            for row in counted
        ),
    )


def _time(
    rounds: int,
    device: str,
    dtype: torch.dtype,
    speed_ups: dict[PublishedRow, Spread],
    errors: dict[PublishedRow, str],
) -> None:
    """Time the rows. Those of one model take turns."""
    by_model = sorted(PUBLISHED, key=lambda row: row.model)
    with tqdm(total=len(PUBLISHED) * (rounds + 1), desc="timing", unit="run", leave=False, disable=None) as bar:
        for model, of_model in groupby(by_model, key=lambda row: row.model):
            rows = list(of_model)
            all_laps = [Laps(Contestant(row.name, by_way(row.way), phases=False)) for row in rows]
            for _ in take_rounds(all_laps, _rig(model, rows, device, dtype), rounds, bar):
                pass
            whole = dict(zip(rows, (laps.whole for laps in all_laps), strict=True))
            errors |= {row: laps.error for row, laps in zip(rows, all_laps, strict=True) if laps.error}
            speed_ups |= {
                row: paired(whole[base_of(row)], whole[row])
                for row in rows
                if row not in errors and base_of(row) not in errors
            }


def _rig(model: str, rows: Sequence[PublishedRow], device: str, dtype: torch.dtype) -> Rig:
    small = resized(_small(architecture(model)), steps=None, height=PIXELS, width=PIXELS)
    gate = next(row.gate for row in rows if row.gate is not None)
    return Rig(model, small, gate, device=device, dtype=dtype)


def _small(known: Architecture) -> Architecture:
    """Return the architecture at reduced size.

    A UNet keeps a fifth of its width, one layer a block, and at most two transformer blocks in a layer. PixArt keeps a
    quarter of its width and depth. With the width alone reduced, a step would be thousands of small operations, and a
    CPU's time would be that of the calls.
    """
    if known.denoiser == "PixArtTransformer2DModel":
        return reduced(replace(known, config={**known.config, "num_layers": 7}), 4)
    config = {**known.config, "layers_per_block": 1}
    if "transformer_layers_per_block" in config:
        config["transformer_layers_per_block"] = [min(2, depth) for depth in config["transformer_layers_per_block"]]
    return reduced(replace(known, config=config), 5)


def _draw(
    pipes: dict[str, Any],
    scenes: Sequence[Scene],
    seed: int,
    pictures: dict[PublishedRow, Pictures],
    errors: dict[PublishedRow, str],
) -> None:
    """Draw the rows with the embedded models. Rows with equal settings on the same model are drawn once."""
    drawn: dict[Any, Tensor] = {}
    with tqdm(
        total=len({_drawing_key(row) for row in PUBLISHED}) * len(scenes),
        desc="drawing",
        unit="picture",
        leave=False,
        disable=None,
    ) as bar:
        for row in PUBLISHED:
            if _drawing_key(row) not in drawn:
                try:
                    drawn[_drawing_key(row)] = _drawn(pipes[KINDS[row.model]], row, scenes, seed, bar)
                except Exception as error:  # DeepCache may be missing or fail; the other rows are still drawn
                    errors[row] = said_of(error)
                    continue
            pictures[row] = _compared(drawn[_drawing_key(row)], drawn.get(_drawing_key(base_of(row))), scenes)


def _drawing_key(row: PublishedRow) -> Any:
    return KINDS[row.model], row.gate, row.cache_interval


def _drawn(pipe: Any, row: PublishedRow, scenes: Sequence[Scene], seed: int, bar: Any) -> Tensor:
    pipe.set_progress_bar_config(disable=True)
    prompts = [caption(scene) for scene in scenes]
    call = {**EMBEDDED[KINDS[row.model]].call, "num_inference_steps": architecture(row.model).steps}

    def arguments(chunk: slice) -> dict[str, Any]:
        noise = [torch.Generator().manual_seed(seed + index) for index in range(chunk.start, chunk.stop)]
        return {**call, "prompt": prompts[chunk], "generator": noise}

    return draw(pipe, row.way, len(scenes), arguments, batch_size=BATCH, bar=bar).pictures


def _compared(pictures: Tensor, base: Tensor | None, scenes: Sequence[Scene]) -> Pictures:
    whole = read(pictures * 2 - 1, scenes).whole
    if base is None or base is pictures:
        return Pictures(estimate(whole), None, None)
    of_base = read(base * 2 - 1, scenes).whole
    return Pictures(estimate(whole), difference(whole, of_base), estimate(likeness.psnr(pictures, base)))
