"""Tiny pipelines whose transformer attends to text and picture at once: Stable Diffusion 3, AuraFlow, Chroma, Flux."""

import warnings
from functools import partial

import PIL.Image
import torch
from at_hand import diffusers, transformers
from zoo import images, of_pictures, register
from zoo_transformers import HEADS, TOKENS, WIDTH, MeanEncoder, build, call, noise, pipeline


CHANNELS = 2  # of the latents; four of their pixels make a token
PACKED = (4, 4 * CHANNELS)  # the latents in a row
IN_LATENTS = {"latents": PACKED, "height": 32, "width": 32}  # without an autoencoder, by eight
SIZE = 8  # of a picture in pixels; the autoencoder halves them
IN_PIXELS = {"height": SIZE, "width": SIZE}
FROM_PICTURE = IN_PIXELS | {"strength": 1.0, "sigmas": [0.8, 0.6, 0.4, 0.2]}  # from where the picture is still seen


def prompt(pictures):
    return {"prompt_embeds": of_pictures(pictures, TOKENS, WIDTH, kind=1)}


def negative(pictures, tokens=TOKENS):
    return {"negative_prompt_embeds": of_pictures(pictures, tokens, WIDTH, kind=2)}


def pooled(pictures):
    return {"pooled_prompt_embeds": of_pictures(pictures, WIDTH, kind=3)}


def negative_pooled(pictures):
    return {"negative_pooled_prompt_embeds": of_pictures(pictures, WIDTH, kind=4)}


TEXTS = (prompt, negative, pooled, negative_pooled)
PROMPT = (prompt, pooled)
shorter = partial(negative, tokens=TOKENS - 2)


def padding(pictures, tokens=TOKENS):
    """Which tokens are none: the prompt's last one, and all but one of the negative prompt's."""
    given = {}
    for name, length, words in (("", TOKENS, TOKENS - 1), ("negative_", tokens, 1)):
        given[f"{name}prompt_attention_mask"] = (torch.arange(length) < words).repeat(len(pictures), 1)
    return given


def picture(pictures):
    return {"image": images(pictures, SIZE, SIZE)}


def control(pictures):
    return {"control_image": images(pictures, SIZE, SIZE, kind=7)}


def mask_of(name):
    """What is new in the picture: the right half."""

    def mask(pictures):
        right = torch.zeros(len(pictures), 1, SIZE, SIZE)
        right[..., SIZE // 2 :] = 1.0
        return {name: right}

    return mask


mask = mask_of("mask_image")


def vae(channels=CHANNELS):
    """Makes a picture two times smaller."""
    return MeanEncoder(
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        shift_factor=0.1,
    )


def loud(network):
    """Twice the weights: with no biases beside them, what is drawn is too small for the text to show."""
    for parameter in network.parameters():
        parameter.data *= 2.0
    return network


flow = diffusers.FlowMatchEulerDiscreteScheduler
shifted_flow = partial(flow, use_dynamic_shifting=True)


# Stable Diffusion 3: `[negative, positive]`

SD3_SIZES = {
    **HEADS,
    "sample_size": 4,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 8,
    "pooled_projection_dim": WIDTH,
    "pos_embed_max_size": 4,
}


def sd3(channels=4, **changes):
    sizes = SD3_SIZES | {"in_channels": channels, "out_channels": channels}
    return {
        "transformer": partial(diffusers.SD3Transformer2DModel, **sizes | changes),
        "vae": partial(vae, channels),
        "scheduler": flow,
    }


def sd3_controlnet(**changes):
    return partial(diffusers.SD3ControlNetModel, **SD3_SIZES | {"num_layers": 1} | changes)


in_sd3 = {"latents": (4, 4, 4), **IN_PIXELS}
pipeline("StableDiffusion3Pipeline", sd3(), *TEXTS, **in_sd3)
pipeline(
    "StableDiffusion3Pipeline",
    sd3(dual_attention_layers=(0, 1), qk_norm="rms_norm"),
    *TEXTS,
    label="StableDiffusion3Pipeline (skipped layers)",
    branches=3,  # two in one batch, and then the prompt without a layer
    skip_guidance_layers=[1],
    skip_layer_guidance_start=-1.0,  # before the first step, and the end after the last
    skip_layer_guidance_stop=1.0,
    **in_sd3,
)
pipeline(
    "StableDiffusion3Pipeline",
    sd3(),
    *PROMPT,
    label="StableDiffusion3Pipeline (without guidance)",
    branches=1,
    scale=1.0,
    **in_sd3,
)
pipeline("StableDiffusion3Img2ImgPipeline", sd3(), *TEXTS, picture, noise, **FROM_PICTURE)
# This class takes a network of sixteen channels, or of thirty-three, among them the mask and the masked picture.
pipeline("StableDiffusion3InpaintPipeline", sd3(16), *TEXTS, picture, mask, noise, **FROM_PICTURE)
pipeline(
    "StableDiffusion3InpaintPipeline",
    sd3(16, in_channels=33),
    *TEXTS,
    picture,
    mask,
    noise,
    label="StableDiffusion3InpaintPipeline (masked picture)",
    **FROM_PICTURE,
)
pipeline("StableDiffusion3ControlNetPipeline", sd3() | {"controlnet": sd3_controlnet()}, *TEXTS, control, **in_sd3)
pipeline(
    "StableDiffusion3ControlNetInpaintingPipeline",
    sd3() | {"controlnet": sd3_controlnet(extra_conditioning_channels=1)},
    *TEXTS,
    control,
    mask_of("control_mask"),
    **in_sd3,
)
pipeline("StableDiffusion3PAGPipeline", sd3(), *TEXTS, branches=3, pag_scale=2.0, **in_sd3)
pipeline(
    "StableDiffusion3PAGImg2ImgPipeline", sd3(), *TEXTS, picture, noise, branches=3, pag_scale=2.0, **FROM_PICTURE
)


# AuraFlow: `[negative, positive]`, and masks that it asks for and does not use


def aura():
    return loud(
        diffusers.AuraFlowTransformer2DModel(
            **HEADS,
            sample_size=4,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=WIDTH,
            caption_projection_dim=8,
            pos_embed_max_size=16,
        )
    )


pipeline(
    "AuraFlowPipeline",
    {"transformer": aura, "scheduler": flow},
    prompt,
    negative,
    padding,
    latents=(4, 4, 4),
    height=32,
    width=32,
)


# Chroma: a call for the prompt and a call for the negative prompt, each with a mask

JOINT_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "axes_dims_rope": (2, 2, 2),
    "in_channels": 4 * CHANNELS,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": WIDTH,
}


