"""Try variants of the gate that may keep more accuracy: `python -m tgate_processors.demo.experiments`.

They run in a denoising loop of this module, on the embedded Stable Diffusion, so that a variant can store any output
and guide in any way. Each variant evaluates both branches in nine of twenty-five steps (or in eight, where its name
says so) and one branch in the others. So each does about 1.5 times less arithmetic than stock. Each starts from the
stock run's latents before its gate. docs/quality.md has the results.
"""

import argparse
import copy
import inspect
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
from tgate_processors.demo.embedded import load_demo_pipeline
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.keepers import ByFrequency, Cosine, Extrapolated, Fading, Keeper, Measured
from tgate_processors.demo.world import Scene, caption
from tgate_processors.gate import Gate
from tgate_processors.measure.intervals import estimate
from tgate_processors.measure.likeness import psnr
from tgate_processors.measure.samplers import SAMPLERS, sampler_on
from tgate_processors.processors import gated_processors
from tgate_processors.schedule import TGateConfig


STEPS, SCALE, BATCH = 25, 5.0, 32


DROPPED, CONSTANT = partial(Fading, 0.0), partial(Fading, 1.0)


@dataclass(frozen=True)
class Variant:
    """A variant of what happens after the gate.

    Args:
        name: Name of the table's row.
        gate_step: Number of steps with both branches at the start.
        stored: Position of the stored cross-attention between the negative branch (0) and the positive one (1). It may
            be above 1.
        kept: Function that makes the keeper of a run.
        looks: Later steps with both branches.
        glances: Later steps in which the positive branch computes and stores cross-attention.
        always: Indices of layers that compute cross-attention in every step.
        computes: Whether all layers compute cross-attention in every step.
    """

    name: str
    gate_step: int = 9
    stored: float = 1.0
    kept: Callable[[], Keeper] = DROPPED
    looks: Sequence[int] = ()
    glances: Sequence[int] = ()
    always: Sequence[int] = ()
    computes: bool = False


FADES: dict[str, Callable[[], Keeper]] = {
    "fading 0.9": partial(Fading, 0.9),
    "fade measured": Measured,
    "fade by cosine": Cosine,
    "fade measured, extrapolated": Extrapolated,
}
VARIANTS = [
    Variant("guidance dropped, cross-attention computed (the control)", computes=True),
    Variant("the mean of the halves stored (the papers')", stored=0.5),
    Variant("the positive half stored"),
    Variant("the negative half stored", stored=0.0),
    Variant("half as much past the positive half stored", stored=1.5),
    Variant("the guided extrapolation stored, at 3 of 5", stored=3.0),
    Variant("finest layers computed always", always=(0, 5)),
    Variant("a glance of one branch every 4 steps", glances=range(12, 25, 4)),
    Variant("guidance kept constant", kept=CONSTANT),
    Variant("guidance kept, fading 0.9 a step", kept=partial(Fading, 0.9)),
    Variant("guidance kept, fading 0.8 a step", kept=partial(Fading, 0.8)),
    Variant("guidance kept by frequency", kept=ByFrequency),
    Variant("guidance kept, fade measured", kept=Measured),
    Variant("looks at 10, 15, 20; dropped between", gate_step=6, looks=(10, 15, 20)),
    Variant("looks at 10, 15, 20; kept constant", gate_step=6, looks=(10, 15, 20), kept=CONSTANT),
    Variant("looks at 10, 15, 20; fading 0.9", gate_step=6, looks=(10, 15, 20), kept=partial(Fading, 0.9)),
    *(Variant(f"looks at 11, 17, 23; {fade}", 6, kept=kept, looks=(11, 17, 23)) for fade, kept in FADES.items()),
    *(
        Variant(f"looks every 4 from 2 on; {fade} (8 steps)", 3, kept=kept, looks=range(6, 25, 4))
        for fade, kept in FADES.items()
    ),
]


@dataclass
class State:
    """State of a run at the start of an evaluation. A copy of it continues independently."""

    latents: Tensor
    scheduler: Any
    generators: list[torch.Generator]

    def evaluate(self, unet: Any, index: int, *branches: Tensor) -> Sequence[Tensor]:
        """Return the network's output for the embeddings of each branch."""
        timestep = self.scheduler.timesteps[index]
        sample = self.scheduler.scale_model_input(self.latents, timestep)
        output: Tensor = unet(torch.cat([sample] * len(branches)), timestep, torch.cat(branches)).sample
        return output.chunk(len(branches))

    def go_on(self, index: int, output: Tensor) -> None:
        """Take the scheduler's step with the guided output, and with fresh noise if the scheduler adds some."""
        step = self.scheduler.step
        noise = {"generator": self.generators} if "generator" in inspect.signature(step).parameters else {}
        self.latents = step(output, self.scheduler.timesteps[index], self.latents, **noise).prev_sample


@dataclass
class Chunk:
    """Pictures that are drawn together, with the records of their stock run.

    Attributes:
        negative, positive: Embeddings of the two branches.
        begin: State before the first step.
        states: State before each step.
        guidance: Guidance in the last evaluation of each step.
    """

    negative: Tensor
    positive: Tensor
    begin: State
    states: list[State] = field(default_factory=list)
    guidance: list[Tensor] = field(default_factory=list)


