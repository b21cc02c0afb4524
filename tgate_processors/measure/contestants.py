"""Contestants of the benchmark: the gated pipeline, the stock one, the least possible time, and other accelerators."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tgate_processors._folding import batch_of, double, take_half
from tgate_processors._layers import cross_attention_layers
from tgate_processors._pipelines import denoisers_of
from tgate_processors.errors import ConfigError
from tgate_processors.measure import ways
from tgate_processors.measure.rig import Rig
from tgate_processors.schedule import LEAST_STEPS_FOR_AUTO, TGateConfig


Mark = Callable[[], None]  # a run calls it after each step
Run = Callable[[Mark], Any]


@dataclass(frozen=True)
class Contestant:
    """One method to run a rig.

    Args:
        name: Name of the report's row.
        prepare: Function that makes the run, once. It raises if the contestant cannot run.
        phases: Whether all steps before the gate take the same time, and all steps after it.
        closes: Whether steps after the gate differ from those before it.
    """

    name: str
    prepare: Callable[[Rig, bool], Run]
    phases: bool = True
    closes: bool = True


def _compiled(pipe: Any, compiles: bool) -> None:
    if compiles:
        denoisers_of(pipe)[0].compile(fullgraph=True)


class _PipelineRun:
    """A pipeline's call with a method applied to the pipeline for good. Each step of the scheduler makes a mark."""

    def __init__(self, rig: Rig, pipe: Any, way: ways.Way, call: Callable[..., Any] | None = None, **changes: Any):
        self._pipe = pipe
        self._call = call or pipe
        self._context = way.on(pipe)
        self._kwargs = rig.call() | changes | self._context.__enter__()
        self._step = pipe.scheduler.step

    def __call__(self, mark: Mark) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = self._step(*args, **kwargs)
            mark()
            return result

        self._pipe.scheduler.step = marked
        return self._call(**self._kwargs)


def by_way(way: ways.Way) -> Callable[[Rig, bool], Run]:
    """Return the function that prepares a run of the rig's pipeline with a method."""

    def prepare(rig: Rig, compiles: bool) -> Run:
        pipe = rig.pipeline()
        run = _PipelineRun(rig, pipe, way)
        _compiled(pipe, compiles)
        return run

    return prepare


class _StoredOutput:
    """Processor of the surgical limit, which returns a stored output."""

    def __init__(self) -> None:
        self.stored: torch.Tensor | None = None

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self.stored is None:
            self.stored = torch.zeros_like(hidden_states)
        return self.stored


def surgical_limit(rig: Rig, compiles: bool) -> Run:
    """Return a run of the stock pipeline whose denoiser is replaced by two.

    The stock denoiser evaluates the steps before the gate. After it the other one evaluates half of the batch, with
    stored cross-attention.
    """
    planning, fidelity = (denoisers_of(rig.pipeline())[0] for _ in range(2))
    for layer in cross_attention_layers(fidelity).values():
        layer.set_processor(_StoredOutput())  # type: ignore[operator]  # untyped in diffusers
    if compiles:
        planning.compile(fullgraph=True)
        fidelity.compile(fullgraph=True)
    evaluations = itertools.count()  # one a step

    def answer(*args: Any, **kwargs: Any) -> Any:
        if next(evaluations) % rig.known.steps < rig.gate_step:
            return planning(*args, **kwargs)
        if not rig.known.guidance:
            return fidelity(*args, **kwargs)
        args, kwargs = take_half((args, kwargs), batch_of((args, kwargs)), first=True)
        return double(fidelity(*args, **kwargs))

    pipe = rig.pipeline()
    denoisers_of(pipe)[0].forward = answer
    return _PipelineRun(rig, pipe, ways.stock())


def tgate_original(rig: Rig, compiles: bool) -> Run:
    """Return a run of the `tgate` package 1.0.0 with the same settings."""
    original = ways.package("tgate")
    pipe = rig.pipeline()
    _compiled(pipe, compiles)
    kind = type(pipe).__name__
    loader = {
        "StableDiffusionPipeline": "TgateSDLoader",
        "StableDiffusionXLPipeline": "TgateSDXLLoader",
        "PixArtAlphaPipeline": "TgatePixArtAlphaLoader",
    }[kind]
    config = rig.config
    settings = {
        "gate_step": rig.gate_step,
        "sp_interval": config.sp_interval,
        "fi_interval": config.fi_interval,
        "warm_up": config.warm_up,
    }
    if not rig.known.guidance:
        settings["lcm"] = True
    pipe = getattr(original, loader)(pipe)
    return _PipelineRun(rig, pipe, ways.stock(), pipe.tgate, **settings)


# times what `gate_step="auto"` costs in a step; with this tolerance a run never closes its gate
_WATCHING = TGateConfig(gate_step="auto", tolerance=1e-9)


def contestants(rig: Rig, equal_steps: int) -> list[Contestant]:
    """Return all contestants, with the stock pipeline first.

    Args:
        rig: Rig that the contestants run.
        equal_steps: Number of steps in which the stock pipeline does the gated run's arithmetic.
    """
    gated = by_way(ways.gated(rig.config, "tgate_processors"))
    dropping = _needs_guidance(by_way(ways.dropping_guidance(rig.gate_step, first=True)))
    watching = Contestant("watching, as with gate step auto", by_way(ways.gated(_WATCHING, "")), closes=False)
    return [
        Contestant("stock", by_way(ways.stock())),
        Contestant("tgate_processors", gated),
        *([watching] if rig.known.steps >= LEAST_STEPS_FOR_AUTO else []),
        Contestant("surgical limit", surgical_limit),
        Contestant("dropping guidance alone", dropping),
        Contestant(f"fewer steps: {equal_steps}", by_way(ways.fewer_steps(equal_steps)), phases=False),
        Contestant("tgate 1.0.0", tgate_original),
        Contestant("DeepCache, interval 3", by_way(ways.deep_cache(3)), phases=False),
        Contestant("tgate_processors and DeepCache", by_way(ways.deep_cache(3, rig.config)), phases=False),
        Contestant("tomesd, ratio 0.5", by_way(ways.token_merging(0.5))),
        Contestant("PyramidAttentionBroadcast", by_way(ways.pyramid_attention_broadcast()), phases=False),
        Contestant(
            "tgate_processors and PyramidAttentionBroadcast",
            by_way(ways.pyramid_attention_broadcast(rig.config)),
            phases=False,
        ),
    ]


def _needs_guidance(prepare: Callable[[Rig, bool], Run]) -> Callable[[Rig, bool], Run]:
    def checked(rig: Rig, compiles: bool) -> Run:
        if not rig.known.guidance:
            raise ConfigError("`model` must have guidance to drop, got one without. Leave this contestant out.")
        return prepare(rig, compiles)

    return checked
