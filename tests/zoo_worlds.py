"""Tiny pipelines of the newer families of videos and of worlds: what they are given besides a text differs most."""

import warnings
from functools import partial
from importlib import import_module
from string import ascii_lowercase
from types import SimpleNamespace

import PIL.Image
import torch
from at_hand import diffusers
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import interpolate
from transformers import T5Config, T5EncoderModel
from zoo import STEPS, generators, images, of_pictures, register
from zoo_motion import LETTERS, tokenizer
from zoo_transformers import (
    CHANNELS,
    FROM_IMAGE_SIZES,
    LTX,
    SANA_SIZES,
    WAN_FROM_IMAGE,
    WIDTH,
    Guardrail,
    build,
    call,
    cosmos,
    dpm_flow,
    image,
    in_pixels,
    kandinsky_5,
    long_text,
    ltx_vae,
    mean_encoder,
    noise,
    pipeline,
    plain_text,
    shared_image,
    text,
    unipc,
    video,
    wan,
    wan_vae,
)


# Pipelines that do not run on a batch of two, or not as on each alone, with the reason.
ONE_PICTURE_ONLY = {
    "Cosmos3OmniPipeline",  # makes one video, of the first prompt
    "SanaWMPipeline",  # makes one video
    "Cosmos2_5_PredictBasePipeline (from a video)",  # refuses more than one video
    "Kandinsky5I2VPipeline",  # scales the first frames as all pictures' other frames
    "LTX2DFRTemporalRefinePipeline",  # draws the whole batch's noise from one seed
    "LTXI2VLongMultiPromptPipeline",  # makes one video, whatever it is given
    "HeliosPyramidPipeline",  # draws a stage's noise for the whole batch from the first generator
}


def two_lengths(pictures):
    """For a call for each text: the negative prompt is the longer."""
    return {
        "prompt_embeds": of_pictures(pictures, 4, WIDTH, kind=1),
        "negative_prompt_embeds": of_pictures(pictures, 6, WIDTH, kind=2),
    }


def warn_of_flex_attention():
    """It warns once that it is slow where it is not compiled: here, where nobody listens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        flex_attention(*torch.zeros(3, 1, 1, 16, 16))


# Wan's relatives


def frames(number, size, kind):
    """PIL's pictures, which some pipelines insist on: the same for all prompts."""
    pixels = images(range(number), size, size, kind=kind).permute(0, 2, 3, 1).mul(255).byte().numpy()
    return [PIL.Image.fromarray(frame) for frame in pixels]


def poses_and_faces(_, number=5):
    return {"pose_video": frames(number, 16, kind=7), "face_video": frames(number, 16, kind=8)}


def animated():
    """A wan that looks at faces of 16 pixels after every second block."""
    return wan(
        diffusers.WanAnimateTransformer3DModel,
        **FROM_IMAGE_SIZES,
        latent_channels=CHANNELS,
        motion_encoder_channel_sizes={"4": 4, "8": 4, "16": 4},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=8,
        face_encoder_hidden_dim=8,
        face_encoder_num_heads=2,
        inject_face_latents_blocks=2,
    )


WAN_ANIMATE = WAN_FROM_IMAGE | {"transformer": animated}
animate = partial(
    pipeline,
    "WanAnimatePipeline",
    WAN_ANIMATE,
    long_text,
    shared_image,
    noise,
    latents=(CHANNELS, 3, 4, 4),  # the first frame is the reference picture's
    height=16,
    width=16,
    segment_frame_length=5,
)
animate(poses_and_faces)
animate(poses_and_faces, label="WanAnimatePipeline (without guidance)", branches=1, scale=1.0)
# With its own loop over the timesteps for the second segment, which begins where the first one ends.
animate(partial(poses_and_faces, number=9), label="WanAnimatePipeline (two segments)")

CHRONO = WAN_FROM_IMAGE | {"transformer": partial(wan, diffusers.ChronoEditTransformer3DModel, **FROM_IMAGE_SIZES)}
pipeline("ChronoEditPipeline", CHRONO, long_text, shared_image, **in_pixels)
pipeline(
    "ChronoEditPipeline",
    CHRONO,
    long_text,
    shared_image,
    label="ChronoEditPipeline (fewer frames from the third step on)",
    enable_temporal_reasoning=True,
    num_temporal_reasoning_steps=2,
    **in_pixels | {"latents": (CHANNELS, 3, 4, 4), "num_frames": 9},
)

