"""What a pipeline offers to a gate: its networks, its callback, its guidance, the length of its loop.

Facts are of diffusers 0.42. What cannot be asked of a pipeline stands in `FAMILIES`.
"""

import inspect
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from diffusers import PNDMScheduler

from tgate_processors._callers import local_of
from tgate_processors._clock import StepClock
from tgate_processors._layers import cross_attention_layers
from tgate_processors.errors import StateError, UnsupportedPipelineError
from tgate_processors.schedule import Branch


class Guidance(Enum):
    """How a pipeline evaluates the branches of its guidance."""

    HALVES = "one batch `[negative, positive]`: one half is dropped"
    HALVES_POSITIVE_FIRST = "one batch `[positive, negative]`: one half is dropped"
    CALLS = "a call for each branch: the calls after the first are left out"
    PARTS = "one batch of three parts or more: kept, cross-attention alone is reused"
    NONE = "there is none: cross-attention alone is reused"


@dataclass(frozen=True)
class Family:
    """What is known of a pipeline class and cannot be asked of its instances.

    Args:
        guidance: How its branches are evaluated.
        branch: The branch that is denoised after the gate unless the configuration names one.
    """

    guidance: Guidance = Guidance.HALVES
    branch: Branch = "negative"


def _families(family: Family, *names: str) -> dict[str, Family]:
    return dict.fromkeys(names, family)


# Each of these is run by the tests. A pipeline that derives from one of them is taken to be like it.
FAMILIES = {
    **_families(
        Family(),
        "AllegroPipeline",
        "AnimateDiffControlNetPipeline",
        "AnimateDiffPipeline",
        "AnimateDiffSDXLPipeline",
        "AnimateDiffSparseControlNetPipeline",
        "AnimateDiffVideoToVideoControlNetPipeline",
        "AnimateDiffVideoToVideoPipeline",
        "AudioLDM2Pipeline",
        "HunyuanDiTControlNetPipeline",
        "HunyuanDiTPipeline",
        "Kandinsky3Img2ImgPipeline",
        "Kandinsky3Pipeline",
        "KolorsImg2ImgPipeline",
        "KolorsPipeline",
        "LTXConditionPipeline",
        "LTXImageToVideoPipeline",
        "LTXPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
        "LatentConsistencyModelPipeline",
        "LattePipeline",
        "PixArtAlphaPipeline",
        "PixArtSigmaPipeline",
        "SanaControlNetPipeline",
        "SanaPipeline",
        "SanaVideoPipeline",
        "StableAudioPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetXSPipeline",
        "StableDiffusionDepth2ImgPipeline",
        "StableDiffusionGLIGENPipeline",
        "StableDiffusionImageVariationPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionLatentUpscalePipeline",
        "StableDiffusionPipeline",
        "StableDiffusionUpscalePipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetXSPipeline",
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLPipeline",
        "TextToVideoSDPipeline",
        "VideoToVideoSDPipeline",
    ),
    # The original goes on with what it calls negative embeddings, which are the image's: the second half.
    **_families(Family(branch="positive"), "StableVideoDiffusionPipeline"),
    **_families(Family(Guidance.HALVES_POSITIVE_FIRST), "LuminaPipeline"),
    **_families(
        Family(Guidance.CALLS),
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Kandinsky5T2IPipeline",
        "Kandinsky5T2VPipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2Pipeline",
        "WanImageToVideoPipeline",
        "WanPipeline",
        "WanVACEPipeline",
        "WanVideoToVideoPipeline",
    ),
    **_families(
        Family(Guidance.PARTS),
        "AnimateDiffPAGPipeline",
        "HunyuanDiTPAGPipeline",
        "KolorsPAGPipeline",
        "LEditsPPPipelineStableDiffusion",
        "LEditsPPPipelineStableDiffusionXL",
        "PixArtSigmaPAGPipeline",
        "SanaPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLPAGPipeline",
    ),
    **_families(
        Family(Guidance.NONE),
        "MarigoldDepthPipeline",
        "MarigoldIntrinsicsPipeline",
        "MarigoldNormalsPipeline",
        "SanaSprintImg2ImgPipeline",
        "SanaSprintPipeline",
    ),
}


# Pipelines with cross-attention whose loop has no step at which it could be reused.
REFUSED = {
    **dict.fromkeys(
        ("StableDiffusionAttendAndExcitePipeline", "StableDiffusionPix2PixZeroPipeline"),
        "it differentiates its cross-attention maps in every step",
    ),
    "StableDiffusionPanoramaPipeline": "it evaluates the denoiser for each view of a step, one after the other",
    "StableDiffusionParadigmsPipeline": "it denoises many steps in one batch",
    "StableDiffusionSAGPipeline": "it evaluates the denoiser again on a blurred picture in every step",
    **dict.fromkeys(
        (
            "SkyReelsV2DiffusionForcingImageToVideoPipeline",
            "SkyReelsV2DiffusionForcingPipeline",
            "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
        ),
        "its frames are at different steps of denoising",
    ),
    **dict.fromkeys(
        ("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"),
        "it runs parts of the loop several times, with different numbers of frames",
    ),
}


