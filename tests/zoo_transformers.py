"""Tiny pipelines whose denoiser is a transformer: of images, of videos and of sound."""

import warnings
from functools import partial

import torch
from at_hand import diffusers
from diffusers.pipelines.stable_audio import StableAudioProjectionModel
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from zoo import STEPS, generators, images, make, of_pictures, register, wake


TOKENS, WIDTH = 5, 8  # of the text
HEADS = {"num_attention_heads": 2, "attention_head_dim": 4}

# Pipelines that do not run on a batch of two, with the reason.
ONE_PICTURE_ONLY = {
    "WanVACEPipeline",  # refuses more than one video, with embeddings too
}


def text(
    pictures, masks=("prompt_attention_mask", "negative_prompt_attention_mask"), tokens=TOKENS, suffix="", kind=1
):
    """Embeddings of the prompt and of the negative prompt, and their masks; the negative prompt is the shorter."""
    given = {"negative_prompt": None}
    for number, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        given[f"{name}{suffix}"] = of_pictures(pictures, tokens, WIDTH, kind=kind + number)
        if masks:
            mask = torch.ones(len(pictures), tokens, dtype=torch.int64)
            mask[:, tokens - number :] = 0
            given[f"{masks[number]}{suffix}"] = mask
    return given


def call(pictures, inputs=(), latents=None, scale=5.0, **settings):
    """Arguments of a call; `inputs` are functions of the pictures, `latents` is the shape of a picture's noise."""
    given = {"num_inference_steps": STEPS, "guidance_scale": scale, "output_type": "latent", "return_dict": False}
    for inputs_of in inputs:
        given |= inputs_of(pictures)
    if latents:
        given["latents"] = of_pictures(pictures, *latents)
    return given | settings


def build(name, **components):
    """A pipeline; a component that is a function is called, so that its weights are drawn when it is built."""
    made = {part: component() if callable(component) else component for part, component in components.items()}
    for part, component in made.items():
        if part in ("transformer", "transformer_2", "controlnet"):
            wake(component)
    return make(getattr(diffusers, name), **made)


def pipeline(name, components, *inputs, branches=2, label=None, **settings):
    """Register a class with what it is built from and what it is given."""
    register(label or name, partial(build, name, **components), partial(call, inputs=inputs, **settings), branches)


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim():
    return diffusers.DDIMScheduler(**BETAS, clip_sample=False)


def dpm_flow():
    return diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


# PixArt: the network predicts a variance too

PIXART = {
    "transformer": partial(
        diffusers.PixArtTransformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=WIDTH,
        sample_size=4,
        norm_num_groups=4,
    ),
    "scheduler": partial(diffusers.DPMSolverMultistepScheduler, **BETAS),
}
pixart = partial(pipeline, latents=(4, 4, 4), height=32, width=32, use_resolution_binning=False)
pixart("PixArtAlphaPipeline", PIXART, text)
pixart("PixArtSigmaPipeline", PIXART, text)
pixart("PixArtSigmaPAGPipeline", PIXART, text, branches=3, pag_scale=2.0)


# HunyuanDiT: two texts, and skips from the first blocks to the last


HUNYUAN_DIT_SIZES = {
    **HEADS,
    "in_channels": 4,
    "patch_size": 2,
    "hidden_size": 8,
    "cross_attention_dim": WIDTH,
    "cross_attention_dim_t5": WIDTH,
    "pooled_projection_dim": 8,
    "text_len": TOKENS,
    "text_len_t5": TOKENS + 1,
    "sample_size": 4,
    "use_style_cond_and_image_meta_size": False,
}
HUNYUAN_DIT = {
    "transformer": partial(diffusers.HunyuanDiT2DModel, **HUNYUAN_DIT_SIZES, num_layers=4),
    "scheduler": ddim,
}
second_text = partial(text, tokens=TOKENS + 1, suffix="_2", kind=3)


class MeanEncoder(diffusers.AutoencoderKL):
    """Encodes a picture always to the same latents; the pipeline draws them without a generator."""

    def encode(self, x, return_dict=True):
        encoded = super().encode(x)
        encoded.latent_dist = type(encoded.latent_dist)(encoded.latent_dist.parameters, deterministic=True)
        return encoded


