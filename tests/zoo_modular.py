"""Tiny modular pipelines, whose loops ask a guider for their guidance, made of diffusers' own blocks; a call of each.

The blocks that encode and decode are taken out, as one does who has embeddings and wants latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import adapters
import torch
import zoo_images
import zoo_joint
import zoo_qwen
import zoo_unets
import zoo_videos
import zoo_worlds
from at_hand import Entries, diffusers
from zoo import STEPS, images, of_pictures, wake
from zoo_transformers import CHANNELS, FROM_IMAGE_SIZES, LTX, TOKENS, WIDTH, in_latents, noise, text, unipc, wan


@dataclass(frozen=True)
class Entry:
    """How a modular pipeline is built and called.

    Args:
        build: Makes the pipeline; its weights are random, its guiders are on in every step.
        call: The arguments for a list of pictures, each known by its number: picture 3 has the same inputs alone and
            in a batch. Among them are `num_inference_steps=STEPS` and `output`, which makes the result latents.
        branches: Calls in a step of the denoiser, or of each where a step calls more than one.
        denoisers: The components that are called in the loop.
        guiders: The components that combine what they return.
    """

    build: Callable[[], Any]
    call: Callable[[list[int]], dict[str, Any]]
    branches: int = 2
    denoisers: tuple[str, ...] = ("transformer",)
    guiders: tuple[str, ...] = ("guider",)


MODULAR = Entries()

# Pipelines that do not run on a batch of two, with the reason.
ONE_PICTURE_ONLY = {
    "HeliosPyramid",  # between resolutions, all pictures' noise is drawn from the first one's generator
    "Wan22Vace",  # refuses more than one video
}


def register(
    name: str, needs: str, build: Callable[[], Any], call: Callable[[list[int]], dict[str, Any]], **settings: Any
):
    MODULAR.add(name, Entry(build, call, **settings), needs)


def silence(blocks):
    """A pipeline tells its outermost blocks alone of progress bars, and the loops are further in."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        silence(block)


def build(blocks, guiders, **components):
    """A pipeline that denoises; a component that is a function is called, so that its weights are drawn then."""
    chosen = getattr(diffusers, blocks)()
    for name in list(chosen.sub_blocks):
        if name != "denoise":
            chosen.sub_blocks.pop(name)
    silence(chosen)
    pipe = chosen.init_pipeline()
    made = {name: component() if callable(component) else component for name, component in components.items()}
    for network in made.values():
        if isinstance(network, torch.nn.Module):
            wake(network)
    for number, name in enumerate(guiders):
        # The scale is named: what is given by position is lost in a copy that `new` makes.
        made.setdefault(name, diffusers.ClassifierFreeGuidance(guidance_scale=5.0 - number))
    pipe.update_components(**made)
    return pipe


def call(pictures, inputs=(), latents=None, **settings):
    """Arguments of a call; `inputs` are functions of the pictures, `latents` is the shape of a picture's noise."""
    given = {"num_inference_steps": STEPS, "output": "latents"}
    for inputs_of in inputs:
        given |= inputs_of(pictures)
    given.pop("negative_prompt", None)  # the blocks that knew it are gone
    if latents:
        given["latents"] = of_pictures(pictures, *latents)
    return given | settings


def modular(name, components, *inputs, label=None, entry=None, **settings):
    """Register blocks with what they are built from and what they are given; `entry` has what is not as usual."""
    entry = entry or {}
    family = name.removesuffix("AutoBlocks").removesuffix("Blocks")
    register(
        label or family,
        name,
        partial(build, name, entry.get("guiders", ("guider",)), **components),
        partial(call, inputs=inputs, **settings),
        **entry,
    )


def without(components, *names):
    return {name: component for name, component in components.items() if name not in names}


flow = diffusers.FlowMatchEulerDiscreteScheduler
plain_text = partial(text, masks=())
in_row = {"latents": (4, 4 * CHANNELS), "height": 32, "width": 32}
in_32 = {"latents": (CHANNELS, 4, 4), "height": 32, "width": 32}


