"""Videos, and what else is built around a UNet: sound, edits, depth and normals, Kolors, Kandinsky 3."""

import json
import warnings
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from tempfile import TemporaryDirectory

import torch
from at_hand import HAS_TRANSFORMERS_5, diffusers, transformers
from recorded import PixelNormaliser
from zoo import STEPS, generators, images, make, of_pictures, register, wake
from zoo_unets import (
    IMAGE_TO_IMAGE,
    INPUTS,
    SIZE,
    TEXT_TO_IMAGE,
    TOKENS,
    WIDTH,
    XL,
    build,
    call,
    controlnet,
    pipeline,
    scheduler,
    text,
    unet,
    vae,
)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of `torch.jit.script`
    # diffusers itself offers Kolors only beside sentencepiece, which no call here needs
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline
    from diffusers.pipelines.kolors.pipeline_kolors_img2img import KolorsImg2ImgPipeline
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.pag.pipeline_pag_kolors import KolorsPAGPipeline


ONE_PICTURE_ONLY = {
    "AnimateDiffControlNetPipeline",  # gives its ControlNet the frames of one video, however many are made
    "AnimateDiffVideoToVideoControlNetPipeline",  # likewise
    "LEditsPPPipelineStableDiffusion",  # edits the picture that was inverted when the pipeline was built
    "LEditsPPPipelineStableDiffusionXL",  # likewise
    "VideoToVideoSDPipeline",  # adds noise of one timestep a video to one latent a frame
}
FRAMES = 3
LATENTS = {"num_inference_steps": STEPS, "output_type": "latent"}


def video_latents(pictures):
    return of_pictures(pictures, 4, FRAMES, SIZE // 2, SIZE // 2)


def video(pictures, kind=50):
    """Frames from 0 to 1, `(len(pictures), FRAMES, 3, SIZE, SIZE)`."""
    return of_pictures(pictures, FRAMES, 3, SIZE, SIZE, kind=kind).sigmoid()


# AnimateDiff: Stable Diffusion's UNet with layers that attend across frames


def motion_adapter():
    return wake(
        diffusers.MotionAdapter(
            block_out_channels=(8, 16),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=4,
            motion_max_seq_length=FRAMES,
        )
    )


def sparse_controlnet():
    return controlnet(
        diffusers.SparseControlNetModel,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        conditioning_channels=3,
        use_simplified_condition_embedding=False,  # the other kind draws the frames' latents without a generator
        motion_num_attention_heads=2,
        motion_max_seq_length=FRAMES,
    )


INPUTS.update(
    video_latents=lambda pictures: {"latents": video_latents(pictures), "num_frames": FRAMES},
    video=lambda pictures: {"video": video(pictures)},
    one_video=lambda pictures: {"video": list(video(pictures)[0])},
    one_control_video=lambda pictures: {"conditioning_frames": list(video(pictures, kind=7)[0])},
    sparse_frame=lambda _: {"conditioning_frames": images([0], SIZE, SIZE, kind=7), "controlnet_frame_indices": [1]},
    one_noise=lambda pictures: {"generator": generators(pictures)[0]},
)
TEXT_TO_VIDEO = ("video_latents", "size")
VIDEO_TO_VIDEO = ("video", "strength", "noise", "size")

for name, inputs, how in (
    ("AnimateDiffPipeline", TEXT_TO_VIDEO, {}),
    ("AnimateDiffSDXLPipeline", TEXT_TO_VIDEO, {"xl": True}),
    ("AnimateDiffPAGPipeline", ("pag", *TEXT_TO_VIDEO), {"branches": 3}),
    ("AnimateDiffControlNetPipeline", ("one_control_video", *TEXT_TO_VIDEO), {"controlnet": controlnet}),
    ("AnimateDiffSparseControlNetPipeline", ("sparse_frame", *TEXT_TO_VIDEO), {"controlnet": sparse_controlnet}),
    ("AnimateDiffVideoToVideoPipeline", VIDEO_TO_VIDEO, {}),
    (
        "AnimateDiffVideoToVideoControlNetPipeline",
        ("one_video", "one_control_video", "strength", "noise", "size"),
        {"controlnet": controlnet},
    ),
):
    pipeline(name, inputs, motion_adapter=motion_adapter, **how)


# Text to video, with a UNet in three dimensions


def unet_3d():
    return wake(
        diffusers.UNet3DConditionModel(
            sample_size=SIZE // 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            cross_attention_dim=WIDTH,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    )


pipeline("TextToVideoSDPipeline", TEXT_TO_VIDEO, unet=unet_3d)
pipeline("VideoToVideoSDPipeline", ("video", "strength", "one_noise"), unet=unet_3d)


# Stable Video Diffusion and image variation: a picture stands for the text


def vision():
    return transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=SIZE // 2,
            projection_dim=WIDTH,
        )
    )


def build_svd():
    """Of 32 channels, because the norms' groups are as many."""
    return make(
        diffusers.StableVideoDiffusionPipeline,
        vae=diffusers.AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, force_upcast=False
        ),
        image_encoder=vision(),
        unet=wake(
            diffusers.UNetSpatioTemporalConditionModel(
                sample_size=SIZE // 2,
                block_out_channels=(32, 32),
                layers_per_block=1,
                num_attention_heads=(2, 2),
                cross_attention_dim=WIDTH,
                addition_time_embed_dim=4,
                projection_class_embeddings_input_dim=3 * 4,
                num_frames=FRAMES,
                down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
                up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            )
        ),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="leading"),
        feature_extractor=PixelNormaliser(),
    )


