"""What each way costs in meaning on the demo's model, whose pictures are checked: `tgate-processors quality`."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tgate_processors._validation import require_whole
from tgate_processors.demo.checker import ATTRIBUTES, read
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.render import render
from tgate_processors.demo.world import Scene, caption
from tgate_processors.measure import ways
from tgate_processors.measure.likeness import FrechetDistance
from tgate_processors.measure.quality import Drawn, compare, draw
from tgate_processors.measure.quality_report import Report
from tgate_processors.measure.ways import Changes, Way
from tgate_processors.schedule import TGateConfig


BATCH = 32


@dataclass(frozen=True)
class DemoWay:
    """A way, and the first step at which it differs from the stock pipeline.

    What all ways have in common is computed once: a run with the gate at step 10 is the stock run up to step 9.

    Args:
        way: The way of the steps from `start` on.
        start: Steps that are the stock pipeline's.
        batch_size: Pictures in a call.
    """

    way: Way
    start: int = 0
    batch_size: int = BATCH


def demo_ways(steps: int, *, every: int = 1) -> list[DemoWay]:
    """The stock pipeline first.

    Args:
        steps: Number of steps in the stock run.
        every: The gate at every step, or at every so many.
    """

    def part(share: float) -> int:
        return max(1, round(share * steps))

    def gate(name: str, **settings: Any) -> Way:
        return ways.gated(TGateConfig(**settings), name)

    papers = TGateConfig(gate_step=0.4)
    gates = range(1, steps, every)
    return [
        DemoWay(ways.stock()),
        *(DemoWay(_gate_of_the_rest(step), start=step - 1) for step in gates),
        *(DemoWay(_without_guidance(step), start=step) for step in gates[1::3]),
        DemoWay(gate("gate step auto", gate_step="auto"), batch_size=1),  # it decides prompt by prompt
        DemoWay(gate(f"look: {part(0.12)}, every 4", gate_step=0.12, look_interval=4)),
        DemoWay(gate(f"look: {part(0.24)}, every 6", gate_step=0.24, look_interval=6)),
        DemoWay(gate(f"gate {part(0.4)}, sp_interval 5", gate_step=0.4, sp_interval=5, warm_up=2)),
        DemoWay(gate(f"gate {part(0.6)}, sp_interval 3", gate_step=0.6, sp_interval=3, warm_up=2)),
        *(DemoWay(ways.fewer_steps(part(share))) for share in (0.2, 0.3, 0.4, 0.6)),
        DemoWay(ways.fewer_steps(part(0.48), TGateConfig(gate_step=2, look_interval=2))),
        DemoWay(ways.deep_cache(3)),
        DemoWay(ways.deep_cache(3, papers)),
        DemoWay(ways.token_merging(0.5)),
        DemoWay(ways.token_merging(0.5, papers)),
    ]


def _gate_of_the_rest(gate_step: int) -> Way:
    """The gate of a run that begins with the step that stores."""
    rest = ways.gated(TGateConfig(gate_step=1), f"gate step {gate_step}")
    return replace(rest, gate_step=gate_step)


def _without_guidance(step: int) -> Way:
    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        yield {"guidance_scale": 1.0}  # of the steps from `step` on: the positive branch alone

    return Way(f"guidance dropped after {step}", on)


def quality_of_demo(
    pipe: Any, *, count: int, seed: int, steps: int, guidance: float, every: int = 1, only: Sequence[str] = ()
) -> Report:
    """Draw held-out prompts each way and read the pictures, with a progress bar.

    Args:
        pipe: The demo's pipeline, not gated.
        count: Prompts.
        seed: The seed of the prompts; picture i starts from the noise of `seed + i`.
        steps: Number of steps in the stock run, at least 5.
        guidance: Scale of classifier-free guidance.
        every: The gate at every step, or at every so many.
        only: Parts of the names of the ways to keep; none: all. The stock pipeline is always there.

    Raises:
        ConfigError: An argument breaks its rule, or `only` names no way.
        MissingPackageError: `torchmetrics` is not installed.
    """
    require_whole("count", count, least=2)
    TGateConfig(gate_step="auto").schedule(steps)  # says if these are too few
    all_ways = {one.way: one for one in demo_ways(steps, every=every)}
    chosen = ways.named(list(all_ways), only)
    scenes = held_out_scenes(count, seed)
    stock = _Stock(pipe, scenes, seed, steps, guidance)
    real = (render(scenes, torch.Generator().manual_seed(seed)) + 1) / 2

    def score(pictures: Tensor, _: Tensor) -> Mapping[str, Tensor]:
        reading = read(pictures * 2 - 1, scenes)
        by_attribute = {
            name: reading.right[:, index][reading.named[:, index]]
            for index, name in enumerate(ATTRIBUTES)
            if reading.named[:, index].any()  # few prompts may have no relation among them
        }
        return {**by_attribute, "all right": reading.whole}

    settings = {"model": "demo", "prompts": count, "steps": steps, "guidance": guidance, "seed": seed}
    frechet = FrechetDistance(real, Latents(pipe.vae))
    with tqdm(total=len(chosen) * count, desc="drawing", unit="picture") as bar:
        return compare(chosen, lambda way: stock.draw(all_ways[way], bar), score, "all right", settings, frechet)


class Latents(torch.nn.Module):
    """What a Fréchet distance compares: the autoencoder's latents, averaged over the cells of a 4 x 4 grid."""

    num_features = 64

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = copy.deepcopy(vae).float().cpu()  # where the pictures are; the pipeline may be of less precision

    def forward(self, pictures: Tensor) -> Tensor:
        """`(count, 3, height, width)` in 0..1 -> `(count, 64)`."""
        means = [self.vae.encode(part * 2 - 1).latent_dist.mean for part in torch.split(pictures, BATCH)]
        return torch.nn.functional.adaptive_avg_pool2d(torch.cat(means), 4).flatten(1)