LUCY = {"transformer": partial(wan, in_channels=2 * CHANNELS), "vae": wan_vae, "scheduler": unipc}
lucy = partial(pipeline, "LucyEditPipeline", **in_pixels)
lucy(LUCY, two_lengths, video)
lucy(LUCY | {"expand_timesteps": True}, two_lengths, video, label="LucyEditPipeline (a time for each token)")
lucy(
    LUCY | {"transformer_2": partial(wan, in_channels=2 * CHANNELS), "boundary_ratio": 0.8},
    two_lengths,
    video,
    label="LucyEditPipeline (two denoisers)",
    guidance_scale_2=3.0,
)


def large_shared_image(_):
    return image(32)([0])


# Sana: a first frame, at which the time is always zero

pipeline(
    "SanaImageToVideoPipeline",
    {
        "transformer": partial(
            diffusers.SanaVideoTransformer3DModel,
            **SANA_SIZES | {"attention_head_dim": 6, "cross_attention_head_dim": 6, "cross_attention_dim": 12},
            sample_size=4,
        ),
        "vae": wan_vae,
        "scheduler": dpm_flow,
    },
    text,
    large_shared_image,
    latents=(CHANNELS, 2, 8, 8),
    height=32,
    width=32,
    frames=5,
    use_resolution_binning=False,
)


# Kandinsky 5 from a picture: noise beside the picture's latents; latents given would be taken for both


def kandinsky_5_text(pictures):
    """The negative prompt is the longer."""
    given = {}
    for number, (name, tokens) in enumerate((("prompt", 4), ("negative_prompt", 6))):
        given[f"{name}_embeds_qwen"] = of_pictures(pictures, tokens, WIDTH, kind=1 + number)
        given[f"{name}_embeds_clip"] = of_pictures(pictures, WIDTH, kind=3 + number)
        given[f"{name}_cu_seqlens"] = tokens * torch.arange(len(pictures) + 1)
    return given


def hunyuan_video_vae():
    """Makes a video eight times smaller and four times shorter."""
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        block_out_channels=(4,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
    )


KANDINSKY_5 = {
    "transformer": partial(kandinsky_5, visual_cond=True),
    "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
}


def small_kandinsky_5():
    pipe = build("Kandinsky5I2IPipeline", **KANDINSKY_5, vae=mean_encoder)
    pipe.resolutions = [(32, 32)]  # any other is rounded to one of these
    return pipe


register(
    "Kandinsky5I2IPipeline",
    small_kandinsky_5,
    partial(call, inputs=(kandinsky_5_text, image(32), noise), height=32, width=32),
)
pipeline(
    "Kandinsky5I2VPipeline",
    KANDINSKY_5 | {"vae": hunyuan_video_vae},
    kandinsky_5_text,
    image(32),
    noise,
    height=32,
    width=32,
    num_frames=21,  # the first four frames of latents are scaled as those behind them
)


# Helios: chunk after chunk, each given what came before, in three resolutions


def helios():
    return diffusers.HeliosTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=6,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=WIDTH,
        freq_dim=8,
        ffn_dim=16,
        num_layers=2,
        rope_dim=(2, 2, 2),
    )


HELIOS = {"transformer": helios, "vae": wan_vae}
# At its own gamma of a third the covariance of a block's noise has no inverse: whether a machine factors it is chance.
helios_scheduler = partial(diffusers.HeliosScheduler, gamma=0.3)
TWO_FRAMES_A_CHUNK = {"num_latent_frames_per_chunk": 2, "history_sizes": [4, 2, 1], "num_frames": 5}


def call_pyramid(pictures):
    """It is told its steps of each resolution: four in all."""
    given = call(pictures, (two_lengths, noise), height=64, width=64, **TWO_FRAMES_A_CHUNK)
    del given["num_inference_steps"]
    return given | {"pyramid_num_inference_steps_list": [1, 1, STEPS - 2]}


helios_of = partial(pipeline, "HeliosPipeline", HELIOS | {"scheduler": partial(diffusers.HeliosScheduler, stages=1)})
helios_of(two_lengths, noise, height=16, width=16, **TWO_FRAMES_A_CHUNK)
helios_of(
    two_lengths,
    noise,
    label="HeliosPipeline (two chunks)",
    height=16,
    width=16,
    **TWO_FRAMES_A_CHUNK | {"num_frames": 10},
)
for label, zero_star in (("HeliosPyramidPipeline", False), ("HeliosPyramidPipeline (CFG-Zero*)", True)):
    register(
        label,
        partial(
            build,
            "HeliosPyramidPipeline",
            **HELIOS,
            scheduler=helios_scheduler,
            is_cfg_zero_star=zero_star,
        ),
        call_pyramid,
    )