def mean_encoder():
    return MeanEncoder(
        block_out_channels=(4,) * 4,
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


HUNYUAN_DIT_CONTROL = HUNYUAN_DIT | {
    "controlnet": partial(diffusers.HunyuanDiT2DControlNetModel, **HUNYUAN_DIT_SIZES, transformer_num_layers=4),
    "vae": mean_encoder,
}


def control_image(size):
    return lambda pictures: {"control_image": images(pictures, size, size, kind=7)}


hunyuan_dit = partial(pipeline, latents=(4, 4, 4), height=32, width=32, use_resolution_binning=False)
hunyuan_dit("HunyuanDiTPipeline", HUNYUAN_DIT, text, second_text)
hunyuan_dit("HunyuanDiTPAGPipeline", HUNYUAN_DIT, text, second_text, branches=3, pag_scale=2.0)
hunyuan_dit("HunyuanDiTControlNetPipeline", HUNYUAN_DIT_CONTROL, text, second_text, control_image(32))


# Latte: attention in space with the text, and in time without

pipeline(
    "LattePipeline",
    {
        "transformer": partial(
            diffusers.LatteTransformer3DModel,
            **HEADS,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=8,
            attention_bias=True,
            sample_size=4,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=1000,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=WIDTH,
            video_length=3,
        ),
        "scheduler": ddim,
    },
    partial(text, masks=()),
    latents=(4, 3, 4, 4),
    video_length=3,
    height=32,
    width=32,
)


# Lumina-Next: `[positive, negative]`

pipeline(
    "LuminaPipeline",
    {
        "transformer": partial(
            diffusers.LuminaNextDiT2DModel,
            sample_size=4,
            in_channels=4,
            hidden_size=8,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            cross_attention_dim=WIDTH,
        ),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
    },
    text,
    latents=(4, 4, 4),
    height=32,
    width=32,
)


# Sana: linear self-attention

SANA_SIZES = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 4,
    "cross_attention_dim": 8,
    "caption_channels": WIDTH,
}
SANA = {"transformer": partial(diffusers.SanaTransformer2DModel, **SANA_SIZES, sample_size=4), "scheduler": dpm_flow}
SANA_SPRINT = {
    "transformer": partial(diffusers.SanaTransformer2DModel, **SANA_SIZES, sample_size=4, guidance_embeds=True),
    "scheduler": diffusers.SCMScheduler,
}


def dc_vae():
    """Makes a picture eight times smaller."""
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        scaling_factor=0.41407,
    )


def prompt_alone(pictures):
    """The text of distilled networks, which are told the guidance scale."""
    return {name: value for name, value in text(pictures).items() if "negative" not in name}


def noise(pictures):
    return {"generator": generators(pictures)}


def image(size):
    return lambda pictures: {"image": images(pictures, size, size)}


SANA_CONTROL = SANA | {
    "controlnet": partial(diffusers.SanaControlNetModel, **SANA_SIZES | {"num_layers": 1}, sample_size=4),
    "vae": dc_vae,
}
sana = partial(pipeline, height=32, width=32, use_resolution_binning=False)
sana("SanaPipeline", SANA, text, latents=(4, 4, 4))
sana("SanaPAGPipeline", SANA, text, latents=(4, 4, 4), branches=3, pag_scale=2.0)
sana("SanaControlNetPipeline", SANA_CONTROL, text, control_image(32), latents=(4, 4, 4))

sprint = partial(sana, branches=1, intermediate_timesteps=None)
sprint("SanaSprintPipeline", SANA_SPRINT, prompt_alone, noise, latents=(4, 4, 4))
sprint(
    "SanaSprintImg2ImgPipeline",
    SANA_SPRINT | {"vae": dc_vae},
    prompt_alone,
    noise,
    image(32),
    strength=1.0,
    max_timesteps=1.2,  # at the default the picture is all noise
)
sana(
    "SanaVideoPipeline",
    {
        "transformer": partial(
            diffusers.SanaVideoTransformer3DModel,
            **SANA_SIZES | {"attention_head_dim": 6, "cross_attention_head_dim": 6, "cross_attention_dim": 12},
            sample_size=4,
        ),
        "scheduler": dpm_flow,
    },
    text,
    latents=(4, 2, 4, 4),
    frames=5,
)


# LTX-Video: one batch, or a first frame, or frames anywhere; latents in a row

LTX = {
    "transformer": partial(
        diffusers.LTXVideoTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        cross_attention_dim=8,
        caption_channels=WIDTH,
    ),
    "scheduler": diffusers.FlowMatchEulerDiscreteScheduler,
}


def ltx_vae():
    """Makes a video eight times smaller and half as long."""
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 4),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(4, 4),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        downsample_type=("conv",) * 2,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=4,
    )