def call_svd(pictures):
    """Its output is in a dict: without one it would be the bare latents, not a tuple."""
    return LATENTS | {
        "image": images(pictures, SIZE, SIZE),
        "latents": video_latents(pictures).transpose(1, 2),
        "generator": generators(pictures),
        "height": SIZE,
        "width": SIZE,
    }


register("StableVideoDiffusionPipeline", build_svd, call_svd)


def call_variation(pictures):
    return LATENTS | {
        "image": images(pictures, SIZE, SIZE),
        "latents": of_pictures(pictures, 4, SIZE // 2, SIZE // 2),
        "guidance_scale": 5.0,
        "return_dict": False,
    }


register(
    "StableDiffusionImageVariationPipeline",
    partial(build, "StableDiffusionImageVariationPipeline", image_encoder=vision),
    call_variation,
)


# Kandinsky 3: a UNet of its own, which is also told which tokens are padding


def kandinsky_unet():
    return wake(
        diffusers.Kandinsky3UNet(
            block_out_channels=(8, 16),
            layers_per_block=2,
            groups=2,
            attention_head_dim=4,
            time_embedding_dim=8,
            cross_attention_dim=8,
            encoder_hid_dim=WIDTH,
        )
    )


def movq():
    return diffusers.VQModel(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        num_vq_embeddings=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def mask(pictures):
    """Which tokens are no padding: picture 0's last one is, picture 1's last two are."""
    return torch.stack([(torch.arange(TOKENS) < TOKENS - 1 - picture).long() for picture in pictures])


def call_kandinsky(pictures, *, inputs):
    masks = {"attention_mask": mask(pictures), "negative_attention_mask": mask(pictures)}
    return call(pictures, inputs=inputs, **masks) | {"guidance_scale": 2.0}


def build_kandinsky(cls, **parts):
    ddpm = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False)
    return make(cls, unet=kandinsky_unet(), scheduler=ddpm, **parts)


def build_kandinsky_img2img():
    return build_kandinsky(diffusers.Kandinsky3Img2ImgPipeline, movq=movq())


INPUTS.update(kandinsky_size=lambda _: {"height": SIZE * 4, "width": SIZE * 4})  # without an autoencoder, by eight
register(
    "Kandinsky3Pipeline",
    partial(build_kandinsky, diffusers.Kandinsky3Pipeline),
    partial(call_kandinsky, inputs=("latents", "noise", "kandinsky_size")),
)
register("Kandinsky3Img2ImgPipeline", build_kandinsky_img2img, partial(call_kandinsky, inputs=IMAGE_TO_IMAGE))


# AudioLDM 2: its UNet attends to two texts, one of them written by a language model


def audio_unet():
    return diffusers.AudioLDM2UNet2DConditionModel(
        sample_size=SIZE // 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=((None, 8, WIDTH), (None, 8, WIDTH)),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def vocoder():
    return transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=SIZE,
            sampling_rate=SIZE,
            upsample_initial_channel=4,
            upsample_rates=(2, 2),
            upsample_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,),
            resblock_dilation_sizes=((1,),),
        )
    )


