"""The loaders of the original package (tgate 0.1.2 and 1.0.0): `pipe.tgate(...)` is `pipe(...)` with a gate."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from types import MethodType
from typing import Any

from tgate_processors import _deepcache as deepcache
from tgate_processors import _pipelines as pipelines
from tgate_processors.errors import ConfigError
from tgate_processors.handle import apply_tgate
from tgate_processors.schedule import GateStep, TGateConfig


def TgateSDLoader(
    pipe: Any, *, gate_step: GateStep = 10, num_inference_steps: int | None = None, lcm: bool = False
) -> Any:
    """Give the pipeline a method `tgate`, and return the pipeline. `pipe(...)` itself stays ungated.

        pipe = TgateSDXLLoader(pipe, gate_step=10, num_inference_steps=25).to("cuda")
        image = pipe.tgate("Astronaut in a jungle").images[0]

    `pipe.tgate` takes the arguments of the pipeline's own `__call__`, and also `gate_step`, `sp_interval=1`,
    `fi_interval=1`, `warm_up=0` and `lcm`. The arguments of the loader are its defaults. The gate calls your
    `callback_on_step_end` after every step.

    Args:
        pipe: A pipeline that `apply_tgate` can gate.
        gate_step: Number of steps before the gate closes.
        num_inference_steps: Number of steps in the run; None takes the pipeline's own default.
        lcm: Whether the model runs without guidance, as latent-consistency models do. The gate finds this out by
            itself, but `lcm=True` is an error in a run with guidance.

    Raises:
        ConfigError: An argument has a value that is not allowed.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already, or has DeepCache enabled.
    """
    return _load(pipe, None, gate_step, num_inference_steps, lcm)


TgateSDXLLoader = TgatePixArtLoader = TgatePixArtAlphaLoader = TgatePixArtSigmaLoader = TgateSVDLoader = TgateSDLoader


def TgateSDDeepCacheLoader(
    pipe: Any,
    cache_interval: int = 3,
    cache_branch_id: int = 0,
    *,
    gate_step: GateStep = 10,
    num_inference_steps: int | None = None,
    lcm: bool = False,
) -> Any:
    """Do what `TgateSDLoader` does, with DeepCache enabled in every `pipe.tgate(...)`, but not in `pipe(...)`.

    Args:
        pipe: A Stable Diffusion or SDXL pipeline.
        cache_interval: Number of steps from one full step of DeepCache to the next.
        cache_branch_id: Index of the skip connection above which DeepCache evaluates layers in the other steps.
        gate_step: As in `TgateSDLoader`.
        num_inference_steps: As in `TgateSDLoader`.
        lcm: As in `TgateSDLoader`.

    Raises:
        MissingPackageError: The `DeepCache` package is not installed.
        ConfigError, UnsupportedPipelineError, StateError: As in `TgateSDLoader`.
    """
    return _load(
        pipe, deepcache.make_helper(pipe, cache_interval, cache_branch_id), gate_step, num_inference_steps, lcm
    )


TgateSDXLDeepCacheLoader = TgateSDDeepCacheLoader


def _load(pipe: Any, helper: Any, gate_step: GateStep, num_inference_steps: int | None, lcm: bool) -> Any:
    defaults = {"gate_step": gate_step, "lcm": lcm}
    if num_inference_steps is not None:
        TGateConfig(gate_step=gate_step).schedule(num_inference_steps)
        defaults["num_inference_steps"] = num_inference_steps
    apply_tgate(pipe, TGateConfig(gate_step=gate_step)).remove()  # raise now if the pipeline cannot be gated

    def tgate(pipe: Any, *args: Any, **kwargs: Any) -> Any:
        return _call(pipe, helper, *args, **defaults | kwargs)

    tgate.__doc__ = f"`{type(pipe).__name__}.__call__`, gated for this call; see `TgateSDLoader`."
    pipe.tgate = MethodType(tgate, pipe)  # a bound method, so that a copy of the pipeline runs itself
    return pipe


def _call(
    pipe: Any,
    helper: Any,
    *args: Any,
    gate_step: GateStep,
    lcm: bool,
    sp_interval: int = 1,
    fi_interval: int = 1,
    warm_up: int = 0,
    callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
    **kwargs: Any,
) -> Any:
    config = TGateConfig(gate_step=gate_step, sp_interval=sp_interval, fi_interval=fi_interval, warm_up=warm_up)
    _check_call(pipe, args, kwargs, lcm)
    has_callback = pipelines.takes_callback(pipe)
    if callback_on_step_end is not None and not has_callback:
        raise ConfigError(
            f"`callback_on_step_end` must be left out, since {type(pipe).__name__} takes none, got "
            f"{callback_on_step_end!r}. Pass the pipeline's older `callback`."
        )
    needs = getattr(callback_on_step_end, "tensor_inputs", None)
    if needs is not None:  # an official callback of diffusers
        kwargs["callback_on_step_end_tensor_inputs"] = needs
    with (
        nullcontext() if helper is None else deepcache.enabled(helper),
        apply_tgate(pipe, config, callback_on_step_end=callback_on_step_end, deepcache=helper) as handle,
    ):
        if has_callback:
            kwargs["callback_on_step_end"] = handle
        return pipe(*args, **kwargs)


def _check_call(pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any], lcm: bool) -> None:
    """Check before the run that `lcm` fits it.

    Raises:
        ConfigError: `lcm` is True in a run with guidance.
    """
    call = inspect.signature(type(pipe).__call__).bind(pipe, *args, **kwargs)
    call.apply_defaults()
    scale = call.arguments.get("guidance_scale", call.arguments.get("max_guidance_scale"))
    embeds_guidance = getattr(pipelines.denoisers_of(pipe)[0].config, "time_cond_proj_dim", None) is not None
    if lcm and scale is not None and scale > 1 and not embeds_guidance:
        raise ConfigError(
            f"`lcm` must be False in a run with guidance, got True with a guidance scale of {scale}. "
            "Leave `lcm` out, or pass `guidance_scale=0`."
        )
