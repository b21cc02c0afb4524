"""What was tried to keep the meaning after the gate: `python -m tgate_processors.demo.experiments`.

A loop of its own on the demo's model, so that what is stored and what is guided can be anything. All variants but one
evaluate both branches in nine of twenty-five steps, one branch in the others: 1.5 times less arithmetic than stock.
They begin with the stock run's own latents. docs/quality.md says what came of it.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tgate_processors._gated_layers import Outputs
from tgate_processors._modes import StepMode
from tgate_processors._tables import format_table
from tgate_processors.demo.checker import read
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.model import load_demo_pipeline
from tgate_processors.demo.world import Scene, caption
from tgate_processors.gate import Gate
from tgate_processors.measure.intervals import estimate
from tgate_processors.measure.likeness import psnr
from tgate_processors.processors import gated_processors
from tgate_processors.schedule import TGateConfig


STEPS, SCALE, BATCH = 25, 5.0, 32
Kept = Callable[[Tensor, int], Tensor]  # guidance of the last look, so many steps ago, as it is used now


def dropped(guidance: Tensor, steps: int) -> Tensor:
    return torch.zeros_like(guidance)


def constant(guidance: Tensor, steps: int) -> Tensor:
    return guidance


def fading(rate: float) -> Kept:
    return lambda guidance, steps: guidance * rate**steps


def by_frequency(guidance: Tensor, steps: int) -> Tensor:
    """As FasterCache weighs them: low frequencies fade, high ones stay."""
    spectrum = torch.fft.rfft2(guidance.float())
    rows = torch.fft.fftfreq(guidance.shape[-2]).abs()[:, None]
    columns = torch.fft.rfftfreq(guidance.shape[-1])[None]
    low = torch.maximum(rows, columns) <= 0.2
    weighed: Tensor = torch.fft.irfft2(spectrum * torch.where(low, 0.8**steps, 1.0), s=guidance.shape[-2:])
    return weighed.to(guidance.dtype)


@dataclass(frozen=True)
class Variant:
    """What happens after the gate.

    Args:
        name: The name of its row.
        gate_step: Steps of both branches at the start.
        stored: Cross-attention that is kept: this much from the negative branch (0) to the positive (1), or past it.
        kept: What becomes of guidance.
        looks: Later steps of both branches.
        glances: Later steps in which the one branch's cross-attention is computed and stored.
        always: Layers whose cross-attention is always computed.
        computes: Whether all of them are.
    """

    name: str
    gate_step: int = 9
    stored: float = 1.0
    kept: Kept = dropped
    looks: Sequence[int] = ()
    glances: Sequence[int] = ()
    always: Sequence[int] = ()
    computes: bool = False


VARIANTS = [
    Variant("guidance dropped, cross-attention computed (the control)", computes=True),
    Variant("the mean of the halves stored (the papers')", stored=0.5),
    Variant("the positive half stored"),
    Variant("the negative half stored", stored=0.0),
    Variant("half as much past the positive half stored", stored=1.5),
    Variant("the guided extrapolation stored, at 3 of 5", stored=3.0),
    Variant("finest layers computed always", always=(0, 5)),
    Variant("a glance of one branch every 4 steps", glances=range(12, 25, 4)),
    Variant("guidance kept constant", kept=constant),
    Variant("guidance kept, fading 0.9 a step", kept=fading(0.9)),
    Variant("guidance kept, fading 0.8 a step", kept=fading(0.8)),
    Variant("guidance kept by frequency", kept=by_frequency),
    Variant("looks at 10, 15, 20; dropped between", gate_step=6, looks=(10, 15, 20)),
    Variant("looks at 10, 15, 20; kept constant", gate_step=6, looks=(10, 15, 20), kept=constant),
    Variant("looks at 10, 15, 20; fading 0.9", gate_step=6, looks=(10, 15, 20), kept=fading(0.9)),
    Variant("looks at 8, 12, 17; fading 0.9", gate_step=6, looks=(8, 12, 17), kept=fading(0.9)),
    Variant("looks at 11, 17, 23; fading 0.9", gate_step=6, looks=(11, 17, 23), kept=fading(0.9)),
    Variant("looks every 4 from 2 on; fading 0.9 (8 steps)", 3, looks=range(6, 25, 4), kept=fading(0.9)),
]


@dataclass
class Loop:
    """The denoising loop, and the stock run's latents at the beginning of each step."""

    pipe: Any
    scenes: Sequence[Scene]
    seed: int
    latents: list[list[Tensor]] = field(default_factory=list)  # chunk by chunk, step by step

    def __post_init__(self) -> None:
        unet = self.pipe.unet
        gate = Gate(TGateConfig(gate_step=1))
        unet.set_attn_processor(gated_processors(unet, gate))
        self.layers = gate.layers
        self.pipe.scheduler.set_timesteps(STEPS)
        for start in range(0, len(self.scenes), BATCH):
            seeds = range(self.seed + start, self.seed + min(start + BATCH, len(self.scenes)))
            noise = [torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
            self.latents.append([torch.cat(noise).to(unet.dtype)])

    def pictures(self, run: Callable[[Tensor, Tensor, list[Tensor]], Tensor]) -> Tensor:
        """The pictures that `run` makes of each chunk's embeddings, negative and positive, and its stock latents."""
        made = []
        for chunk, latents in enumerate(self.latents):
            prompts = [caption(scene) for scene in self.scenes[chunk * BATCH : (chunk + 1) * BATCH]]
            positive, negative = self.pipe.encode_prompt(prompts, "cpu", 1, True)
            last = run(negative, positive, latents)
            decoded = self.pipe.vae.decode(last / self.pipe.vae.config.scaling_factor).sample
            made.append((decoded.float() / 2 + 0.5).clamp(0, 1))
        return torch.cat(made)

    def stock(self, negative: Tensor, positive: Tensor, latents: list[Tensor]) -> Tensor:
        for step in range(STEPS):
            both = self._both(latents[step], step, negative, positive)
            latents.append(self._next(latents[step], step, both[0] + SCALE * (both[1] - both[0])))
        return latents[STEPS]

    def run(self, variant: Variant, negative: Tensor, positive: Tensor, stock: list[Tensor]) -> Tensor:
        first = variant.gate_step - 1
        latents, guidance, looked = stock[first], torch.zeros_like(stock[first]), first
        stored: Outputs = {}
        for step in range(first, STEPS):
            if step == first or step in variant.looks:
                self.layers.put_in(StepMode.CLOSING_UNGUIDED, {})
                unguided, guided = self._both(latents, step, negative, positive)
                guidance, looked = guided - unguided, step
                stored = self._kept(variant)
                output = unguided + SCALE * guidance
            else:
                glances = step in variant.glances or variant.computes
                self.layers.put_in(StepMode.CLOSING_UNGUIDED if glances else StepMode.FIDELITY, stored)
                output = self.pipe.unet(latents, self._timestep(step), positive).sample
                new = self.layers.take_out().new
                if glances:
                    stored = {name: [output for _, output in outputs] for name, outputs in new.items()}
                output = output + (SCALE - variant.stored) * variant.kept(guidance, step - looked)
            latents = self._next(latents, step, output)
        return latents

    def _kept(self, variant: Variant) -> Outputs:
        """What the layers put out for both branches, as the variant keeps it."""
        new = self.layers.take_out().new
        always = [name for index, name in enumerate(self.layers.cross_attention) if index in variant.always]
        kept: Outputs = {}
        for name, [(_, output)] in new.items():
            if name not in always:
                negative, positive = output.chunk(2)
                kept[name] = [torch.lerp(negative, positive, variant.stored)]
        return kept

    def _both(self, latents: Tensor, step: int, negative: Tensor, positive: Tensor) -> Sequence[Tensor]:
        embeds = torch.cat([negative, positive])
        output: Tensor = self.pipe.unet(torch.cat([latents, latents]), self._timestep(step), embeds).sample
        return output.chunk(2)

    def _timestep(self, step: int) -> Tensor:
        timestep: Tensor = self.pipe.scheduler.timesteps[step]
        return timestep

    def _next(self, latents: Tensor, step: int, output: Tensor) -> Tensor:
        following: Tensor = self.pipe.scheduler.step(output, self._timestep(step), latents).prev_sample
        return following


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.experiments", description=__doc__)
    parser.add_argument("--count", type=int, default=256, help="prompts of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 100000])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    rows: list[tuple[str, ...]] = [("", *(f"seed {seed}: all right, PSNR" for seed in options.seeds), "together")]
    cells: dict[str, list[str]] = {}
    wholes: dict[str, list[Tensor]] = {}
    for seed in options.seeds:
        scenes = held_out_scenes(options.count, seed)
        pipe = load_demo_pipeline().to(getattr(torch, options.dtype))
        loop = Loop(pipe, scenes, seed)
        stock = loop.pictures(loop.stock)
        _note("stock", stock, stock, scenes, cells, wholes)
        for variant in tqdm(VARIANTS, desc=f"seed {seed}", unit="variant"):
            drawn = loop.pictures(partial(loop.run, variant))
            _note(variant.name, drawn, stock, scenes, cells, wholes)
    for name, parts in cells.items():
        rows.append((name, *parts, estimate(torch.cat(wholes[name])).shown(1, 100)))
    print(format_table(rows))


def _note(
    name: str,
    drawn: Tensor,
    stock: Tensor,
    scenes: Sequence[Scene],
    cells: dict[str, list[str]],
    wholes: dict[str, list[Tensor]],
) -> None:
    whole = read(drawn * 2 - 1, scenes).whole
    likeness = "" if drawn is stock else f", {float(psnr(drawn, stock).mean()):.1f} dB"
    cells.setdefault(name, []).append(f"{float(whole.float().mean()):.1%}{likeness}")
    wholes.setdefault(name, []).append(whole)


if __name__ == "__main__":
    main()