# AnyFlow: told at which time a step begins and at which it ends

ANYFLOW_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 6,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": WIDTH,
    "freq_dim": 8,
    "ffn_dim": 16,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}
anyflow_scheduler = diffusers.FlowMapEulerDiscreteScheduler
anyflow = partial(
    pipeline,
    "AnyFlowPipeline",
    {"transformer": partial(diffusers.AnyFlowTransformer3DModel, **ANYFLOW_SIZES), "scheduler": anyflow_scheduler},
    latents=(CHANNELS, 2, 4, 4),
    height=32,
    width=32,
    num_frames=5,
)
anyflow(plain_text)
# Given a negative prompt, it runs it whatever the scale.
anyflow(
    lambda pictures: {"prompt_embeds": plain_text(pictures)["prompt_embeds"]},
    label="AnyFlowPipeline (without guidance)",
    branches=1,
    scale=1.0,
)


def anyflow_far():
    """In two chunks of a frame of latents each."""
    warn_of_flex_attention()
    return diffusers.AnyFlowFARTransformer3DModel(**ANYFLOW_SIZES, chunk_partition=(1, 1), full_chunk_limit=2)


pipeline(
    "AnyFlowFARPipeline",
    {"transformer": anyflow_far, "scheduler": anyflow_scheduler},
    plain_text,
    latents=(CHANNELS, 2, 4, 4),
    height=32,
    width=32,
    num_frames=5,
)


# LTX-2: videos with their sound, denoised by one network, which returns a pair of them


def ltx_2(**changes):
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=4,
        cross_attention_dim=8,
        vae_scale_factors=(2, 8, 8),
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=WIDTH,
        **changes,
    )


def ltx_2_vae():
    """Makes a video eight times smaller and half as long."""
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        down_block_types=("LTX2VideoDownBlock3D",),
        layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False,) * 2,
        downsample_type=("spatiotemporal",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )


def ltx_2_audio_vae():
    """Its latents have two channels of two mel bins each."""
    return diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, mel_bins=8
    )


def ltx_2_connectors():
    """Where a text is padded it is given what was learned instead."""
    return diffusers.pipelines.ltx2.LTX2TextConnectors(
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=4,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=2,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=4,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=2,
    )


def padded_in_front(pictures):
    """As Gemma's tokenizer does."""
    given = text(pictures, tokens=6)
    return {name: value.flip(1) if "mask" in name else value for name, value in given.items()}


def sound(pictures):
    return {"audio_latents": of_pictures(pictures, 2, 3, 2, kind=5)}


LTX_2 = {
    "transformer": ltx_2,
    "vae": ltx_2_vae,
    "audio_vae": ltx_2_audio_vae,
    "connectors": ltx_2_connectors,
    "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
}
# By default two more calls leave out attention to other places, and attention to the other modality.
ONE_GUIDANCE = {"stg_scale": 0.0, "audio_stg_scale": 0.0, "modality_scale": 1.0, "audio_modality_scale": 1.0}
ltx_2_of = partial(pipeline, height=32, width=32, num_frames=3, **ONE_GUIDANCE)


def first_frame(_):
    """The same for all prompts."""
    return {"conditions": diffusers.pipelines.ltx2.LTX2VideoCondition(frames(1, 32, kind=7)[0], crf=0)}


def first_and_last_frame(_):
    first, last = frames(2, 32, kind=7)
    return {
        "conditions": [
            diffusers.pipelines.ltx2.LTX2VideoCondition(first, crf=0),
            diffusers.pipelines.ltx2.LTX2VideoCondition(last, 1, 0.8, crf=0),
        ]
    }


def in_context(_):
    return {"reference_conditions": diffusers.pipelines.ltx2.LTX2ReferenceCondition(frames(3, 32, kind=7))}


def in_context_of_range(_):
    return {"reference_conditions": diffusers.pipelines.ltx2.LTX2HDRReferenceCondition(frames(3, 32, kind=7))}


