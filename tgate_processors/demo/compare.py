"""The same pictures twice, with the stock and with the gated pipeline, in turn."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tgate_processors._tables import format_table
from tgate_processors.demo.checker import Reading, read
from tgate_processors.demo.world import Scene, caption
from tgate_processors.handle import apply_tgate
from tgate_processors.schedule import TGateConfig
from tgate_processors.summary import Summary


@dataclass
class Side:
    """What one of the two pipelines made.

    pictures: (pictures, 3, height, width) in -1..1. seconds: of each round, all pictures together.
    """

    reading: Reading = field(init=False)
    pictures: Tensor = field(init=False)
    seconds: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """Stock and gated pictures of the same prompts and seeds."""

    scenes: Sequence[Scene]
    stock: Side
    gated: Side
    summary: Summary

    @property
    def speed_ups(self) -> list[float]:
        """For each round, how many times faster the gated pipeline was."""
        return [stock / gated for stock, gated in zip(self.stock.seconds, self.gated.seconds, strict=True)]

    @property
    def psnr(self) -> Tensor:
        """Likeness of each gated picture to the stock one, in dB -> (pictures,)."""
        error = (self.stock.pictures - self.gated.pictures).square().flatten(1).mean(1)
        return 10 * torch.log10(4 / error)  # the values span 2

    def __str__(self) -> str:
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
            ("attributes right", *(f"{_right(side.reading):.0%}" for side in (self.stock, self.gated)), ""),
            (
                "pictures wholly right",
                *(f"{side.reading.whole.sum()}/{count}" for side in (self.stock, self.gated)),
                "",
            ),
            ("likeness to stock", "", f"{self.psnr.mean():.1f} dB", "PSNR"),
        ]
        return format_table(rows)


def _right(reading: Reading) -> float:
    return float(reading.right[reading.named].float().mean())


def compare(
    pipe: Any, scenes: Sequence[Scene], config: TGateConfig, *, seed: int, steps: int, guidance: float, rounds: int
) -> Comparison:
    """Draw each scene with both pipelines, `rounds` times in turn, with a progress bar.

    Args:
        pipe: The demo's pipeline, not gated.
        scenes: What to draw.
        config: The gate's settings.
        seed: Picture i starts from the noise of `seed + i`, in both.
        steps: Denoising steps.
        guidance: Scale of classifier-free guidance.
        rounds: How often each is timed, after one round that is not.
    """
    stock, gated = Side(), Side()
    settings = {"num_inference_steps": steps, "guidance_scale": guidance}
    with tqdm(total=2 * steps * (rounds + 1), unit="step", desc="drawing") as bar:

        def draw(side: Side, callback: Callable[..., dict[str, Any]], *, timed: bool) -> None:
            noise = [torch.Generator().manual_seed(seed + i) for i in range(len(scenes))]
            prompts = [caption(scene) for scene in scenes]
            started = time.perf_counter()
            images = pipe(prompts, generator=noise, output_type="pt", callback_on_step_end=callback, **settings).images
            if timed:
                side.seconds.append(time.perf_counter() - started)
            side.pictures = images.float() * 2 - 1

        def count_step(pipe: Any, step_index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            bar.update()
            return kwargs

        for turn in range(rounds + 1):
            draw(stock, count_step, timed=turn > 0)
            with apply_tgate(pipe, config, callback_on_step_end=count_step) as tgate:
                draw(gated, tgate, timed=turn > 0)
    for side in (stock, gated):
        side.reading = read(side.pictures, scenes)
    return Comparison(scenes, stock, gated, tgate.summary())
