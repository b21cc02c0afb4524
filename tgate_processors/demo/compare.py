"""Draw the same prompts with the stock and with the gated pipeline, in turns."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tgate_processors._pipelines import denoisers_of, takes_callback
from tgate_processors._tables import Shown, Table
from tgate_processors.demo.checker import Reading, read
from tgate_processors.demo.world import Scene, caption
from tgate_processors.handle import apply_tgate
from tgate_processors.schedule import TGateConfig
from tgate_processors.summary import Summary


@dataclass
class Side:
    """Results of one of the two pipelines.

    Attributes:
        reading: What the checker reads from the pictures.
        pictures: Pictures of the last round, (pictures, 3, height, width) in -1..1.
        seconds: Time of each round, for all pictures together.
    """

    reading: Reading = field(init=False)
    pictures: Tensor = field(init=False)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison(Shown):
    """Stock and gated pictures of the same prompts and seeds."""

    scenes: Sequence[Scene]
    stock: Side
    gated: Side
    summary: Summary

    @property
    def speed_ups(self) -> list[float]:
        """Speed-up of the gated pipeline in each round."""
        return [stock / gated for stock, gated in zip(self.stock.seconds, self.gated.seconds, strict=True)]

    @property
    def psnr(self) -> Tensor:
        """Likeness (PSNR) of each gated picture to the stock picture, in dB -> (pictures,)."""
        error = (self.stock.pictures - self.gated.pictures).square().flatten(1).mean(1)
        return 10 * torch.log10(4 / error)  # the values span 2

    def __repr__(self) -> str:
        saved = f"{self.summary.macs_saved:.0%} of the arithmetic saved"
        return f"{type(self).__name__}({len(self.scenes)} pictures, {saved}, {self.psnr.mean():.1f} dB to stock)"

    def _parts(self) -> Iterator[Table]:
        summary, count = self.summary, len(self.scenes)
        speed_ups = sorted(self.speed_ups)
        rows = [
            ("", "stock", "gated", ""),
            (
                "arithmetic, GMACs a picture",
                f"{summary.stock_macs / count / 1e9:.2f}",
                f"{summary.cost.macs / count / 1e9:.2f}",
                f"{summary.macs_saved:.0%} saved",
            ),
            (
                "time, seconds a picture",
                f"{statistics.median(self.stock.seconds) / count:.3f}",
                f"{statistics.median(self.gated.seconds) / count:.3f}",
                f"{statistics.median(speed_ups):.2f}x faster ({speed_ups[0]:.2f} to {speed_ups[-1]:.2f})",
            ),
            ("attributes correct", *(f"{_right(side.reading):.0%}" for side in (self.stock, self.gated)), ""),
            (
                "pictures fully correct",
                *(f"{side.reading.whole.sum()}/{count}" for side in (self.stock, self.gated)),
                "",
            ),
            ("likeness to stock", "", f"{self.psnr.mean():.1f} dB", "PSNR"),
        ]
        yield Table(rows)


def _right(reading: Reading) -> float:
    return float(reading.right[reading.named].float().mean())


def compare(
    pipe: Any, scenes: Sequence[Scene], config: TGateConfig, *, seed: int, rounds: int, call: Mapping[str, Any]
) -> Comparison:
    """Draw each scene with both pipelines, in turns, with a progress bar.

    Args:
        pipe: Pipeline of an embedded model, without a gate.
        scenes: Scenes to draw.
        config: Settings of the gate.
        seed: Seed of the noise. Picture i starts from the noise of `seed + i` in both pipelines.
        rounds: Number of timed rounds, after one that is not timed.
        call: Arguments of the pipeline's call, including `num_inference_steps`.
    """
    stock, gated = Side(), Side()
    prompts = [caption(scene) for scene in scenes]

    def draw(side: Side, *, timed: bool, **more: Any) -> None:
        noise = [torch.Generator().manual_seed(seed + i) for i in range(len(scenes))]
        started = time.perf_counter()
        images = pipe(prompts, generator=noise, output_type="pt", **call, **more).images
        if timed:
            side.seconds.append(time.perf_counter() - started)
        side.pictures = images.float() * 2 - 1

    with tqdm(total=2 * call["num_inference_steps"] * (rounds + 1), unit="step", desc="drawing", disable=None) as bar:
        # a hook and no callback, which PixArt's pipelines do not take
        counting = denoisers_of(pipe)[0].register_forward_hook(lambda *_: bar.update() and None)
        try:
            for turn in range(rounds + 1):
                draw(stock, timed=turn > 0)
                with apply_tgate(pipe, config) as tgate:
                    callback = {"callback_on_step_end": tgate} if takes_callback(pipe) else {}
                    draw(gated, timed=turn > 0, **callback)
        finally:
            counting.remove()
    for side in (stock, gated):
        side.reading = read(side.pictures, scenes)
    return Comparison(scenes, stock, gated, tgate.summary())