ltx_2_of("LTX2Pipeline", LTX_2, padded_in_front, sound, latents=(CHANNELS, 2, 4, 4))
ltx_2_of(
    "LTX2Pipeline",
    LTX_2,
    padded_in_front,
    sound,
    label="LTX2Pipeline (all its guidance)",
    branches=4,
    latents=(CHANNELS, 2, 4, 4),
    spatio_temporal_guidance_blocks=[1],
    **dict.fromkeys(ONE_GUIDANCE, 2.0),
)
ltx_2_of("LTX2ImageToVideoPipeline", LTX_2, padded_in_front, sound, image(32), noise, image_crf=0)
ltx_2_of("LTX2ConditionPipeline", LTX_2, padded_in_front, sound, first_frame, noise)
ltx_2_of(
    "LTX2ConditionPipeline",
    LTX_2,
    padded_in_front,
    sound,
    first_and_last_frame,
    noise,
    label="LTX2ConditionPipeline (a last frame)",
)
ltx_2_of("LTX2InContextPipeline", LTX_2, padded_in_front, sound, in_context, noise)
ltx_2_of(
    "LTX2InContextPipeline",
    LTX_2,
    padded_in_front,
    sound,
    in_context,
    noise,
    label="LTX2InContextPipeline (with a mask of self-attention)",
    conditioning_attention_strength=0.5,
)
hdr = partial(
    pipeline, "LTX2HDRPipeline", LTX_2, padded_in_front, in_context_of_range, noise, height=32, width=32, num_frames=3
)
hdr()
hdr(label="LTX2HDRPipeline (without guidance)", branches=1, scale=1.0)


def distilled(pictures, inputs, sigmas, **settings):
    """Their steps are told by their sigmas."""
    given = {"sigmas": sigmas, "output_type": "latent", "return_dict": False}
    for inputs_of in inputs:
        given |= inputs_of(pictures)
    return given | settings


def prompt_alone(pictures):
    return {name: value for name, value in padded_in_front(pictures).items() if "negative" not in name}


def made_before(pictures):
    """What `LTX2DFRPipeline` makes: latents of seven frames, the last one again as a key frame, and the sound."""
    return {
        "latents": of_pictures(pictures, CHANNELS, 4, 4, 4),
        "keyframes_latents": of_pictures(pictures, CHANNELS, 1, 4, 4, kind=6),
        "audio_latents": of_pictures(pictures, 2, 7, 2, kind=5),
        "keyframe_positions": [6],
    }


def double_frames():
    return diffusers.pipelines.ltx2.LTX2LatentUpsamplerModel(
        in_channels=CHANNELS, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    )


LTX_2_KEYFRAMES = LTX_2 | {"transformer": partial(ltx_2, use_keyframes_abs_pos_embedding=True)}
SEVEN_FRAMES = {"height": 32, "width": 32, "num_frames": 7}
register(
    "LTX2DFRPipeline",
    partial(build, "LTX2DFRPipeline", **LTX_2_KEYFRAMES),
    partial(distilled, inputs=(prompt_alone, first_frame, noise), sigmas=[1.0, 0.9, 0.7, 0.4], **SEVEN_FRAMES),
    branches=1,
)
register(
    "LTX2DFRTemporalRefinePipeline",
    partial(
        build,
        "LTX2DFRTemporalRefinePipeline",
        **LTX_2_KEYFRAMES
        | {
            "scheduler": partial(diffusers.LTXEulerAncestralRFScheduler, eta=0.5),
            "temporal_latent_upsampler": double_frames,
        },
    ),
    partial(distilled, inputs=(prompt_alone, made_before, noise), sigmas=[0.9, 0.7, 0.5, 0.3], **SEVEN_FRAMES),
    branches=1,
)


# LTX-Video in windows of time, each with a prompt of its own