# Stable Diffusion XL: its loop turns its guider on, whoever turned it off

SDXL = {"unet": partial(zoo_unets.unet, **zoo_unets.XL), "scheduler": diffusers.EulerDiscreteScheduler}
A_UNET = {"denoisers": ("unet",)}
sdxl = partial(modular, "StableDiffusionXLAutoBlocks", entry=A_UNET, latents=(CHANNELS, 8, 8), height=64, width=64)
sdxl_text = partial(zoo_unets.text, xl=True)
sdxl(SDXL, sdxl_text)
# Twice as many steps, and the guider, which is told half of their number, takes the second half to be past its end.
sdxl(SDXL | {"scheduler": diffusers.HeunDiscreteScheduler}, sdxl_text, label="StableDiffusionXL (Heun)")


def controlnet():
    """For pictures that are eight times larger than the latents."""
    return zoo_unets.controlnet(**zoo_unets.XL_CONTROL, conditioning_embedding_out_channels=(4,) * 4)


def control_image(pictures):
    return {"control_image": images(pictures, 64, 64, kind=7)}


CONTROLLED = SDXL | {"controlnet": controlnet}
sdxl(CONTROLLED, sdxl_text, control_image, label="StableDiffusionXL (ControlNet)")
# The ControlNet is not asked about the negative prompt.
sdxl(CONTROLLED, sdxl_text, control_image, label="StableDiffusionXL (guess mode)", guess_mode=True)


def build_ip_adapter():
    pipe = MODULAR["StableDiffusionXL"].build()
    pipe.unet._load_ip_adapter_weights([adapters.ip_adapter(pipe.unet)])
    return pipe


def call_ip_adapter(pictures):
    given = MODULAR["StableDiffusionXL"].call(pictures)
    for number, name in enumerate(("ip_adapter_embeds", "negative_ip_adapter_embeds")):
        given[name] = [of_pictures(pictures, 1, adapters.IMAGE_WIDTH, kind=20 + number)]
    return given


register("StableDiffusionXL (IP-Adapter)", "StableDiffusionXLAutoBlocks", build_ip_adapter, call_ip_adapter, **A_UNET)


# Wan: 2.2 has two networks, one after the other, each with a guider

TWO_NETWORKS = {"denoisers": ("transformer", "transformer_2"), "guiders": ("guider", "guider_2")}


def wan_parts(network, two=False):
    parts = {"transformer": network, "scheduler": unipc}
    return parts | {"transformer_2": network} if two else parts


def first_frame(pictures):
    """In the latents, with a mask."""
    return {"image_condition_latents": of_pictures(pictures, CHANNELS + 4, 2, 4, 4, kind=5)}


def seen_frame(pictures):
    return first_frame(pictures) | {"image_embeds": of_pictures(pictures, 5, 8, kind=6)}


def beside(pictures):
    """A video to follow, which goes to the network as it is."""
    return {"denoiser_input_fields": {"control_hidden_states": of_pictures(pictures, VACE_CHANNELS, 2, 4, 4, kind=5)}}


VACE_CHANNELS = 2 * CHANNELS + 4 * 4
vace = partial(wan, diffusers.WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=VACE_CHANNELS)
long_text = partial(plain_text, tokens=512)  # a layer takes the last 512 tokens for the text
with_frame = partial(wan, in_channels=FROM_IMAGE_SIZES["in_channels"])
modular("WanBlocks", wan_parts(wan), plain_text, **in_latents)
modular("WanImage2VideoAutoBlocks", wan_parts(partial(wan, **FROM_IMAGE_SIZES)), long_text, seen_frame, **in_latents)
wan_22 = partial(modular, entry=TWO_NETWORKS, **in_latents)
wan_22("Wan22Blocks", wan_parts(wan, two=True), plain_text)
wan_22("Wan22Image2VideoBlocks", wan_parts(with_frame, two=True), plain_text, first_frame)
wan_22("Wan22VaceBlocks", wan_parts(vace, two=True), plain_text, beside)


# Qwen-Image: what guidance makes is as long as what the prompt alone makes