pipeline("LTXPipeline", LTX, text, latents=(2 * 2 * 2, 4), height=64, width=64, num_frames=9)
for name in ("LTXImageToVideoPipeline", "LTXConditionPipeline"):
    pipeline(name, LTX | {"vae": ltx_vae}, text, image(32), noise, height=32, width=32, num_frames=3)


# Allegro

pipeline(
    "AllegroPipeline",
    {
        "transformer": partial(
            diffusers.AllegroTransformer3DModel,
            **HEADS | {"attention_head_dim": 6},
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=12,
            caption_channels=WIDTH,
            sample_height=4,
            sample_width=4,
            sample_frames=2,
        ),
        "scheduler": partial(diffusers.EulerAncestralDiscreteScheduler, **BETAS),
    },
    text,
    noise,
    latents=(4, 2, 4, 4),
    height=32,
    width=32,
    num_frames=8,
)


# Wan: a call for the prompt and a call for the negative prompt

CHANNELS = 4  # of the latents
plain_text = partial(text, masks=())


def wan(cls=diffusers.WanTransformer3DModel, **changes):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 6,
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "text_dim": WIDTH,
        "freq_dim": 8,
        "ffn_dim": 16,
        "num_layers": 2,
        "rope_max_seq_len": 8,
    }
    return cls(**config | changes)


def wan_vae():
    """Makes a video four times smaller and four times shorter."""
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=CHANNELS,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1] * CHANNELS,
        latents_std=[0.5] * CHANNELS,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )


def unipc():
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def image_encoder():
    config = CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    return CLIPVisionModel(config)


def image_processor():
    edge = {"height": 8, "width": 8}
    return CLIPImageProcessor(size=edge, crop_size=edge, do_rescale=False)


def shared_image(_):
    """One for all prompts: these pipelines take no batch of pictures."""
    return {"image": images([0], 16, 16)}


def video(pictures):
    return {"video": images([frame + 10 * p for p in pictures for frame in range(5)], 16, 16).unflatten(0, (-1, 5))}


def half(pictures):
    """What is new in the video: the right half."""
    mask = torch.zeros(len(pictures), 5, 3, 16, 16)
    mask[..., 8:] = 1.0
    return {"mask": mask}


WAN = {"transformer": wan, "scheduler": unipc}
WAN_FROM_IMAGE = {
    "vae": wan_vae,
    "scheduler": unipc,
    "image_encoder": image_encoder,
    "image_processor": image_processor,
}
FROM_IMAGE_SIZES = {"in_channels": 2 * CHANNELS + 4, "image_dim": 8, "added_kv_proj_dim": 12}
# With pictures among what it attends to, a layer takes the last 512 tokens for the text.
long_text = partial(plain_text, tokens=512)
in_latents = {"latents": (CHANNELS, 2, 4, 4), "height": 32, "width": 32, "num_frames": 5}
in_pixels = {"latents": (CHANNELS, 2, 4, 4), "height": 16, "width": 16, "num_frames": 5}

pipeline("WanPipeline", WAN, plain_text, **in_latents)
pipeline(
    "WanPipeline",
    WAN | {"transformer_2": wan, "boundary_ratio": 0.8},
    plain_text,
    label="WanPipeline (two denoisers)",
    guidance_scale_2=3.0,
    **in_latents,
)
pipeline(
    "WanImageToVideoPipeline",
    WAN_FROM_IMAGE | {"transformer": partial(wan, **FROM_IMAGE_SIZES)},
    long_text,
    shared_image,
    **in_pixels,
)
pipeline(
    "WanVideoToVideoPipeline",
    {"transformer": wan, "vae": wan_vae, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler},
    plain_text,
    video,
    noise,
    height=16,
    width=16,
    timesteps=[800, 600, 400, 200],  # from where the video is still seen
    strength=1.0,
)
pipeline(
    "WanVACEPipeline",
    {
        "transformer": partial(
            wan,
            diffusers.WanVACETransformer3DModel,
            vace_layers=[0],
            vace_in_channels=2 * CHANNELS + 4 * 4,
        ),
        "vae": wan_vae,
        "scheduler": unipc,
    },
    plain_text,
    video,
    half,
    **in_pixels,
)


# SkyReels-V2: as Wan

SKYREELS = partial(wan, diffusers.SkyReelsV2Transformer3DModel)
pipeline("SkyReelsV2Pipeline", {"transformer": SKYREELS, "scheduler": unipc}, plain_text, **in_latents)
pipeline(
    "SkyReelsV2ImageToVideoPipeline",
    WAN_FROM_IMAGE | {"transformer": partial(SKYREELS, **FROM_IMAGE_SIZES)},
    long_text,
    shared_image,
    **in_pixels,
)


