"""What a pipeline offers to a gate: its denoiser, its callback, its guidance, the length of its loop.

Facts are of diffusers 0.42. What cannot be asked of a pipeline stands in `FAMILIES`.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from tgate_processors.errors import UnsupportedPipelineError
from tgate_processors.schedule import Branch, StepClock


@dataclass(frozen=True)
class Family:
    """What is known of a pipeline class and cannot be asked of its instances.

    Args:
        branch: The branch that is denoised after the gate unless the configuration names one.
        folds: Whether guidance is a batch of two halves, one of which can be dropped.
    """

    branch: Branch = "negative"
    folds: bool = True


FAMILIES = {
    # The original goes on with what it calls negative embeddings, which are the image's: the second half.
    "StableVideoDiffusionPipeline": Family(branch="positive"),
    # Three parts, [text, image, neither]: guidance is kept.
    "StableDiffusionInstructPix2PixPipeline": Family(folds=False),
    "StableDiffusionXLInstructPix2PixPipeline": Family(folds=False),
}


def family_of(pipe: Any) -> Family:
    """What is known of the pipeline's class, or of the nearest class that it inherits from."""
    known = (FAMILIES[cls.__name__] for cls in type(pipe).__mro__ if cls.__name__ in FAMILIES)
    return next(known, Family())


def denoiser_of(pipe: Any) -> torch.nn.Module:
    """The model that the pipeline's loop evaluates.

    Raises:
        UnsupportedPipelineError: `pipe` has neither a `unet` nor a `transformer`.
    """
    for name in ("unet", "transformer"):
        denoiser = getattr(pipe, name, None)
        if isinstance(denoiser, torch.nn.Module):
            return denoiser
    raise UnsupportedPipelineError(
        f"`pipe` must be a diffusers pipeline with a `unet` or a `transformer`, got {type(pipe).__name__}. "
        "Pass the pipeline itself; for a denoiser without one use `gated_processors`."
    )


def takes_callback(pipe: Any) -> bool:
    """Whether the pipeline calls a `callback_on_step_end`; PixArt's swallow the argument in `**kwargs`."""
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def step_clock(pipe: Any) -> StepClock:
    """The loop that the pipeline is about to run, asked at its first evaluation."""
    scheduler = pipe.scheduler
    num_timesteps = len(scheduler.timesteps)
    order = getattr(scheduler, "order", 1)
    asked = getattr(scheduler, "num_inference_steps", None) or num_timesteps
    remaining = num_timesteps - (getattr(scheduler, "begin_index", None) or 0)
    return StepClock(
        # img2img and inpainting run a part of the timesteps, and say so here
        num_evaluations=getattr(pipe, "num_timesteps", None) or remaining,
        order=order,
        num_warmup_evaluations=max(0, num_timesteps - asked * order),
    )


def does_guidance(pipe: Any) -> bool | None:
    """Whether the running loop's batch is `[negative, positive]`; None where the pipeline keeps it to itself."""
    if not family_of(pipe).folds or getattr(pipe, "do_perturbed_attention_guidance", False):
        return False
    guidance = getattr(pipe, "do_classifier_free_guidance", None)
    return None if guidance is None else bool(guidance)