def build_audio():
    """The text encoder and the language model are asked for their dtype alone, the vocoder for its rates."""
    return make(
        diffusers.AudioLDM2Pipeline,
        unet=audio_unet(),
        scheduler=scheduler(),
        text_encoder_2=transformers.T5EncoderModel(
            transformers.T5Config(vocab_size=4, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2)
        ),
        language_model=transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=4, n_positions=4, n_embd=4, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=1
            )
        ),
        vocoder=vocoder(),
    )


def call_audio(pictures):
    return (
        text(pictures)
        | LATENTS
        | {
            "generated_prompt_embeds": of_pictures(pictures, 3, 8, kind=5),
            "negative_generated_prompt_embeds": of_pictures(pictures, 3, 8, kind=6),
            "attention_mask": mask(pictures),
            "negative_attention_mask": mask(pictures),
            "latents": of_pictures(pictures, 4, SIZE // 2, SIZE // 2),
            "guidance_scale": 5.0,
        }
    )


register("AudioLDM2Pipeline", build_audio, call_audio)


# LEDITS++ and GLIGEN have to be given words

LETTERS = ["<|startoftext|>", "<|endoftext|>", *(letter + end for end in ("", "</w>") for letter in ascii_lowercase)]


def tokenizer():
    """A letter is a token."""
    vocabulary = {letter: number for number, letter in enumerate(LETTERS)}
    if HAS_TRANSFORMERS_5:
        return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)
    with TemporaryDirectory() as folder:
        files = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        files[0].write_text(json.dumps(vocabulary))
        files[1].write_text("#version: 0.2\n")
        return transformers.CLIPTokenizer(*map(str, files), model_max_length=TOKENS)