# Cosmos: no pipeline without a guardrail, which looks at words and at pixels, and here are none


class Guardrail:
    def to(self, device):
        return self


def cosmos(frames_given=False):
    """With frames given, a channel says which they are."""
    return diffusers.CosmosTransformer3DModel(
        in_channels=CHANNELS + frames_given,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        mlp_ratio=1.0,
        text_embed_dim=WIDTH,
        adaln_lora_dim=4,
        max_size=(4, 8, 8),
        concat_padding_mask=False,  # it is resized with torchvision
    )


def cosmos_vae():
    """Makes a video four times smaller and four times shorter."""
    return diffusers.AutoencoderKLCosmos(
        latent_channels=CHANNELS,
        encoder_block_out_channels=(4, 4, 4),
        decode_block_out_channels=(4, 4, 4),
        attention_resolutions=(),
        resolution=16,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
        latents_mean=None,
        latents_std=None,
    )


def karras_flow():
    return diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)


COSMOS = {
    "transformer": cosmos,
    "vae": cosmos_vae,
    "scheduler": diffusers.EDMEulerScheduler,
    "safety_checker": Guardrail,
}
COSMOS_2 = COSMOS | {"vae": wan_vae, "scheduler": karras_flow}
with_frames = {"transformer": partial(cosmos, frames_given=True)}
pipeline("CosmosTextToWorldPipeline", COSMOS, plain_text, **in_pixels)
pipeline("CosmosVideoToWorldPipeline", COSMOS | with_frames, plain_text, image(16), noise, **in_pixels)
pipeline("Cosmos2TextToImagePipeline", COSMOS_2, plain_text, latents=(CHANNELS, 1, 4, 4), height=16, width=16)
pipeline("Cosmos2VideoToWorldPipeline", COSMOS_2 | with_frames, plain_text, image(16), noise, **in_pixels)


# Kandinsky 5: two texts, channels last


def kandinsky_5(**more):
    return diffusers.Kandinsky5Transformer3DModel(
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
        **more,
    )


def kandinsky_5_text(pictures):
    given = {}
    for number, name in enumerate(("prompt", "negative_prompt")):
        given[f"{name}_embeds_qwen"] = of_pictures(pictures, TOKENS, WIDTH, kind=1 + number)
        given[f"{name}_embeds_clip"] = of_pictures(pictures, WIDTH, kind=3 + number)
        given[f"{name}_cu_seqlens"] = TOKENS * torch.arange(len(pictures) + 1)
    return given


KANDINSKY_5 = {"transformer": kandinsky_5, "scheduler": diffusers.FlowMatchEulerDiscreteScheduler}


def small_kandinsky_5():
    pipe = build("Kandinsky5T2IPipeline", **KANDINSKY_5)
    pipe.resolutions = [(32, 32)]  # any other is rounded to one of these
    return pipe


pipeline(
    "Kandinsky5T2VPipeline",
    KANDINSKY_5,
    kandinsky_5_text,
    latents=(2, 4, 4, CHANNELS),
    height=32,
    width=32,
    num_frames=5,
)
register(
    "Kandinsky5T2IPipeline",
    small_kandinsky_5,
    partial(call, inputs=(kandinsky_5_text,), latents=(1, 4, 4, CHANNELS), height=32, width=32),
)


# Stable Audio: the durations follow the text, and its pipeline takes no `callback_on_step_end`


def audio_vae():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # weight_norm
        return diffusers.AutoencoderOobleck(
            encoder_hidden_size=4,
            downsampling_ratios=[2],
            channel_multiples=[1],
            decoder_channels=4,
            decoder_input_channels=CHANNELS,
            sampling_rate=4,
        )


pipeline(
    "StableAudioPipeline",
    {
        "transformer": partial(
            diffusers.StableAudioDiTModel,
            sample_size=8,
            in_channels=CHANNELS,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=4,
            num_key_value_attention_heads=2,
            out_channels=CHANNELS,
            cross_attention_dim=8,
            time_proj_dim=8,
            global_states_input_dim=2 * WIDTH,
            cross_attention_input_dim=WIDTH,
        ),
        "projection_model": partial(
            StableAudioProjectionModel, text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
        ),
        "vae": audio_vae,
        "scheduler": diffusers.EDMDPMSolverMultistepScheduler,
    },
    partial(text, masks=("attention_mask", "negative_attention_mask")),
    latents=(CHANNELS, 8),
)