def quiet(cls, **sizes):
    """For a network that takes its rotary embedding from where diffusers has it no longer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return cls(**sizes)


def chroma():
    network = quiet(
        diffusers.ChromaTransformer2DModel,
        **JOINT_SIZES,
        approximator_num_channels=8,
        approximator_hidden_dim=8,
        approximator_layers=1,
    )
    network.register_to_config(guidance_embeds=False)  # checkpoints say so, and one class asks
    return network


CHROMA = {"transformer": chroma, "vae": vae, "scheduler": flow}
uneven_chroma = (prompt, shorter, partial(padding, tokens=TOKENS - 2))
pipeline("ChromaPipeline", CHROMA, *uneven_chroma, latents=PACKED, **IN_PIXELS)
pipeline("ChromaImg2ImgPipeline", CHROMA, *uneven_chroma, picture, noise, **FROM_PICTURE)
pipeline("ChromaInpaintPipeline", CHROMA, prompt, negative, padding, picture, mask, noise, **FROM_PICTURE)


# Flux: a call, and on request a second one for the negative prompt


FLUX_SIZES = JOINT_SIZES | {"pooled_projection_dim": WIDTH, "guidance_embeds": True}


def flux(**changes):
    return partial(diffusers.FluxTransformer2DModel, **FLUX_SIZES | changes)


FLUX = {"transformer": flux(), "vae": vae, "scheduler": shifted_flow}
FLUX_CONTROLNET = FLUX | {"controlnet": partial(quiet, diffusers.FluxControlNetModel, **FLUX_SIZES)}
# What is known of the picture stands beside the latents, in a token's channels.
FLUX_CONTROL = FLUX | {"transformer": flux(in_channels=8 * CHANNELS, out_channels=4 * CHANNELS)}
FLUX_FILL = FLUX | {"transformer": flux(in_channels=8 * CHANNELS + 16, out_channels=4 * CHANNELS)}

guided = partial(pipeline, true_cfg_scale=5.0)
distilled = partial(pipeline, branches=1)
in_tokens = {"latents": PACKED, **IN_PIXELS}
kontext = {"max_area": SIZE * SIZE, "_auto_resize": False}

guided("FluxPipeline", {"transformer": flux(), "scheduler": shifted_flow}, *TEXTS, **IN_LATENTS)
distilled(
    "FluxPipeline",
    {"transformer": flux(), "scheduler": shifted_flow},
    *PROMPT,
    label="FluxPipeline (without guidance)",
    **IN_LATENTS,
)
guided("FluxImg2ImgPipeline", FLUX, *TEXTS, picture, noise, **FROM_PICTURE)
guided("FluxInpaintPipeline", FLUX, *TEXTS, picture, mask, noise, **FROM_PICTURE)
guided("FluxControlNetPipeline", FLUX_CONTROLNET, *TEXTS, control, noise, **in_tokens)
distilled("FluxControlNetImg2ImgPipeline", FLUX_CONTROLNET, *PROMPT, picture, control, noise, **FROM_PICTURE)
distilled("FluxControlNetInpaintPipeline", FLUX_CONTROLNET, *PROMPT, picture, mask, control, noise, **FROM_PICTURE)
guided("FluxKontextPipeline", FLUX, *TEXTS, picture, **in_tokens, **kontext)
guided("FluxKontextInpaintPipeline", FLUX, *TEXTS, picture, mask, noise, **FROM_PICTURE, **kontext)
distilled("FluxFillPipeline", FLUX_FILL, *PROMPT, picture, mask, noise, **FROM_PICTURE)
distilled("FluxControlPipeline", FLUX_CONTROL, *PROMPT, control, noise, **in_tokens)
distilled("FluxControlImg2ImgPipeline", FLUX_CONTROL, *PROMPT, picture, control, noise, **FROM_PICTURE)
distilled("FluxControlInpaintPipeline", FLUX_CONTROL, *PROMPT, picture, mask, control, noise, **FROM_PICTURE)


# VisualCloze has to be given words and PIL's pictures: a row as an example, and a row that lacks its last one


class Letters:
    """A tokenizer: a letter is a token, and a text's last ones are kept, for the first are always the same."""

    model_max_length = TOKENS
    added_tokens_encoder = frozenset()
    tokenize = list

    def __call__(self, texts, **settings):
        ids = [[ord(letter) % 32 for letter in one.lower()[1 - TOKENS :].ljust(TOKENS - 1)] + [32] for one in texts]
        return transformers.BatchEncoding({"input_ids": torch.tensor(ids)})


