"""Tiny pipelines of videos whose denoiser attends to the text and to the frames at once."""

from functools import partial

import torch
from at_hand import diffusers, transformers
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from zoo import images, of_pictures, register
from zoo_transformers import (
    CHANNELS,
    TOKENS,
    WIDTH,
    build,
    call,
    image,
    image_encoder,
    noise,
    pipeline,
    plain_text,
    text,
    wan_vae,
)


SIZE, FRAMES = 16, 5  # of the videos; of the latents 4 and 2
IN_PIXELS = {"height": SIZE, "width": SIZE, "num_frames": FRAMES}
IN_LATENTS = {"height": 32, "width": 32, "num_frames": FRAMES}  # without an autoencoder eight times smaller
LATENTS = (CHANNELS, 2, 4, 4)

# Pipelines that do not run on a batch of two, with the reason.
ONE_PICTURE_ONLY = {
    "MotifVideoImage2VideoPipeline",  # refuses more than one picture, and does not repeat it for more prompts
}


def video(pictures, kind=50, frames=FRAMES):
    """Frames from 0 to 1, `(len(pictures), frames, 3, SIZE, SIZE)`."""
    return of_pictures(pictures, frames, 3, SIZE, SIZE, kind=kind).sigmoid()


def uneven_text(pictures, **settings):
    """The negative prompt is shorter, and not padded."""
    given = text(pictures, **settings)
    return given | {name: value[:, :-1] for name, value in given.items() if name.startswith("negative_prompt_")}


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler()


# CogVideoX: `[negative, positive]`, frames before channels; the prompts are of one length, without masks


def cogvideox(cls=diffusers.CogVideoXTransformer3DModel, **changes):
    config = {
        "num_attention_heads": 1,
        "attention_head_dim": 16,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "time_embed_dim": 4,
        "text_embed_dim": WIDTH,
        "num_layers": 2,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": FRAMES,
        "max_text_seq_length": TOKENS,
    }
    return cls(**config | changes)


def cogvideox_vae():
    """Makes a video four times smaller and four times shorter."""
    return diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4,) * 3,
        down_block_types=("CogVideoXDownBlock3D",) * 3,
        up_block_types=("CogVideoXUpBlock3D",) * 3,
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
    )


def cogvideox_ddim():
    return diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")


def cogvideox_dpm():
    return diffusers.CogVideoXDPMScheduler(prediction_type="v_prediction")


def faces(_):
    """Of all videos of a batch, because the network does not repeat them for both halves."""
    return {
        "id_cond": of_pictures([0], 6, kind=7),
        "id_vit_hidden": [of_pictures([0], 3, 4, kind=8 + scale) for scale in range(2)],
    }


COGVIDEOX = {"transformer": cogvideox, "scheduler": cogvideox_ddim}
COGVIDEOX_PIXELS = COGVIDEOX | {"vae": cogvideox_vae}
ROTARY = partial(cogvideox, use_rotary_positional_embeddings=True)
COG_LATENTS = (2, CHANNELS, 4, 4)

pipeline("CogVideoXPipeline", COGVIDEOX, plain_text, latents=COG_LATENTS, **IN_LATENTS)
pipeline(
    "CogVideoXPipeline",
    COGVIDEOX | {"transformer": ROTARY, "scheduler": cogvideox_dpm},
    plain_text,
    noise,
    label="CogVideoXPipeline (dynamic guidance)",  # another scale in every step
    use_dynamic_cfg=True,
    latents=COG_LATENTS,
    **IN_LATENTS,
)
pipeline(
    "CogVideoXImageToVideoPipeline",
    COGVIDEOX_PIXELS | {"transformer": partial(ROTARY, in_channels=2 * CHANNELS, patch_size_t=2, ofs_embed_dim=4)},
    plain_text,
    image(SIZE),
    noise,
    latents=COG_LATENTS,
    **IN_PIXELS,
)
pipeline(
    "CogVideoXVideoToVideoPipeline",
    COGVIDEOX_PIXELS,
    plain_text,
    lambda pictures: {"video": video(pictures)},
    noise,
    strength=1.0,
    height=SIZE,
    width=SIZE,
)
pipeline(
    "CogVideoXFunControlPipeline",
    COGVIDEOX_PIXELS | {"transformer": partial(ROTARY, in_channels=2 * CHANNELS)},
    plain_text,
    lambda pictures: {"control_video": video(pictures, kind=7)},
    latents=COG_LATENTS,
    height=SIZE,
    width=SIZE,
)
pipeline(
    "ConsisIDPipeline",
    COGVIDEOX_PIXELS
    | {
        "transformer": partial(
            ROTARY,
            diffusers.ConsisIDTransformer3DModel,
            num_attention_heads=3,
            in_channels=2 * CHANNELS,
            is_train_face=True,
            cross_attn_dim_head=4,
            cross_attn_num_heads=2,
            LFE_id_dim=6,
            LFE_vit_dim=4,
            LFE_depth=2,
            LFE_dim_head=4,
            LFE_num_heads=2,
            LFE_num_id_token=2,
            LFE_num_querie=3,
            LFE_output_dim=32,  # two thirds of the width
            LFE_num_scale=2,
        )
    },
    plain_text,
    image(SIZE),
    faces,
    noise,
    latents=COG_LATENTS,
    **IN_PIXELS,
)