def t5():
    config = T5Config(vocab_size=len(LETTERS), d_model=WIDTH, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return T5EncoderModel(config)


def call_windows(pictures, **settings):
    """It takes no embeddings, and draws its noise from a seed."""
    letter = ascii_lowercase[pictures[0]]
    return {
        "prompt": f"{letter} cat|{letter} dog",
        "negative_prompt": f"{letter} bad",
        "seed": pictures[0],
        "num_inference_steps": STEPS,
        "sigmas": [1.0, 0.75, 0.5, 0.25, 0.0],  # told their number alone, it leaves out the last
        "guidance_scale": 5.0,
        "height": 32,
        "width": 32,
        "max_sequence_length": 6,
        "output_type": "latent",
        "return_dict": False,
    } | settings


for label, settings in (
    ("LTXI2VLongMultiPromptPipeline", {"num_frames": 3}),
    (
        "LTXI2VLongMultiPromptPipeline (two windows)",
        {"num_frames": 9, "temporal_tile_size": 6, "temporal_overlap": 2},
    ),
):
    register(
        label,
        partial(
            build,
            "LTXI2VLongMultiPromptPipeline",
            **LTX
            | {
                "vae": ltx_vae,
                "text_encoder": t5,
                "tokenizer": tokenizer,
                "scheduler": diffusers.LTXEulerAncestralRFScheduler,
            },
        ),
        partial(call_windows, **settings),
    )


# Cosmos 2.5: a call for each text, at the scheduler's sigma instead of its timestep

COSMOS_2_5 = {
    "transformer": partial(cosmos, frames_given=True),
    "vae": wan_vae,
    "scheduler": unipc,
    "safety_checker": Guardrail,
}


def one_video(_):
    return {"video": images(range(5), 16, 16).transpose(0, 1)[None]}


pipeline("Cosmos2_5_PredictBasePipeline", COSMOS_2_5, two_lengths, **in_pixels)
pipeline(
    "Cosmos2_5_PredictBasePipeline",
    COSMOS_2_5,
    two_lengths,
    one_video,
    label="Cosmos2_5_PredictBasePipeline (from a video)",
    num_latent_conditional_frames=1,
    **in_pixels,
)


class Nearest:
    """What a ControlNet of Cosmos resizes a mask of zeros with, which is torchvision's where that is installed."""

    InterpolationMode = SimpleNamespace(NEAREST="nearest")
    functional = SimpleNamespace(resize=lambda mask, size, interpolation: interpolate(mask, size, mode=interpolation))


def cosmos_controlnet():
    controlnet_cosmos = import_module("diffusers.models.controlnets.controlnet_cosmos")
    if not hasattr(controlnet_cosmos, "transforms"):
        controlnet_cosmos.transforms = Nearest
    return diffusers.CosmosControlNetModel(
        n_controlnet_blocks=1,
        in_channels=CHANNELS + 2,
        latent_channels=CHANNELS + 2,
        model_channels=24,
        num_attention_heads=2,
        attention_head_dim=12,
        mlp_ratio=1.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(8, 8, 8),
    )


def controlled_cosmos():
    """Its first block is given the ControlNet's output."""
    return diffusers.CosmosTransformer3DModel(
        in_channels=CHANNELS + 1,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=1.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(8, 8, 8),
        concat_padding_mask=False,  # it is resized with torchvision
        controlnet_block_every_n=2,
    )


def control_video(pictures, number=5):
    return {"controls": of_pictures(pictures, number, 3, 16, 16, kind=7).sigmoid()}


transfer = partial(
    pipeline,
    "Cosmos2_5_TransferPipeline",
    COSMOS_2_5 | {"transformer": controlled_cosmos, "controlnet": cosmos_controlnet},
    two_lengths,
    noise,
    latents=(CHANNELS, 2, 4, 4),
    height=16,
    width=16,
    num_frames_per_chunk=5,
)
transfer(control_video)
# The second chunk begins with the first one's last frame, of which the denoiser's output is replaced.
transfer(partial(control_video, number=9), label="Cosmos2_5_TransferPipeline (two chunks)")


# Kandinsky 6: videos with their sound


def kandinsky_6():
    return diffusers.Kandinsky6Transformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 2, 4),
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )


def pooled_text(pictures):
    return two_lengths(pictures) | {
        "pooled_prompt_embeds": of_pictures(pictures, WIDTH, kind=3),
        "negative_pooled_prompt_embeds": of_pictures(pictures, WIDTH, kind=4),
    }


class Sound:
    """Of the sound's decoder, the pipeline asks how many latents make a second."""

    config = SimpleNamespace(sample_rate=24)
    latent_hop_length = 2

    def to(self, device):
        return self