def clip():
    config = transformers.CLIPTextConfig(
        vocab_size=33,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=0,
        eos_token_id=32,
    )
    return transformers.CLIPTextModel(config)


def t5():
    config = transformers.T5Config(vocab_size=33, d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5EncoderModel(config)


def build_cloze(name):
    pipe = build(
        name,
        **FLUX_FILL,
        text_encoder=clip,
        text_encoder_2=t5,
        tokenizer=Letters,
        tokenizer_2=Letters,
        resolution=SIZE,
    )
    for part in ("generation_pipe", "upsampling_pipe"):
        if hasattr(pipe, part):
            getattr(pipe, part).set_progress_bar_config(disable=True)
    return pipe


def pil(pictures, size=SIZE, kind=50):
    tensors = images(pictures, size, size, kind=kind).mul(255).byte().permute(0, 2, 3, 1)
    return [PIL.Image.fromarray(tensor.numpy()) for tensor in tensors]


def words(pictures):
    example, answer, query = (pil(pictures, kind=kind) for kind in (50, 51, 52))
    return {
        "task_prompt": ["draw"] * len(pictures),
        "content_prompt": [f"{chr(ord('a') + number)} cat" for number in pictures],
        "image": [[[a, b], [c, None]] for a, b, c in zip(example, answer, query, strict=True)],
        "max_sequence_length": TOKENS,
    }


for name, size in (
    ("VisualClozeGenerationPipeline", {}),
    ("VisualClozePipeline", {"upsampling_height": SIZE, "upsampling_width": SIZE}),  # two loops
):
    register(
        name,
        partial(build_cloze, name),
        partial(call, inputs=(words, noise), sigmas=FROM_PICTURE["sigmas"], **size),
        branches=1,
    )


# Flux 2: as Flux, with more axes, and pictures behind the latents in the row


def flux_2(guidance_embeds=False):
    return loud(
        diffusers.Flux2Transformer2DModel(
            **JOINT_SIZES | {"attention_head_dim": 8, "axes_dims_rope": (2, 2, 2, 2)},
            timestep_guidance_channels=8,
            guidance_embeds=guidance_embeds,
        )
    )


def vae_2():
    """Makes a picture eight times smaller; the least that is taken is of 64 pixels."""
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        layers_per_block=1,
        latent_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def shared_picture(_):
    """One for all prompts: these pipelines take no batch of pictures."""
    return {"image": pil([0], 64)}


def picture_32(pictures):
    return {"image": images(pictures, 32, 32)}


def mask_32(pictures):
    right = torch.zeros(len(pictures), 1, 32, 32)
    right[..., 16:] = 1.0
    return {"mask_image": right}


KLEIN = {"transformer": flux_2, "vae": vae_2, "scheduler": shifted_flow}
IN_SQUARES = {"latents": (4 * CHANNELS, 2, 2), "height": 32, "width": 32}  # four pixels are one, still in place

distilled(
    "Flux2Pipeline",
    {"transformer": partial(flux_2, guidance_embeds=True), "vae": vae_2, "scheduler": shifted_flow},
    prompt,
    shared_picture,
    **IN_SQUARES,
)
pipeline("Flux2KleinPipeline", KLEIN, prompt, shorter, **IN_SQUARES)
pipeline(
    "Flux2KleinPipeline",
    KLEIN,
    prompt,
    shorter,
    shared_picture,
    label="Flux2KleinPipeline (from a picture)",
    **IN_SQUARES,
)
distilled(
    "Flux2KleinPipeline",
    KLEIN,
    prompt,
    label="Flux2KleinPipeline (without guidance)",
    scale=1.0,
    **IN_SQUARES,
)
pipeline(
    "Flux2KleinInpaintPipeline",
    KLEIN,
    prompt,
    shorter,
    picture_32,
    mask_32,
    noise,
    strength=1.0,
    sigmas=FROM_PICTURE["sigmas"],
)


def call_kv(pictures):
    """The class knows no guidance scale."""
    given = call(pictures, inputs=(prompt, shared_picture), **IN_SQUARES)
    del given["guidance_scale"]
    return given


register("Flux2KleinKVPipeline", partial(build, "Flux2KleinKVPipeline", **KLEIN), call_kv, branches=1)