# Mochi: `[negative, positive]`, the padding is masked; time runs from 0

pipeline(
    "MochiPipeline",
    {
        "transformer": partial(
            diffusers.MochiTransformer3DModel,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=8,
            in_channels=CHANNELS,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=TOKENS,
        ),
        "scheduler": partial(diffusers.FlowMatchEulerDiscreteScheduler, invert_sigmas=True),
    },
    text,
    latents=LATENTS,
    height=32,
    width=32,
    num_frames=7,
)


# HunyuanVideo: a call for the prompt, and where it is asked for, a call for the negative prompt

HUNYUAN_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "num_layers": 2,
    "num_refiner_layers": 1,
    "mlp_ratio": 1.0,
    "rope_axes_dim": (2, 2, 2),
    "text_embed_dim": WIDTH,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
}
JOINT_SIZES = HUNYUAN_SIZES | {"num_single_layers": 1, "pooled_projection_dim": WIDTH}


def hunyuan(cls=diffusers.HunyuanVideoTransformer3DModel, **changes):
    return cls(**JOINT_SIZES | changes)


def hunyuan_vae():
    """Makes a video four times smaller and four times shorter."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        block_out_channels=(4,) * 3,
        down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_compression_ratio=4,
        mid_block_add_attention=False,
    )


def pooled(pictures):
    return {
        "pooled_prompt_embeds": of_pictures(pictures, WIDTH, kind=5),
        "negative_pooled_prompt_embeds": of_pictures(pictures, WIDTH, kind=6),
    }


class EightPixels:
    """An image processor, without torchvision."""

    def __call__(self, images, **settings):
        if isinstance(images, Image.Image):
            images = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(images))
        return transformers.BatchFeature({"pixel_values": torch.nn.functional.interpolate(images, size=(8, 8))})

    preprocess = __call__


def framepack(**changes):
    """Told of the frames before, which are few, and of the picture that the video begins with."""
    return hunyuan(
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        has_image_proj=True,
        image_proj_dim=8,
        has_clean_x_embedder=True,
        **changes,
    )


HUNYUAN = {"transformer": hunyuan, "scheduler": flow}
HUNYUAN_PIXELS = HUNYUAN | {"vae": hunyuan_vae}
FRAMEPACK = HUNYUAN_PIXELS | {
    "transformer": framepack,
    "image_encoder": image_encoder,
    "feature_extractor": EightPixels,
}
true_guidance = {"true_cfg_scale": 5.0, "scale": 1.0}
# There are no latents of a video in parts, and so this is decoded.
FRAMEPACK_CALL = true_guidance | {"latent_window_size": 2, "output_type": "pt"} | IN_PIXELS

pipeline("HunyuanVideoPipeline", HUNYUAN, uneven_text, pooled, latents=LATENTS, **true_guidance, **IN_LATENTS)
pipeline(
    "HunyuanVideoPipeline",
    HUNYUAN,
    uneven_text,
    pooled,
    label="HunyuanVideoPipeline (without guidance)",
    branches=1,
    latents=LATENTS,
    **IN_LATENTS,
)
pipeline(
    "HunyuanVideoImageToVideoPipeline",
    HUNYUAN_PIXELS | {"transformer": partial(hunyuan, image_condition_type="token_replace")},
    text,
    pooled,
    image(SIZE),
    latents=LATENTS,
    **true_guidance,
    **IN_PIXELS,
)
pipeline(
    "HunyuanVideoImageToVideoPipeline",
    HUNYUAN_PIXELS
    | {
        "transformer": partial(
            hunyuan, image_condition_type="latent_concat", in_channels=2 * CHANNELS + 1, guidance_embeds=False
        )
    },
    text,
    pooled,
    image(SIZE),
    label="HunyuanVideoImageToVideoPipeline (more channels)",
    latents=LATENTS,
    **true_guidance,
    **IN_PIXELS,
)
pipeline(
    "HunyuanSkyreelsImageToVideoPipeline",
    HUNYUAN_PIXELS | {"transformer": partial(hunyuan, in_channels=2 * CHANNELS)},
    uneven_text,
    pooled,
    image(SIZE),
    noise,
    latents=LATENTS,
    **true_guidance,
    **IN_PIXELS,
)
pipeline("HunyuanVideoFramepackPipeline", FRAMEPACK, text, pooled, image(SIZE), noise, **FRAMEPACK_CALL)
pipeline(
    "HunyuanVideoFramepackPipeline",
    FRAMEPACK,
    text,
    pooled,
    image(SIZE),
    noise,
    label="HunyuanVideoFramepackPipeline (two parts)",
    **FRAMEPACK_CALL | {"num_frames": FRAMES + 1},
)


# With a guider: a call for the prompt, then a call for the negative prompt


def guided(name, components, *inputs, build=build, guider=diffusers.ClassifierFreeGuidance, label=None, **settings):
    """Register a class that has the guidance scale from a component, and not from the call."""
    components = components | {"guider": partial(guider, guidance_scale=9.0)}
    register(label or name, partial(build, name, **components), partial(call_without_scale, inputs=inputs, **settings))


def call_without_scale(pictures, **settings):
    given = call(pictures, **settings)
    del given["guidance_scale"]
    return given


def hunyuan_15_vae():
    """Makes a video four times smaller and four times shorter."""
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=CHANNELS,
        block_out_channels=(8,) * 3,
        layers_per_block=1,
        spatial_compression_ratio=4,
    )


def build_hunyuan_15(name, **components):
    """With an image of fewer tokens: they are all padding where no image is given."""
    pipe = build(name, **components)
    pipe.vision_num_semantic_tokens = 3
    return pipe


def one_image(_):
    """Of all prompts."""
    pixels = VaeImageProcessor.pt_to_numpy(images([0], SIZE, SIZE))
    return {"image": VaeImageProcessor.numpy_to_pil(pixels)[0]}


masks_15 = {"masks": ("prompt_embeds_mask", "negative_prompt_embeds_mask")}
text_15 = partial(uneven_text, **masks_15)
text_15_of_glyphs = partial(text, **masks_15, tokens=TOKENS + 1, suffix="_2", kind=3)
HUNYUAN_15 = {
    "transformer": partial(
        diffusers.HunyuanVideo15Transformer3DModel,
        **HUNYUAN_SIZES | {"in_channels": 2 * CHANNELS + 1},
        text_embed_2_dim=WIDTH,
        image_embed_dim=8,
        target_size=SIZE,
    ),
    "vae": hunyuan_15_vae,
    "scheduler": flow,
}
HUNYUAN_15_FROM_IMAGE = HUNYUAN_15 | {"image_encoder": image_encoder, "feature_extractor": EightPixels}
guided(
    "HunyuanVideo15Pipeline",
    HUNYUAN_15,
    text_15,
    text_15_of_glyphs,
    build=build_hunyuan_15,
    latents=LATENTS,
    **IN_PIXELS,
)
guided(
    "HunyuanVideo15ImageToVideoPipeline",
    HUNYUAN_15_FROM_IMAGE,
    text_15,
    text_15_of_glyphs,
    one_image,
    latents=LATENTS,
    num_frames=FRAMES,
)
guided(
    "HunyuanVideo15ImageToVideoPipeline",
    HUNYUAN_15_FROM_IMAGE | {"transformer": partial(HUNYUAN_15["transformer"], use_meanflow=True)},
    text_15,
    text_15_of_glyphs,
    one_image,
    label="HunyuanVideo15ImageToVideoPipeline (mean flow)",  # the denoiser is told the next timestep too
    latents=LATENTS,
    num_frames=FRAMES,
)


# Motif-Video


def motif(**changes):
    """Some layers also attend to the text alone."""
    config = {
        "in_channels": 2 * CHANNELS + 1,
        "out_channels": CHANNELS,
        "num_attention_heads": 2,
        "attention_head_dim": 6,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_decoder_layers": 1,
        "mlp_ratio": 1.0,
        "text_embed_dim": WIDTH,
        "rope_axes_dim": (2, 2, 2),
        "enable_text_cross_attention_dual": True,
        "enable_text_cross_attention_single": True,
    }
    return diffusers.MotifVideoTransformer3DModel(**config | changes)


class SeeingEncoder(diffusers.ModelMixin):
    """A text encoder that is asked for its eyes alone."""

    def __init__(self):
        super().__init__()
        self.vision_tower = image_encoder()


MOTIF = {"transformer": motif, "vae": wan_vae, "scheduler": flow}
guided("MotifVideoPipeline", MOTIF, text, latents=LATENTS, **IN_PIXELS)
guided(
    "MotifVideoPipeline",
    MOTIF,
    text,
    # What it adds in a step is in part what it added in the steps before.
    guider=partial(diffusers.AdaptiveProjectedGuidance, adaptive_projected_guidance_momentum=0.5),
    label="MotifVideoPipeline (projected guidance)",
    latents=LATENTS,
    **IN_PIXELS,
)
guided(
    "MotifVideoImage2VideoPipeline",
    MOTIF
    | {
        "transformer": partial(motif, image_embed_dim=8),
        "text_encoder": SeeingEncoder,
        "feature_extractor": EightPixels,
    },
    text,
    image(SIZE),
    noise,
    prompt=None,
    latents=LATENTS,
    **IN_PIXELS,
)


# EasyAnimate: `[negative, positive]`, and the masks of the prompts are dropped


def easyanimate(in_channels=CHANNELS):
    return diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=1,
        attention_head_dim=16,
        in_channels=in_channels,
        out_channels=CHANNELS,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=4,
        text_embed_dim=WIDTH,
        resize_inpaint_mask_directly=False,  # it needs a setting that the autoencoder does not have
        add_noise_in_inpaint_model=False,  # not from a list of generators
    )


def easyanimate_vae():
    """Makes a video four times smaller and two times shorter."""
    return diffusers.AutoencoderKLMagvit(
        latent_channels=CHANNELS,
        block_out_channels=(4,) * 3,
        down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 2,
        up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
    )


def channels_first(frames):
    return frames.transpose(1, 2)


def controls(pictures):
    return {
        "control_video": channels_first(video(pictures, kind=7)),
        "ref_image": channels_first(video(pictures, kind=8, frames=1)),
    }


def half_video(pictures):
    """What is new in the video: the right half."""
    mask = torch.zeros(len(pictures), 1, FRAMES, SIZE, SIZE)
    mask[..., SIZE // 2 :] = 1.0
    return {"video": channels_first(video(pictures)), "mask_video": mask}


EASYANIMATE = {"transformer": easyanimate, "vae": easyanimate_vae, "scheduler": flow}
EASYANIMATE_PIXELS = EASYANIMATE | {"transformer": partial(easyanimate, 3 * CHANNELS)}
EASYANIMATE_CALL = {"latents": (CHANNELS, 3, 4, 4), **IN_PIXELS}


def build_easyanimate_control(name, **components):
    """Without an argument that the pipeline gives its own method, which does not take it."""
    pipe = build(name, **components)
    encode_prompt = pipe.encode_prompt
    pipe.encode_prompt = lambda *, text_encoder_index, **given: encode_prompt(**given)
    return pipe


pipeline("EasyAnimatePipeline", EASYANIMATE, text, **EASYANIMATE_CALL)
register(
    "EasyAnimateControlPipeline",
    partial(build_easyanimate_control, "EasyAnimateControlPipeline", **EASYANIMATE_PIXELS),
    partial(call, inputs=(text, controls), guidance_rescale=0.5, **EASYANIMATE_CALL),
)
# It fails when it is given latents and has a scheduler of flow.
pipeline("EasyAnimateInpaintPipeline", EASYANIMATE_PIXELS, text, half_video, noise, **IN_PIXELS)