QWEN = {"transformer": zoo_qwen.qwen, "scheduler": zoo_joint.shifted_flow}


def edited(pictures):
    """The picture to edit, encoded."""
    return {"image_latents": of_pictures(pictures, CHANNELS, 1, 4, 4, kind=5)}


def taken_apart(pictures):
    return {name: latents.movedim(2, 1) for name, latents in edited(pictures).items()}


def listed(pictures):
    return {name: [latents] for name, latents in edited(pictures).items()}


modular("QwenImageAutoBlocks", QWEN, zoo_qwen.two_lengths, **in_row)
modular("QwenImageEditAutoBlocks", QWEN, zoo_qwen.two_lengths, edited, **in_row)
modular("QwenImageEditPlusAutoBlocks", QWEN, zoo_qwen.two_lengths, listed, **in_row)
modular(
    "QwenImageLayeredAutoBlocks",
    QWEN | {"transformer": partial(zoo_qwen.qwen, use_additional_t_cond=True, use_layer3d_rope=True)},
    zoo_qwen.two_lengths,
    taken_apart,
    layers=2,
    latents=((2 + 1) * 4, 4 * CHANNELS),  # of the layers, and of the picture again
)


# Qwen-Image 2.1: can keep the keys and values of each branch from its first call


def without_pictures(pictures):
    """None of the text's tokens is of a picture."""
    given = zoo_qwen.two_lengths(pictures)
    for name in ("prompt_embeds_mask", "negative_prompt_embeds_mask"):
        given[name.replace("prompt_embeds", "image_pad")] = torch.zeros_like(given[name], dtype=torch.bool)
    return given


QWEN_21 = QWEN | {"transformer": zoo_qwen.qwen_21}
qwen_21 = partial(
    modular, "QwenImage21AutoBlocks", QWEN_21, without_pictures, latents=(16, CHANNELS), height=64, width=64
)
qwen_21()
qwen_21(label="QwenImage21 (without cache)", use_kv_cache=False)


# Pictures: Stable Diffusion 3, Flux 2 and 3, Z-Image, Krea 2, ERNIE-Image


def text_list(pictures):
    return {name: list(embeds) for name, embeds in zoo_images.plain_text(pictures).items()}


def flux_3():
    return diffusers.Flux3Transformer2DModel(
        in_channels=4 * CHANNELS,
        cond_in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        timestep_channels=8,
        mlp_ratio=1.0,
        axes_dims_rope=(2, 2, 2, 2),
    )


def ernie():
    return diffusers.ErnieImageTransformer2DModel(
        hidden_size=16,
        num_attention_heads=2,
        num_layers=2,
        ffn_hidden_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_in_dim=WIDTH,
        rope_axes_dim=(2, 2, 4),
    )


# Adds guidance to what the prompt alone makes, and so its scale is less by one.
FROM_THE_PROMPT = {
    "guider": partial(diffusers.ClassifierFreeGuidance, guidance_scale=4.0, use_original_formulation=True)
}


def flowing(network):
    return {"transformer": network, "scheduler": flow}


modular("StableDiffusion3AutoBlocks", without(zoo_joint.sd3(), "vae"), *zoo_joint.TEXTS, **in_32)
modular(
    "Flux2KleinBaseAutoBlocks",
    without(zoo_joint.KLEIN, "vae"),
    zoo_joint.prompt,
    zoo_joint.shorter,
    **zoo_joint.IN_SQUARES,
)
modular(
    "Flux3AutoBlocks",
    flowing(flux_3),
    zoo_joint.prompt,
    zoo_joint.shorter,
    latents=(4 * CHANNELS, 2, 2),
    height=32,
    width=32,
)
modular("ZImageAutoBlocks", zoo_images.Z_IMAGE, zoo_images.text_list, **in_32)  # its own guider is off
modular("Krea2AutoBlocks", flowing(zoo_images.krea) | FROM_THE_PROMPT, zoo_images.layered_text, **in_row)
modular("ErnieImageAutoBlocks", flowing(ernie), text_list, latents=(CHANNELS, 4, 4), height=64, width=64)