def check_is_not_refused(pipe: Any) -> None:
    """Whether the pipeline's loop can be gated.

    Raises:
        UnsupportedPipelineError: It is one of `REFUSED`.
    """
    for name in _class_names(pipe):
        if name in REFUSED:
            raise UnsupportedPipelineError(
                f"`pipe` must be a pipeline that evaluates its denoiser once for each step, got {name}: "
                f"{REFUSED[name]}. Run it without T-GATE."
            )


def family_of(pipe: Any) -> Family:
    """What is known of the pipeline's class, or of the nearest class that it inherits from."""
    return next((FAMILIES[name] for name in _class_names(pipe) if name in FAMILIES), Family())


def is_known(pipe: Any) -> bool:
    """Whether the pipeline's class, or one that it inherits from, is in `FAMILIES`."""
    return any(name in FAMILIES for name in _class_names(pipe))


def is_listed(pipe: Any) -> bool:
    """Whether the pipeline is of a class in `FAMILIES`, and not one derived from it, whose loop may be another."""
    return type(pipe).__name__ in FAMILIES


def _class_names(pipe: Any) -> list[str]:
    return [cls.__name__ for cls in type(pipe).__mro__]


def denoisers_of(pipe: Any) -> list[torch.nn.Module]:
    """The models that the pipeline's loop evaluates one after the other: one, or two where the noise decides.

    Raises:
        UnsupportedPipelineError: `pipe` has neither a `unet` nor a `transformer`.
    """
    components = (getattr(pipe, name, None) for name in ("unet", "transformer", "transformer_2"))
    denoisers = [component for component in components if isinstance(component, torch.nn.Module)]
    if not denoisers:
        raise UnsupportedPipelineError(
            f"`pipe` must be a diffusers pipeline with a `unet` or a `transformer`, got {type(pipe).__name__}. "
            "Pass the pipeline itself; for a denoiser without one use `gated_processors`."
        )
    return denoisers


def side_networks_of(pipe: Any) -> Iterator[torch.nn.Module]:
    """The networks with cross-attention that the loop evaluates beside the denoiser: ControlNets."""
    controlnet = getattr(pipe, "controlnet", None)
    if not isinstance(controlnet, torch.nn.Module) or type(controlnet).__name__ == "ControlNetXSAdapter":
        return  # the adapter's layers are the denoiser's
    for network in getattr(controlnet, "nets", [controlnet]):
        if cross_attention_layers(network):
            yield network


def takes_callback(pipe: Any) -> bool:
    """Whether the pipeline calls a `callback_on_step_end`; PixArt's swallow the argument in `**kwargs`."""
    return "callback_on_step_end" in inspect.signature(type(pipe).__call__).parameters


def step_clock(pipe: Any) -> StepClock:
    """The loop that the pipeline is about to run, asked at its first evaluation."""
    scheduler = pipe.scheduler
    num_timesteps = len(scheduler.timesteps)
    order = getattr(scheduler, "order", 1)
    asked = getattr(scheduler, "num_inference_steps", None) or num_timesteps
    # What diffusers' loops go through: a part in img2img, inpainting, or up to `denoising_end`.
    loop = local_of(pipe, "timesteps")
    begins_at = getattr(scheduler, "begin_index", None) or 0
    num_evaluations = len(loop) if isinstance(loop, Sized) else num_timesteps - begins_at
    warms_up = isinstance(scheduler, PNDMScheduler)  # Sana-Sprint's scheduler has one too many, which is not run
    return StepClock(num_evaluations, order, max(0, num_timesteps - asked * order) if warms_up else 0)


def does_guidance(pipe: Any, guidance: Guidance) -> bool | None:
    """Whether the running loop's batch has two halves; None where the pipeline keeps it to itself."""
    if getattr(pipe, "do_perturbed_attention_guidance", guidance is Guidance.PARTS):
        return False  # perturbed-attention guidance adds a part
    if guidance in (Guidance.CALLS, Guidance.NONE):
        return False
    name = "do_classifier_free_guidance"  # a property, or in older pipelines a variable of `__call__`
    does = getattr(pipe, name, None)
    if does is None:
        does = local_of(pipe, name)
    return None if does is None else bool(does)


CACHE_DIT = "cache-dit"


def check_has_no_cache(denoiser: torch.nn.Module, guidance: Guidance) -> None:
    """Whether nothing else is kept of the denoiser that would not fit what is left of its calls.

    Raises:
        StateError: One of diffusers' caches is enabled on a denoiser whose batch is halved, or cache-dit (1.5) on one
            whose batch is halved or whose calls are left out.
    """
    name = _cache_on(denoiser)
    if name is None or guidance in (Guidance.PARTS, Guidance.NONE):
        return
    if guidance is not Guidance.CALLS:
        why = f"which halves the batch at the gate: what {name} keeps fits the whole batch"
    elif name == CACHE_DIT:
        why = f"which leaves out calls after the gate: {name} counts them to tell the branches apart"
    else:
        return  # diffusers tells the branches apart by name
    raise StateError(
        f"`pipe` must not have {name} enabled on its {type(denoiser).__name__} beside T-GATE, {why}. "
        "Disable one of the two."
    )


def _cache_on(denoiser: Any) -> str | None:
    if getattr(denoiser, "is_cache_enabled", False):
        return type(denoiser._cache_config).__name__.removesuffix("Config")
    return CACHE_DIT if getattr(denoiser, "_is_cached", False) else None
