"""Tiny pipelines with cross-attention and guidance whose loops cannot be gated; they run as diffusers made them."""

from functools import partial

from at_hand import diffusers
from zoo import STEPS, images, of_pictures, register
from zoo_motion import FRAMES, text_encoder, tokenizer
from zoo_older import words
from zoo_transformers import SKYREELS, in_pixels, noise, plain_text, unipc, video, wan_vae
from zoo_transformers import pipeline as transformer_pipeline
from zoo_unets import INPUTS, SIZE, TEXT_TO_IMAGE, TOKENS, WIDTH, pipeline
from zoo_unets import build as build_unet
from zoo_videos import uneven_text


# Pipelines that do not run on a batch of two, or not as on each alone, with the reason.
ONE_PICTURE_ONLY = {
    "StableDiffusionPanoramaPipeline",  # orders the latents of a batch by picture, and its texts by branch
    "StableDiffusionPanoramaPipeline (two views at once)",  # likewise
    "StableDiffusionPix2PixZeroPipeline",  # edits the second row of the texts, of two pictures a negative one
    "TextToVideoZeroPipeline",  # has motion for the frames of one video
    "TextToVideoZeroSDXLPipeline",  # likewise
}


# Attend and Excite: before each step it moves the latents along a gradient of the prompt's attention maps

pipeline(
    "StableDiffusionAttendAndExcitePipeline",
    ("tokens", *TEXT_TO_IMAGE),
    settings={
        "prompt": None,  # has to be given
        "attn_res": (SIZE // 2, SIZE // 2),  # of the layers that are looked at
        "max_iter_to_alter": STEPS - 1,
        "thresholds": {1: 0.9},  # never reached: the step is refined as often as it may be
    },
)
INPUTS.update(tokens=lambda pictures: {"token_indices": [[2, 4] for _ in pictures]})


# pix2pix zero: a loop that keeps the attention maps, and one that edits the picture and holds them near to those

pipeline("StableDiffusionPix2PixZeroPipeline", ("direction", *TEXT_TO_IMAGE))
INPUTS.update(
    direction=lambda _: {
        "source_embeds": of_pictures([0, 1], TOKENS, WIDTH, kind=8),
        "target_embeds": of_pictures([0, 1], TOKENS, WIDTH, kind=9),
        "cross_attention_guidance_amount": 1.0,
    }
)


# Panorama: in each step several views of the latents, each at most 64 wide, with a picture's two branches side by side

INPUTS.update(
    panorama=lambda pictures: {"latents": of_pictures(pictures, 4, 2, 72), "height": 8 * 2, "width": 8 * 72},
)
for label, views in (("", 1), (" (two views at once)", 2)):
    pipeline(
        "StableDiffusionPanoramaPipeline",
        ("panorama",),
        label=f"StableDiffusionPanoramaPipeline{label}",
        branches=2 * views,
        vae=None,  # a view's size in pixels is always divided by eight
        settings={"view_batch_size": views},
    )


# ParaDiGMS: a batch of several timesteps, computed again until they agree

for label, parallel in (("", STEPS), (" (two steps at once)", 2)):
    pipeline(
        "StableDiffusionParadigmsPipeline",
        TEXT_TO_IMAGE,
        label=f"StableDiffusionParadigmsPipeline{label}",
        branches=2 * parallel,
        scheduler=partial(diffusers.DDIMParallelScheduler, beta_schedule="scaled_linear", clip_sample=False),
        settings={"parallel": parallel},
    )


# Self-attention guidance: after the two halves the negative prompt once more, on latents that its attention blurred

pipeline("StableDiffusionSAGPipeline", TEXT_TO_IMAGE, settings={"sag_scale": 1.0})


# Text to video zero: two steps of the first frame, and from its first one on all steps of all frames

MOTION = {"video_length": FRAMES, "t0": 1, "t1": 2}  # counted from the last step


def call_words(pictures):
    return (
        words(pictures)
        | MOTION
        | INPUTS["latents"](pictures)
        | INPUTS["size"](pictures)
        | INPUTS["one_noise"](pictures)  # of all frames but the first
        | {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent", "return_dict": False}
    )


register(
    "TextToVideoZeroPipeline",
    partial(build_unet, "TextToVideoZeroPipeline", text_encoder=text_encoder, tokenizer=tokenizer),
    call_words,
)
pipeline(
    "TextToVideoZeroSDXLPipeline",
    ("one_noise", *TEXT_TO_IMAGE),
    xl=True,
    settings=MOTION | {"prompt": None},
)


# SkyReels-V2 with diffusion forcing: each frame has a timestep and a scheduler of its own

forcing = partial(transformer_pipeline, height=16, width=16)
SKYREELS_V2 = {"transformer": SKYREELS, "vae": wan_vae, "scheduler": unipc}
BLOCKS = {"ar_step": 2, "causal_block_size": 2, "num_frames": 13}  # the second two frames two steps after the first
LONG = {"num_frames": 9, "base_num_frames": 5, "overlap_history": 1}


def shared_images(_):
    """The first and the last frame, the same for all prompts."""
    first, last = images([0, 1], 16, 16).split(1)
    return {"image": first, "last_image": last}


def shared_image(pictures):
    return {"image": shared_images(pictures)["image"]}


name = "SkyReelsV2DiffusionForcingPipeline"
from_text = partial(forcing, name, SKYREELS_V2, prompt=None)
from_text(plain_text, noise, num_frames=5)
from_text(partial(uneven_text, masks=()), noise, label=f"{name} (uneven texts)", num_frames=5)
from_text(plain_text, noise, label=f"{name} (asynchronous)", **BLOCKS)
from_text(plain_text, noise, label=f"{name} (long)", **LONG)

name = "SkyReelsV2DiffusionForcingImageToVideoPipeline"
transformer_pipeline(name, SKYREELS_V2, plain_text, shared_image, **in_pixels)
transformer_pipeline(name, SKYREELS_V2, plain_text, shared_images, label=f"{name} (last frame)", **in_pixels)
forcing(name, SKYREELS_V2, plain_text, noise, shared_image, label=f"{name} (long)", **LONG)

name = "SkyReelsV2DiffusionForcingVideoToVideoPipeline"
forcing(name, SKYREELS_V2, plain_text, video, noise, num_frames=9, overlap_history=1)
forcing(name, SKYREELS_V2, plain_text, video, noise, label=f"{name} (long)", **LONG)