class _Stock:
    """The stock run, and its latents at the beginning of every step, from which other ways go on."""

    def __init__(self, pipe: Any, scenes: Sequence[Scene], seed: int, steps: int, guidance: float) -> None:
        self.pipe = pipe
        self.prompts = [caption(scene) for scene in scenes]
        self.seed = seed
        self.steps = steps
        self.settings = {"num_inference_steps": steps, "guidance_scale": guidance}
        self.latents: list[list[Tensor]] = [[] for _ in range(steps + 1)]  # of each step, chunk by chunk
        self.macs_of_a_step = 0.0

    def draw(self, one: DemoWay, bar: Any) -> Drawn:
        def arguments(chunk: slice) -> dict[str, Any]:
            kwargs = self.settings | {"prompt": self.prompts[chunk]}
            if one.start:
                return kwargs | {"latents": torch.cat(self.latents[one.start])[chunk]}
            seeds = range(self.seed + chunk.start, self.seed + chunk.stop)
            return kwargs | {"generator": [torch.Generator().manual_seed(seed) for seed in seeds]}

        way = self._remembering(one.way) if not self.macs_of_a_step else one.way
        with _from_step(self.pipe, one.start):
            drawn = draw(self.pipe, way, len(self.prompts), arguments, batch_size=one.batch_size, bar=bar)
        if not self.macs_of_a_step:
            self.macs_of_a_step = drawn.macs / self.steps
        return replace(drawn, macs=drawn.macs + one.start * self.macs_of_a_step)

    def _remembering(self, way: Way) -> Way:
        def remember(pipe: Any, step_index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            self.latents[step_index + 1].append(kwargs["latents"])
            return kwargs

        @contextmanager
        def on(pipe: Any) -> Iterator[Changes]:
            with way.on(pipe) as changes:
                yield changes | {"callback_on_step_end": remember}

        return replace(way, on=on)


@contextmanager
def _from_step(pipe: Any, start: int) -> Iterator[None]:
    """The pipeline's runs begin at step `start` for a while; its DDIM scheduler remembers nothing of earlier steps."""
    whole = pipe.scheduler
    rest = copy.deepcopy(whole)

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        type(rest).set_timesteps(rest, *args, **kwargs)
        rest.timesteps = rest.timesteps[start:]

    rest.set_timesteps = set_timesteps
    pipe.scheduler = rest
    try:
        yield
    finally:
        pipe.scheduler = whole
