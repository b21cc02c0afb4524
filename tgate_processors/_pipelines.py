"""What a pipeline offers to a gate: its networks, its callback, its guidance, the length of its loop."""

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
    """Whether the pipeline's loop can be gated.

    Raises:
        UnsupportedPipelineError: It is one of `REFUSED`.
    """
    for name in class_names(pipe):
        if name in REFUSED:
            raise UnsupportedPipelineError(
                f"`pipe` must be a pipeline with something to leave out from a step on, got {name}: "
                f"{REFUSED[name]}. Run it without T-GATE."
            )


# Guiders that compare two predictions, each from a call of its own. Where both are the same they give it back; those
# with a momentum add what earlier steps have left in it.
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
    """Whether leaving out the calls after the first is what drops guidance, where a guider says what is called.

    Raises:
        ConfigError: The guider's predictions are not those of two branches.
    """
    for name, guider in _guiders_of(pipe):
        if TWO_PREDICTIONS.isdisjoint(class_names(guider)):
            raise ConfigError(
                f"`pipe.{name}` must be a guider of two branches beside T-GATE, such as ClassifierFreeGuidance, got a "
                f"{type(guider).__name__}. Pass another one, or run without T-GATE."
            )


def _guiders_of(pipe: Any) -> Iterator[tuple[str, Any]]:
    for name, component in getattr(pipe, "components", {}).items():
        if isinstance(component, BaseGuidance):
            yield name, component


def family_of(pipe: Any) -> Family:
    """What is known of the pipeline's class, or of the nearest class that it inherits from.

    A modular pipeline calls its denoiser as its guider asks for, the positive branch first.
    """
    otherwise = Family()
    if isinstance(pipe, ModularPipeline):
        otherwise = Family(Guidance.CALLS if any(_guiders_of(pipe)) else Guidance.NONE)
    return next((FAMILIES[name] for name in class_names(pipe) if name in FAMILIES), otherwise)


def is_known(pipe: Any) -> bool:
    """Whether the pipeline's class, or one that it inherits from, is in `FAMILIES`, or its guider says all."""
    return isinstance(pipe, ModularPipeline) or any(name in FAMILIES for name in class_names(pipe))


def is_listed(pipe: Any) -> bool:
    """Whether the pipeline is of a class in `FAMILIES`, and not one derived from it, whose loop may be another."""
    return isinstance(pipe, ModularPipeline) or type(pipe).__name__ in FAMILIES


DENOISERS = ("unet", "transformer", "transformer_2")
STAGES = ("prior", "decoder", "image_unet")  # of larger systems, in pipelines that have none of these


def denoisers_of(pipe: Any) -> list[torch.nn.Module]:
    """The models that the pipeline's loop evaluates one after the other: one, or two where the noise decides.

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
    """The networks that the loop evaluates beside the denoiser and that are gated with it: ControlNets.

    Those with cross-attention, and those whose batch is two halves.
    """
    controlnet = getattr(pipe, "controlnet", None)
    if not isinstance(controlnet, torch.nn.Module) or type(controlnet).__name__ == "ControlNetXSAdapter":
        return  # the adapter's layers are the denoiser's
    for network in getattr(controlnet, "nets", [controlnet]):
        if cross_attention_layers(network) or family_of(pipe).guidance.has_halves:
            yield network


def takes_callback(pipe: Any) -> bool:
    """Whether the pipeline calls a `callback_on_step_end`; PixArt's swallow the argument in `**kwargs`."""
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def step_clock(pipe: Any, first: int | None) -> StepClock:
    """The loop that the pipeline is about to run, asked at its first evaluation.

    Args:
        pipe: The pipeline.
        first: Which of the scheduler's timesteps that evaluation is of, if known.
    """
    scheduler = pipe.scheduler
    num_timesteps = len(scheduler.timesteps)
    order = getattr(scheduler, "order", 1)
    asked = getattr(scheduler, "num_inference_steps", None) or num_timesteps
    # What diffusers' loops go through: a part in img2img, inpainting, or up to `denoising_end`.
    loop = local_of(pipe, "timesteps")
    if isinstance(loop, torch.Tensor) and loop.stride() == (0,):
        loop = None  # DiT's is the timestep of the step, for each row
    begins_at = first or getattr(scheduler, "begin_index", None) or 0
    num_evaluations = len(loop) if isinstance(loop, Sized) else num_timesteps - begins_at
    if isinstance(scheduler, DDPMWuerstchenScheduler) and num_evaluations == num_timesteps:
        num_evaluations -= 1  # its last timestep is where the loop ends
    warms_up = isinstance(scheduler, PNDMScheduler)  # Sana-Sprint's scheduler has one too many, which is not run
    return StepClock(num_evaluations, order, max(0, num_timesteps - asked * order) if warms_up else 0)


def does_guidance(pipe: Any, guidance: Guidance) -> bool | None:
    """Whether the running loop's batch has two halves; None where the pipeline keeps it to itself."""
    if getattr(pipe, "do_perturbed_attention_guidance", guidance is Guidance.PARTS):
        return False  # perturbed-attention guidance adds a part
    if guidance in (Guidance.CALLS, Guidance.NONE):
        return False
    if "apply_cfg" in inspect.unwrap(type(pipe).__call__).__code__.co_varnames:
        return cast(bool, local_of(pipe, "apply_cfg"))  # it does guidance in some steps
    name = "do_classifier_free_guidance"  # a property, or in older pipelines a variable of `__call__`
    does = getattr(pipe, name, None)
    if does is None:
        does = local_of(pipe, name)
    return None if does is None else bool(does)