# Videos: LTX, HunyuanVideo 1.5

modular("LTXAutoBlocks", LTX, text, latents=(2 * 2 * 2, 4), height=64, width=64, num_frames=9)
modular(
    "HunyuanVideo15AutoBlocks",
    without(zoo_videos.HUNYUAN_15, "vae"),
    zoo_videos.text_15,
    zoo_videos.text_15_of_glyphs,
    **in_latents | {"height": 64, "width": 64},
)


# Helios: chunk after chunk, and in three resolutions, each with steps that are counted anew


def resolutions(_):
    """Their steps, four in all."""
    return {"pyramid_num_inference_steps_list": [1, 1, STEPS - 2]}


HELIOS = without(zoo_worlds.HELIOS, "vae")
ONE_RESOLUTION = HELIOS | {"scheduler": partial(diffusers.HeliosScheduler, stages=1)}
in_chunks = zoo_worlds.TWO_FRAMES_A_CHUNK
helios = partial(modular, "HeliosAutoBlocks", ONE_RESOLUTION, plain_text, noise, height=32, width=32)
helios(**in_chunks)
helios(label="Helios (two chunks)", entry={"branches": 2 * 2}, **in_chunks | {"num_frames": 10})
modular(
    "HeliosPyramidAutoBlocks",
    HELIOS | {"scheduler": zoo_worlds.helios_scheduler},
    plain_text,
    noise,
    resolutions,
    height=64,
    width=64,
    **in_chunks,
)


# LTX-2: a guider for the video and one for its sound, of which a pass is run that either wants


def sounding_text(pictures):
    given: dict[str, Any] = {"batch_size": len(pictures), "dtype": torch.float32}
    for number, name in enumerate(("", "negative_")):
        given[f"{name}connector_prompt_embeds"] = of_pictures(pictures, TOKENS, WIDTH, kind=1 + number)
        given[f"{name}connector_audio_prompt_embeds"] = of_pictures(pictures, TOKENS, WIDTH, kind=3 + number)
        given[f"{name}connector_attention_mask"] = torch.ones(len(pictures), TOKENS, dtype=torch.int64)
    return given


def ltx_2(**guidance):
    scales = {"guider": 5.0, "audio_guider": 4.0}
    guiders = {
        name: partial(diffusers.LTX2Guidance, guidance_scale=scale, **guidance) for name, scale in scales.items()
    }
    return without(zoo_worlds.LTX_2, "connectors") | guiders


BOTH = {"guiders": ("guider", "audio_guider")}
ltx_2_of = partial(modular, "LTX2AutoBlocks", **in_latents | {"num_frames": 3})
ltx_2_of(ltx_2(), sounding_text, zoo_worlds.sound, entry=BOTH)
# By default two more calls leave out attention to other places, and attention to the other modality.
ltx_2_of(
    ltx_2(stg_scale=1.0, modality_scale=3.0, guidance_rescale=0.7, spatio_temporal_guidance_blocks=[1]),
    sounding_text,
    zoo_worlds.sound,
    label="LTX2 (all its guidance)",
    entry=BOTH | {"branches": 4},
)


# Without a guider: Flux is told its scale, and Ideogram 4 asks another network about the picture alone


def spoken(pictures):
    return {"text_features": of_pictures(pictures, TOKENS, WIDTH, kind=1), "text_lengths": [TOKENS] * len(pictures)}


NO_GUIDER: dict[str, Any] = {"guiders": (), "branches": 1}
modular("FluxAutoBlocks", flowing(zoo_joint.flux()), *zoo_joint.PROMPT, entry=NO_GUIDER, **zoo_joint.IN_LATENTS)
modular(
    "Ideogram4AutoBlocks",
    flowing(zoo_images.ideogram) | {"unconditional_transformer": zoo_images.ideogram},
    spoken,
    entry=NO_GUIDER | {"denoisers": ("transformer", "unconditional_transformer")},
    guidance_schedule=[5.0] * STEPS,
    **in_row,
)
