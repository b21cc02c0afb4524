"""Methods that make a pipeline faster, from this library and others. Each is a context that leaves no trace."""

import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from diffusers import PyramidAttentionBroadcastConfig
from diffusers.hooks import HookRegistry, apply_pyramid_attention_broadcast

from tgate_processors import _deepcache as deepcache
from tgate_processors._folding import batch_of, double, take_half
from tgate_processors._interception import attributes_restored, intercept, release
from tgate_processors._pipelines import denoisers_of, takes_callback
from tgate_processors.errors import ConfigError, MissingPackageError
from tgate_processors.handle import apply_tgate
from tgate_processors.schedule import TGateConfig


Changes = dict[str, Any]  # arguments of a pipeline's call that a method changes


@dataclass(frozen=True)
class Way:
    """A method to run a pipeline.

    Args:
        name: Name of the method in reports.
        on: Context manager that applies the method to a pipeline, and yields the arguments of the call to change.
        gate_step: Gate step, if the method is the plain gate of the papers. The report fits a curve through these.
        is_extra: Whether the method runs only if it is named.
        is_alone: Whether each picture needs its own call, because a gate that closes itself watches a whole batch.
    """

    name: str
    on: Callable[[Any], AbstractContextManager[Changes]]
    gate_step: int | None = None
    is_extra: bool = False
    is_alone: bool = False


def stock() -> Way:
    """Return the method that changes nothing."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        yield {}

    return Way("stock", on)


def gated(config: TGateConfig, name: str) -> Way:
    """Return the method that gates the pipeline, without its warnings."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # they tell what a setting may cost, which is being measured
            with apply_tgate(pipe, config) as tgate:
                yield {"callback_on_step_end": tgate} if takes_callback(pipe) else {}

    return Way(name, on)


class _DropsGuidance:
    """Interceptor that evaluates half of the batch after the gate, and computes cross-attention.

    It measures the part of the speed-up that comes from guidance, not from cross-attention.
    """

    def __init__(self, pipe: Any, gate_step: int, *, first: bool) -> None:
        self.scheduler = pipe.scheduler
        self.gate_step = gate_step
        self.first = first
        self.evaluations = 0

    # not recursive, so that `torch.compile` of the denoiser still compiles what `forward` calls
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # untyped in torch
    def around(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        position = self.evaluations % len(self.scheduler.timesteps)
        self.evaluations += 1
        if position // self.scheduler.order < self.gate_step:
            return forward(*args, **kwargs)
        args, kwargs = _take_half((args, kwargs), batch_of((args, kwargs)), first=self.first)
        return _double(forward(*args, **kwargs))


_take_half = torch.compiler.disable(take_half)  # type: ignore[no-untyped-call]  # untyped in torch
_double = torch.compiler.disable(double)  # type: ignore[no-untyped-call]  # untyped in torch


def dropping_guidance(gate_step: int, *, first: bool = False) -> Way:
    """Return the method that evaluates one branch after the gate, and computes its cross-attention.

    Args:
        gate_step: Number of steps with both branches. A run must evaluate each timestep of the scheduler once.
        first: Whether the first half of the batch is evaluated, which is the negative branch.
    """

    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        denoiser = denoisers_of(pipe)[0]
        dropper = _DropsGuidance(pipe, gate_step, first=first)
        intercept(denoiser, dropper)
        try:
            yield {}
        finally:
            release(denoiser)

    return Way(f"guidance dropped after {gate_step}", on)


def fewer_steps(steps: int, config: TGateConfig | None = None) -> Way:
    """Return the method that runs fewer steps, with a gate if `config` is given."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        with _gated_or_not(pipe, config) as changes:
            yield changes | {"num_inference_steps": steps}

    return Way(_named(f"fewer steps: {steps}", config), on)


def deep_cache(interval: int, config: TGateConfig | None = None) -> Way:
    """Return DeepCache with its branch 0, and with a gate if `config` is given."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        if not hasattr(pipe, "unet"):
            raise ConfigError(f"`pipe` must have a UNet for DeepCache, got {type(pipe).__name__}. Leave it out.")
        helper = deepcache.make_helper(pipe, interval, 0)
        with deepcache.enabled(helper):
            if config is None:
                yield {}
                return
            with apply_tgate(pipe, config, deepcache=helper) as tgate:
                yield {"callback_on_step_end": tgate}

    return Way(_named(f"DeepCache, interval {interval}", config), on)


def token_merging(ratio: float, config: TGateConfig | None = None) -> Way:
    """Return token merging by tomesd, with a gate if `config` is given."""

    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        tomesd = package("tomesd")
        tomesd.apply_patch(pipe, ratio=ratio)
        try:
            with _gated_or_not(pipe, config) as changes:
                yield changes
        finally:
            tomesd.remove_patch(pipe)

    return Way(_named(f"tomesd, ratio {ratio:g}", config), on)


def pyramid_attention_broadcast(config: TGateConfig | None = None) -> Way:
    """Return diffusers' PyramidAttentionBroadcast, with a gate if `config` is given.

    It keeps guidance, and reuses the outputs of attention for some steps.
    """

    @contextmanager
    def on(pipe: Any) -> Iterator[Changes]:
        denoiser = denoisers_of(pipe)[0]
        settings = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=5,
            current_timestep_callback=lambda: 500,  # a timestep in its range, so it works in every step
        )
        with attributes_restored(denoiser, "_diffusers_hook", "forward"):  # `remove_hook` leaves both behind
            apply_pyramid_attention_broadcast(denoiser, settings)
            try:
                with _gated_or_not(pipe, config) as changes:
                    yield changes
            finally:
                HookRegistry.check_if_exists_or_initialize(denoiser).remove_hook("pyramid_attention_broadcast")

    return Way(_named("PyramidAttentionBroadcast", config), on)


def _gated_or_not(pipe: Any, config: TGateConfig | None) -> AbstractContextManager[Changes]:
    return (stock() if config is None else gated(config, "")).on(pipe)


def _named(name: str, config: TGateConfig | None) -> str:
    if config is None:
        return name
    return f"{name}, gated" if config.look_interval is None else f"{name}, with looks"


class Named(Protocol):
    @property
    def name(self) -> str: ...


N = TypeVar("N", bound=Named)


def named(candidates: Sequence[N], only: Sequence[str]) -> list[N]:
    """Return the first candidate, and those whose names have a part in `only`. If `only` is empty, return all.

    Raises:
        ConfigError: A part is in no name.
    """
    for part in only:
        if not any(part in one.name for one in candidates):
            names = ", ".join(one.name for one in candidates)
            raise ConfigError(f"`only` must hold parts of names, got {part!r}. They are: {names}.")
    first, *rest = candidates
    return [first, *(one for one in rest if not only or any(part in one.name for part in only))]


def package(name: str) -> Any:
    """Import an optional package.

    Raises:
        MissingPackageError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackageError(f"`{name}` must be installed for this. Run `pip install {name}`.") from error


def said_of(error: Exception) -> str:
    """Return the text of a report for a method that failed."""
    if isinstance(error, MissingPackageError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
