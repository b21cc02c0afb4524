"""Who is timed beside a gated pipeline: the stock pipeline, the least that is possible, and other accelerators."""

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tgate_processors import deepcache
from tgate_processors.errors import ConfigError, MissingPackageError
from tgate_processors.guidance import Inputs, double, sample_of, take_half
from tgate_processors.handle import apply_tgate
from tgate_processors.interception import intercept
from tgate_processors.layers import cross_attention_layers
from tgate_processors.pipelines import denoisers_of, takes_callback
from tgate_processors.rig import Rig


Mark = Callable[[], None]  # called after each step
Run = Callable[[Mark], Any]


@dataclass(frozen=True)
class Contestant:
    """One way to run a rig.

    Args:
        name: Of its row.
        prepare: Makes the run, once; raises where it cannot.
        steps: Of its run; None: the rig's.
    """

    name: str
    prepare: Callable[[Rig, bool], Run]
    steps: int | None = None


def _compiled(pipe: Any, compiles: bool) -> None:
    if compiles:
        denoisers_of(pipe)[0].compile(fullgraph=True)


def _pipeline_run(rig: Rig, pipe: Any, call: Callable[..., Any] | None = None, **changes: Any) -> Run:
    """Call the pipeline; a mark is made after every step of its scheduler."""
    kwargs = rig.call() | changes
    step = pipe.scheduler.step

    def run(mark: Mark) -> Any:
        def marked(*args: Any, **kwargs: Any) -> Any:
            result = step(*args, **kwargs)
            mark()
            return result

        pipe.scheduler.step = marked
        return (call or pipe)(**kwargs)

    return run


def stock(rig: Rig, compiles: bool) -> Run:
    pipe = rig.pipeline()
    _compiled(pipe, compiles)
    return _pipeline_run(rig, pipe)


def gated(rig: Rig, compiles: bool) -> Run:
    pipe = rig.pipeline()
    tgate = apply_tgate(pipe, rig.config)
    _compiled(pipe, compiles)
    return _pipeline_run(rig, pipe, **{"callback_on_step_end": tgate} if takes_callback(pipe) else {})


class _GivesWhatIsStored:
    """A processor of the surgical limit: the layer's output is there."""

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
    """The denoiser alone: stock before the gate, then at half batch with its cross-attention given."""
    pipe = rig.pipeline()
    inputs = _first_inputs(rig, pipe)
    batch = sample_of(inputs).shape[0]
    planning, fidelity = (denoisers_of(rig.pipeline())[0] for _ in range(2))
    for layer in cross_attention_layers(fidelity).values():
        layer.set_processor(_GivesWhatIsStored())  # type: ignore[operator]  # of diffusers' layers
    if compiles:
        planning.compile(fullgraph=True)
        fidelity.compile(fullgraph=True)
    half = take_half(inputs, batch, first=True) if rig.known.guidance else inputs

    @torch.no_grad()
    def run(mark: Mark) -> None:
        for step in range(rig.known.steps):
            denoiser, (args, kwargs) = (planning, inputs) if step < rig.config.gate_step else (fidelity, half)
            denoiser(*args, **kwargs)
            mark()

    return run


class _Seen(Exception):
    pass


def _first_inputs(rig: Rig, pipe: Any) -> Inputs:
    """What the pipeline gives its denoiser in a run's first evaluation."""
    seen: list[Inputs] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise _Seen

    with denoisers_of(pipe)[0].register_forward_pre_hook(hook, with_kwargs=True), contextlib.suppress(_Seen):
        pipe(**rig.call())
    return seen[0]


class _DropsGuidance:
    """Half of the batch after the gate, with cross-attention computed: what of the speed-up is not T-GATE's own."""

    def __init__(self, gate_step: int) -> None:
        self.gate_step = gate_step
        self.step = 0

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def before(self, inputs: Inputs) -> Inputs:
        if self.step < self.gate_step:
            return inputs
        return take_half(inputs, sample_of(inputs).shape[0], first=True)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def after(self, output: Any) -> Any:
        self.step += 1
        return output if self.step <= self.gate_step else double(output)