def text_encoder(cls=transformers.CLIPTextModel, width=WIDTH):
    config = transformers.CLIPTextConfig(
        vocab_size=len(LETTERS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=10,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return cls(config)


def build_edits(name, scheduler, **parts):
    """The pipeline, after it has inverted the picture that it is to edit: that sets its timesteps."""
    autoencoder = vae()
    autoencoder.register_to_config(sample_size=2 * SIZE)
    pipe = build(name, vae=lambda: autoencoder, scheduler=scheduler, tokenizer=tokenizer, **parts)
    pipe.set_progress_bar_config(disable=True)
    pipe.invert(
        image=images([0], 2 * SIZE, 2 * SIZE),
        num_inversion_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
    )
    return pipe


def call_edits(pictures):
    """Two edits, each masked by its own strength: to mask by attention, every attention processor is replaced."""
    letter = ascii_lowercase[pictures[0]]
    return {
        "editing_prompt": [f"{letter} dog", f"{letter} hat"],
        "edit_guidance_scale": [5.0, 4.0],
        "edit_threshold": 0.5,
        "use_cross_attn_mask": False,
        "use_intersect_mask": False,
        "output_type": "latent",
        "return_dict": False,
    }


def multistep():
    return diffusers.DPMSolverMultistepScheduler(
        beta_schedule="scaled_linear", algorithm_type="sde-dpmsolver++", steps_offset=1
    )


register(
    "LEditsPPPipelineStableDiffusion",
    partial(build_edits, "LEditsPPPipelineStableDiffusion", multistep, text_encoder=text_encoder),
    call_edits,
    branches=3,
)
register(
    "LEditsPPPipelineStableDiffusionXL",
    partial(
        build_edits,
        "LEditsPPPipelineStableDiffusionXL",
        scheduler,
        xl=True,
        tokenizer_2=tokenizer,
        text_encoder=partial(text_encoder, width=4),
        text_encoder_2=partial(text_encoder, transformers.CLIPTextModelWithProjection, width=WIDTH - 4),
    ),
    call_edits,
    branches=3,
)


INPUTS.update(
    boxes=lambda _: {  # of all pictures of a batch
        "gligen_phrases": ["a dog", "hat"],
        "gligen_boxes": [[0.1, 0.2, 0.5, 0.7], [0.4, 0.0, 0.9, 0.4]],
        "gligen_scheduled_sampling_beta": 1.0,
    }
)
pipeline(
    "StableDiffusionGLIGENPipeline",
    ("boxes", *TEXT_TO_IMAGE),
    unet=lambda: wake(unet(attention_type="gated"), std=0.5),
    text_encoder=text_encoder,
    tokenizer=tokenizer,
)


# Marigold: the text is empty, and is always the same


def build_marigold(name, targets=1, **settings):
    pipe = build(
        name,
        unet_changes={"in_channels": 4 + 4 * targets, "out_channels": 4 * targets},
        default_processing_resolution=0,
        **settings,
    )
    pipe.empty_text_embedding = 4 * of_pictures([0], TOKENS, WIDTH, kind=1)  # large enough to show in the result
    return pipe


def call_marigold(pictures, targets=1):
    return {
        "image": images(pictures, SIZE, SIZE),
        "latents": of_pictures(pictures, 4 * targets, SIZE // 2, SIZE // 2),
        "batch_size": len(pictures),
        "num_inference_steps": STEPS,
        "output_type": "pt",
        "return_dict": False,
    }


for name, kind, targets, settings in (
    ("MarigoldDepthPipeline", "depth", 1, {}),
    ("MarigoldNormalsPipeline", "normals", 1, {}),
    ("MarigoldIntrinsicsPipeline", "intrinsics", 2, {"target_properties": {"target_names": ["albedo", "material"]}}),
):
    register(
        name,
        partial(build_marigold, name, targets=targets, prediction_type=kind, **settings),
        partial(call_marigold, targets=targets),
        branches=1,
    )


# Kolors: SDXL with another text encoder

KOLORS = XL | {"encoder_hid_dim": WIDTH, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 8}


class LetterTokenizer:
    """What ChatGLM's tokenizer gives its model: texts are padded on the left."""

    def __call__(self, texts, **settings):
        ids = [[ascii_lowercase.index(letter) + 1 for letter in one if letter != " "][:TOKENS] for one in texts]
        pad = [[0] * (TOKENS - len(one)) for one in ids]
        return transformers.BatchEncoding(
            {
                "input_ids": torch.tensor([zeros + one for zeros, one in zip(pad, ids, strict=True)]),
                "attention_mask": torch.tensor([zeros + [1] * len(one) for zeros, one in zip(pad, ids, strict=True)]),
                "position_ids": torch.tensor(
                    [zeros + list(range(len(one))) for zeros, one in zip(pad, ids, strict=True)]
                ),
            }
        )


def chat_glm():
    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=len(ascii_lowercase) + 1,
        hidden_size=WIDTH,
        ffn_hidden_size=8,
        kv_channels=WIDTH // 2,
        num_attention_heads=2,
        seq_length=TOKENS,
        original_rope=True,
    )
    encoder = ChatGLMModel(config)
    for parameter in encoder.parameters():  # it leaves them as the memory was
        torch.nn.init.normal_(parameter, std=0.5)
    return encoder


def call_words(pictures, *, inputs):
    """For a class that cannot be given embeddings, because it drops the pooled ones."""
    kwargs = call(pictures, inputs=inputs, negative=False)
    del kwargs["prompt_embeds"]
    letters = [ascii_lowercase[picture] for picture in pictures]
    return kwargs | {
        "prompt": [f"{letter} cat" for letter in letters],
        "negative_prompt": [f"{letter} bad" for letter in letters],
    }


def build_kolors(cls, text_encoder=None, tokenizer=None, **changes):
    denoiser = unet(**KOLORS | changes)
    made = {"text_encoder": text_encoder and text_encoder(), "tokenizer": tokenizer and tokenizer()}
    sigmas = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.014, beta_schedule="scaled_linear")
    return make(cls, vae=vae(), unet=denoiser, scheduler=sigmas, **made)


for cls, inputs, branches in ((KolorsPipeline, TEXT_TO_IMAGE, 2), (KolorsPAGPipeline, ("pag", *TEXT_TO_IMAGE), 3)):
    register(cls.__name__, partial(build_kolors, cls), partial(call, xl=True, inputs=inputs), branches)
register(
    "KolorsImg2ImgPipeline",
    partial(
        build_kolors,
        KolorsImg2ImgPipeline,
        chat_glm,
        LetterTokenizer,
        projection_class_embeddings_input_dim=6 * 4 + WIDTH,
    ),
    partial(call_words, inputs=IMAGE_TO_IMAGE),
)