@dataclass
class Loop:
    """Denoising loop with one sampler. The stock run must come first, because the variants start from its states."""

    pipe: Any
    scenes: Sequence[Scene]
    seed: int
    sampler: str = "ddim"

    def __post_init__(self) -> None:
        unet = self.pipe.unet
        gate = Gate(TGateConfig(gate_step=1))
        unet.set_attn_processor(gated_processors(unet, gate))
        self.layers = gate.layers
        with sampler_on(self.pipe, self.sampler):
            scheduler = self.pipe.scheduler
        scheduler.set_timesteps(STEPS)
        self.evaluations, self.order = len(scheduler.timesteps), scheduler.order
        self.chunks = []
        for start in range(0, len(self.scenes), BATCH):
            prompts = [caption(scene) for scene in self.scenes[start : start + BATCH]]
            positive, negative = self.pipe.encode_prompt(prompts, "cpu", 1, True)
            generators = [torch.Generator().manual_seed(self.seed + start + index) for index in range(len(prompts))]
            noise = torch.cat([torch.randn(1, 4, 16, 16, generator=generator) for generator in generators])
            begin = State(noise.to(unet.dtype) * scheduler.init_noise_sigma, scheduler, generators)
            self.chunks.append(Chunk(negative, positive, begin))

    def stock(self) -> Tensor:
        """Return the pictures of the stock run, `(count, 3, height, width)` in 0..1."""
        return torch.cat([self._stock(chunk) for chunk in self.chunks])

    def run(self, variant: Variant) -> Tensor:
        """Return the pictures of a variant, in the same form."""
        return torch.cat([self._run(variant, chunk) for chunk in self.chunks])

    def _stock(self, chunk: Chunk) -> Tensor:
        state = copy.deepcopy(chunk.begin)
        for index in range(self.evaluations):
            if index % self.order == 0:
                chunk.states.append(copy.deepcopy(state))
            unguided, guided = state.evaluate(self.pipe.unet, index, chunk.negative, chunk.positive)
            guidance = guided - unguided
            chunk.guidance[index // self.order :] = [guidance]
            state.go_on(index, unguided + SCALE * guidance)
        return self._pictures(state)

    def _run(self, variant: Variant, chunk: Chunk) -> Tensor:
        first = variant.gate_step - 1
        state, kept = copy.deepcopy(chunk.states[first]), variant.kept()
        for step, guidance in enumerate(chunk.guidance[:first]):
            kept.note(guidance, step)
        stored: Outputs = {}
        for index in range(first * self.order, self.evaluations):
            step = index // self.order
            if step == first or step in variant.looks:
                self.layers.begin(StepMode.CLOSING_UNGUIDED, {})
                unguided, guided = state.evaluate(self.pipe.unet, index, chunk.negative, chunk.positive)
                stored = self._kept(variant)
                kept.note(guided - unguided, step)
                output = unguided + SCALE * (guided - unguided)
            else:
                glances = step in variant.glances or variant.computes
                self.layers.begin(StepMode.CLOSING_UNGUIDED if glances else StepMode.FIDELITY, stored)
                (output,) = state.evaluate(self.pipe.unet, index, chunk.positive)
                new = self.layers.end().new
                if glances:
                    stored = {name: [output for _, output in outputs] for name, outputs in new.items()}
                output = output + (SCALE - variant.stored) * kept.at(step)
            state.go_on(index, output)
        return self._pictures(state)

    def _kept(self, variant: Variant) -> Outputs:
        """Return what the variant stores of the layers' outputs for both branches."""
        new = self.layers.end().new
        always = [name for index, name in enumerate(self.layers.cross_attention) if index in variant.always]
        kept: Outputs = {}
        for name, [(_, output)] in new.items():
            if name not in always:
                negative, positive = output.chunk(2)
                kept[name] = [torch.lerp(negative, positive, variant.stored)]
        return kept

    def _pictures(self, state: State) -> Tensor:
        decoded: Tensor = self.pipe.vae.decode(state.latents / self.pipe.vae.config.scaling_factor).sample
        return (decoded.float() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.experiments", description=__doc__)
    parser.add_argument("--count", type=int, default=256, help="number of prompts for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 100000])
    parser.add_argument("--sampler", nargs="+", choices=list(SAMPLERS), default=["ddim"])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args(arguments)
    for sampler in options.sampler:
        print(_table(sampler, options.count, options.seeds, getattr(torch, options.dtype)), end="\n\n", flush=True)


def _table(sampler: str, count: int, seeds: Sequence[int], dtype: torch.dtype) -> str:
    """Draw every variant under a sampler, and return the table of results."""
    cells: dict[str, list[str]] = {}
    wholes: dict[str, list[Tensor]] = {}
    for seed in seeds:
        scenes = held_out_scenes(count, seed)
        loop = Loop(load_demo_pipeline(dtype=dtype), scenes, seed, sampler)
        stock = loop.stock()
        _note("stock", stock, stock, scenes, cells, wholes)
        for variant in tqdm(VARIANTS, desc=f"{sampler}, seed {seed}", unit="variant"):
            _note(variant.name, loop.run(variant), stock, scenes, cells, wholes)
    rows = [(f"sampler {sampler}", *(f"seed {seed}: accuracy, PSNR" for seed in seeds), "together")]
    for name, parts in cells.items():
        rows.append((name, *parts, estimate(torch.cat(wholes[name])).shown(1, 100)))
    return format_table(rows)


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