KANDINSKY_6 = KANDINSKY_5 | {"transformer": kandinsky_6, "vae": hunyuan_video_vae}
kandinsky_6_of = partial(
    pipeline, "Kandinsky6TI2VAPipeline", latents=(CHANNELS, 2, 4, 4), height=32, width=32, num_frames=5
)
kandinsky_6_of(
    KANDINSKY_6 | {"audio_vae": Sound, "vocoder": Sound},
    pooled_text,
    lambda pictures: {"audio_latents": of_pictures(pictures, 4, 3, kind=5)},
)
kandinsky_6_of(
    KANDINSKY_6,
    pooled_text,
    image(32),
    noise,
    label="Kandinsky6TI2VAPipeline (from a picture, without sound)",
    sample_audio=False,
)


def kandinsky_6_sr():
    warn_of_flex_attention()
    return diffusers.Kandinsky6SRTransformer3DModel(
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_visual_blocks=2,
        axes_dims=(4, 6, 6),
        tile_sizes=((32, 32),),
    )


def kandinsky_6_sr_vae():
    """Makes a video four times smaller and half as long."""
    return diffusers.Kandinsky6SRVAE(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        layers_per_block=1,
        temporal_compression_ratio=2,
    )


def call_sr(pictures):
    """Its result is the enlarged video; the latents are a tile's."""
    return {
        "video": video(pictures)["video"][:, :3],
        "resolution_scale": 2,
        "num_inference_steps": STEPS,
        "generator": generators(pictures),
        "output_type": "pt",
        "return_dict": False,
    }


register(
    "Kandinsky6SRPipeline",
    partial(
        build,
        "Kandinsky6SRPipeline",
        transformer=kandinsky_6_sr,
        vae=kandinsky_6_sr_vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler,
    ),
    call_sr,
    branches=1,
)


# SANA-WM: linear attention that is told where the camera is


def sana_wm():
    return diffusers.SanaWMTransformer3DModel(
        in_channels=CHANNELS,
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        linear_head_dim=16,
        softmax_every_n=2,
        chunk_plucker_channels=6 * 2,
        caption_channels=WIDTH,
        mlp_ratio=1.0,
    )


def call_camera(pictures):
    """One video; the camera moves to the right."""
    camera = torch.eye(4).repeat(3, 1, 1)
    camera[:, 0, 3] = torch.arange(3) / 10
    given = call(pictures, (text, noise), prompt="", c2w=camera.numpy(), intrinsics=[32.0, 32.0, 16.0, 16.0])
    given |= {name: given[name][:, None] for name in ("prompt_embeds", "negative_prompt_embeds")}
    return given | {"image": frames(1, 32, kind=50 + pictures[0])[0], "height": 32, "width": 32, "num_frames": 3}


register(
    "SanaWMPipeline",
    partial(
        build,
        "SanaWMPipeline",
        transformer=sana_wm,
        vae=ltx_2_vae,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler,
    ),
    call_camera,
)


# Cosmos 3: text and video in one sequence, which is not batched; the denoiser is given the words


def cosmos_3():
    return diffusers.Cosmos3OmniTransformer(
        head_dim=8,
        hidden_size=16,
        intermediate_size=16,
        latent_channel=CHANNELS,
        num_attention_heads=2,
        num_hidden_layers=2,
        num_key_value_heads=1,
        patch_latent_dim=4 * CHANNELS,
        vocab_size=3 + 32,
        rope_axes_dim=(2, 1, 1),
    )


class LetterChat:
    """A tokenizer of a letter a token, with a chat template that adds nothing."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token):
        return 2

    def apply_chat_template(self, messages, **settings):
        letters = "".join(message["content"] for message in messages)
        return SimpleNamespace(input_ids=[3 + ord(letter) % 32 for letter in letters])


def call_omni(pictures):
    letter = ascii_lowercase[pictures[0]]
    return {
        "prompt": f"{letter} cat",
        "negative_prompt": f"{letter} is bad",
        "latents": of_pictures(pictures, CHANNELS, 2, 4, 4)[:1],
        "height": 16,
        "width": 16,
        "num_frames": 5,
        "num_inference_steps": STEPS,
        "guidance_scale": 5.0,
        "use_system_prompt": False,
        "add_resolution_template": False,
        "add_duration_template": False,
        "output_type": "latent",
        "return_dict": False,
    }


register(
    "Cosmos3OmniPipeline",
    partial(
        build,
        "Cosmos3OmniPipeline",
        transformer=cosmos_3,
        text_tokenizer=LetterChat,
        vae=wan_vae,
        scheduler=unipc,
        enable_safety_checker=False,
    ),
    call_omni,
)