def dropping_guidance(rig: Rig, compiles: bool) -> Run:
    if not rig.known.guidance:
        raise ConfigError("`model` must have guidance to drop, got one without. Leave this contestant out.")
    pipe = rig.pipeline()
    dropper = _DropsGuidance(rig.config.gate_step)
    intercept(denoisers_of(pipe)[0], dropper)
    _compiled(pipe, compiles)
    run = _pipeline_run(rig, pipe)

    def from_the_start(mark: Mark) -> Any:
        dropper.step = 0
        return run(mark)

    return from_the_start


def fewer_steps(steps: int) -> Callable[[Rig, bool], Run]:
    def prepare(rig: Rig, compiles: bool) -> Run:
        pipe = rig.pipeline()
        _compiled(pipe, compiles)
        return _pipeline_run(rig, pipe, num_inference_steps=steps)

    return prepare


def tgate_original(rig: Rig, compiles: bool) -> Run:
    """The `tgate` package 1.0.0, at the same settings."""
    original = _package("tgate")
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
        "gate_step": config.gate_step,
        "sp_interval": config.sp_interval,
        "fi_interval": config.fi_interval,
        "warm_up": config.warm_up,
    }
    if not rig.known.guidance:
        settings["lcm"] = True
    pipe = getattr(original, loader)(pipe)
    return _pipeline_run(rig, pipe, pipe.tgate, **settings)


def deep_cache(rig: Rig, compiles: bool) -> Run:
    pipe = rig.pipeline()
    _deepcache_on(pipe)
    _compiled(pipe, compiles)
    return _pipeline_run(rig, pipe)


def gated_with_deep_cache(rig: Rig, compiles: bool) -> Run:
    pipe = rig.pipeline()
    helper = _deepcache_on(pipe)
    tgate = apply_tgate(pipe, rig.config, deepcache=helper)
    _compiled(pipe, compiles)
    return _pipeline_run(rig, pipe, callback_on_step_end=tgate)


def _deepcache_on(pipe: Any) -> Any:
    if not hasattr(pipe, "unet"):
        raise ConfigError(f"`model` must have a UNet for DeepCache, got {type(pipe).__name__}. It skips its levels.")
    helper = deepcache.make_helper(pipe, cache_interval=3, cache_branch_id=0)
    helper.enable()
    return helper


def token_merging(rig: Rig, compiles: bool) -> Run:
    pipe = rig.pipeline()
    _package("tomesd").apply_patch(pipe, ratio=0.5)
    _compiled(pipe, compiles)
    return _pipeline_run(rig, pipe)


def pyramid_attention_broadcast(rig: Rig, compiles: bool) -> Run:
    """diffusers' own: attention's outputs are reused for some steps, with guidance throughout."""
    from diffusers import PyramidAttentionBroadcastConfig

    pipe = rig.pipeline()
    denoiser = denoisers_of(pipe)[0]
    if not hasattr(denoiser, "enable_cache"):
        raise ConfigError(
            f"`model` must be one that diffusers' caches know, got {type(denoiser).__name__}, which has no "
            "`enable_cache`."
        )
    denoiser.enable_cache(  # type: ignore[operator]  # of diffusers' CacheMixin
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=5,
            current_timestep_callback=lambda: int(pipe.scheduler.timesteps[0]),
        )
    )
    _compiled(pipe, compiles)
    return _pipeline_run(rig, pipe)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"not installed: `pip install {name}`") from error


def contestants(rig: Rig, equal_steps: int) -> list[Contestant]:
    """All of them, the stock pipeline first.

    Args:
        rig: What they run.
        equal_steps: Steps of the stock pipeline with the gated run's arithmetic.
    """
    return [
        Contestant("stock", stock),
        Contestant("tgate_processors", gated),
        Contestant("surgical limit", surgical_limit),
        Contestant("dropping guidance alone", dropping_guidance),
        Contestant(f"fewer steps: {equal_steps}", fewer_steps(equal_steps), equal_steps),
        Contestant("tgate 1.0.0", tgate_original),
        Contestant("DeepCache, interval 3", deep_cache),
        Contestant("tgate_processors and DeepCache", gated_with_deep_cache),
        Contestant("tomesd, ratio 0.5", token_merging),
        Contestant("PyramidAttentionBroadcast", pyramid_attention_broadcast),
    ]
