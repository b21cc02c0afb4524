"""What a pipeline tells of itself: its networks, its callback, its guidance, and the length of its loop."""

import inspect
from collections.abc import Iterable, Iterator, Sized
from typing import Any, cast

import torch
from diffusers import DDPMWuerstchenScheduler, ModularPipeline, PNDMScheduler
from diffusers.guiders.guider_utils import BaseGuidance

from tgate_processors._callers import local_of
from tgate_processors._clock import StepClock
from tgate_processors._families import FAMILIES, REFUSED, Family, Guidance, class_names
from tgate_processors._layers import cross_attention_layers
from tgate_processors.errors import ConfigError, UnsupportedPipelineError


def check_is_not_refused(pipe: Any) -> None:
    """Check that the pipeline is not one of `REFUSED`.

    Raises:
        UnsupportedPipelineError: The class of the pipeline, or a base class, is one of `REFUSED`.
    """
    for name in class_names(pipe):
        if name in REFUSED:
            raise UnsupportedPipelineError(
                f"`pipe` must be a pipeline in which the gate can leave something out, got {name}: "
                f"{REFUSED[name]}. Run it without T-GATE."
            )


# Guiders that compare two predictions, each from a call of its own. If both predictions are equal, they return it;
# those with a momentum add what earlier steps have left in it.
TWO_PREDICTIONS = {
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "FrequencyDecoupledGuidance",
    "LTX2Guidance",
    "MagnitudeAwareGuidance",
    "TangentialClassifierFreeGuidance",
}


def check_guider(pipe: Any) -> None:
    """Check that each guider of the pipeline compares two branches.

    Only then does leaving out the calls after the first drop guidance and nothing else.

    Raises:
        ConfigError: A guider compares other predictions.
    """
    for name, guider in _guiders_of(pipe):
        if TWO_PREDICTIONS.isdisjoint(class_names(guider)):
            raise ConfigError(
                f"`pipe.{name}` must be a guider of two branches, such as ClassifierFreeGuidance, got a "
                f"{type(guider).__name__}. Pass another guider, or run without T-GATE."
            )


def _guiders_of(pipe: Any) -> Iterator[tuple[str, Any]]:
    for name, component in getattr(pipe, "components", {}).items():
        if isinstance(component, BaseGuidance):
            yield name, component


def family_of(pipe: Any) -> Family:
    """Return the family of the pipeline's class, or of its nearest base class that is in `FAMILIES`.

    A modular pipeline makes the calls that its guider asks for, the positive branch first.
    """
    otherwise = Family()
    if isinstance(pipe, ModularPipeline):
        otherwise = Family(Guidance.CALLS if any(_guiders_of(pipe)) else Guidance.NONE)
    return next((FAMILIES[name] for name in class_names(pipe) if name in FAMILIES), otherwise)


def is_known(pipe: Any) -> bool:
    """Return whether the pipeline's class or a base class is in `FAMILIES`, or the pipeline is a modular one.

    A modular pipeline is known because its guider tells how it does guidance.
    """
    return isinstance(pipe, ModularPipeline) or any(name in FAMILIES for name in class_names(pipe))


def is_listed(pipe: Any) -> bool:
    """Return whether the pipeline's own class is in `FAMILIES`, or the pipeline is a modular one.

    A class that derives from one in `FAMILIES` does not count, because its loop may be another.
    """
    return isinstance(pipe, ModularPipeline) or type(pipe).__name__ in FAMILIES


DENOISERS = ("unet", "transformer", "transformer_2")
STAGES = ("prior", "decoder", "image_unet")  # denoisers of pipelines that are one stage of a larger system


def denoisers_of(pipe: Any) -> list[torch.nn.Module]:
    """Return the denoisers of the pipeline's loop: one, or two if each serves some of the noise levels.

    Raises:
        UnsupportedPipelineError: `pipe` has neither a `unet` nor a `transformer`.
    """
    denoisers = _networks(pipe, DENOISERS) or _networks(pipe, STAGES)
    if not denoisers:
        raise UnsupportedPipelineError(
            f"`pipe` must be a diffusers pipeline with a `unet` or a `transformer`, got {type(pipe).__name__}. "
            "Pass the pipeline itself; for a denoiser without one use `gated_processors`."
        )
    return denoisers


def _networks(pipe: Any, names: Iterable[str]) -> list[torch.nn.Module]:
    components = (getattr(pipe, name, None) for name in names)
    return [component for component in components if isinstance(component, torch.nn.Module)]


def side_networks_of(pipe: Any) -> Iterator[torch.nn.Module]:
    """Yield the ControlNets that are gated with the denoiser.

    These are the ControlNets that have cross-attention or whose batch has two halves.
    """
    controlnet = getattr(pipe, "controlnet", None)
    if not isinstance(controlnet, torch.nn.Module) or type(controlnet).__name__ == "ControlNetXSAdapter":
        return  # the adapter's layers are part of the denoiser
    for network in getattr(controlnet, "nets", [controlnet]):
        if cross_attention_layers(network) or family_of(pipe).guidance.has_halves:
            yield network


def takes_callback(pipe: Any) -> bool:
    """Return whether the pipeline calls a `callback_on_step_end`.

    PixArt's pipelines accept the argument in `**kwargs`, but never call it.
    """
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def step_clock(pipe: Any, first: int | None) -> StepClock:
    """Return the clock of the loop that the pipeline has begun. Call this at the loop's first evaluation.

    Args:
        pipe: The pipeline.
        first: Index of that evaluation's timestep in the scheduler's timesteps, if known.
    """
    scheduler = pipe.scheduler
    num_timesteps = len(scheduler.timesteps)
    order = getattr(scheduler, "order", 1)
    asked = getattr(scheduler, "num_inference_steps", None) or num_timesteps
    # The timesteps that diffusers' loops iterate over: in img2img, in inpainting, or up to `denoising_end`, a part of
    # the scheduler's.
    loop = local_of(pipe, "timesteps")
    if isinstance(loop, torch.Tensor) and loop.stride() == (0,):
        loop = None  # in DiT the variable has the step's timestep for each row
    begins_at = first or getattr(scheduler, "begin_index", None) or 0
    num_evaluations = len(loop) if isinstance(loop, Sized) else num_timesteps - begins_at
    if isinstance(scheduler, DDPMWuerstchenScheduler) and num_evaluations == num_timesteps:
        num_evaluations -= 1  # the loop does not evaluate its last timestep
    warms_up = isinstance(scheduler, PNDMScheduler)  # Sana-Sprint's scheduler has an extra timestep that is not run
    return StepClock(num_evaluations, order, max(0, num_timesteps - asked * order) if warms_up else 0)


def does_guidance(pipe: Any, guidance: Guidance) -> bool | None:
    """Return whether the batch of the running loop has two halves; None if the pipeline does not tell."""
    if getattr(pipe, "do_perturbed_attention_guidance", guidance is Guidance.PARTS):
        return False  # perturbed-attention guidance adds a part
    if guidance in (Guidance.CALLS, Guidance.NONE):
        return False
    if "apply_cfg" in inspect.unwrap(type(pipe).__call__).__code__.co_varnames:
        return cast(bool, local_of(pipe, "apply_cfg"))  # such a pipeline does guidance in some of its steps
    name = "do_classifier_free_guidance"  # a property, or in older pipelines a variable of `__call__`
    does = getattr(pipe, name, None)
    if does is None:
        does = local_of(pipe, name)
    return None if does is None else bool(does)
