"""Stable Diffusion and SDXL: text-to-image, from pictures, with ControlNets, adapters and perturbed attention."""

from functools import partial

from at_hand import diffusers
from zoo import STEPS, generators, images, make, of_pictures, register, seeded, wake


SIZE = 16  # pixels; the autoencoder halves them
TOKENS, WIDTH = 7, 12


def unet(cls=diffusers.UNet2DConditionModel, **changes):
    config = {
        "sample_size": SIZE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return cls(**config | changes)


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
    "transformer_layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIZE,
        force_upcast=False,
        scaling_factor=0.08333,
    )


def scheduler():
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1)


def controlnet(cls=diffusers.ControlNetModel, **changes):
    config = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": WIDTH,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "conditioning_embedding_out_channels": (4, 8),
    }
    return wake(cls(**config | changes))


def union(**changes):
    return controlnet(
        diffusers.ControlNetUnionModel, **changes, num_control_type=2, num_trans_channel=8, num_proj_channel=8
    )


XL_CONTROL = {name: value for name, value in XL.items() if name != "up_block_types"}


def build(name, *, xl=False, unet_changes=None, **components):
    """A pipeline; a component that is a function is called, so that its weights are drawn when it is built."""
    made = {part: component() if callable(component) else component for part, component in components.items()}
    denoiser = unet(**(XL if xl else {}) | (unet_changes or {}))
    return make(getattr(diffusers, name), **{"vae": vae(), "unet": denoiser, "scheduler": scheduler(), **made})


def build_xs(name, xl):
    denoiser = unet(**XL if xl else {}, layers_per_block=2)
    adapter = wake(
        diffusers.ControlNetXSAdapter.from_unet(denoiser, size_ratio=0.5, conditioning_embedding_out_channels=(4, 8))
    )
    cls = getattr(diffusers, name)
    return make(cls, vae=vae(), unet=denoiser, scheduler=scheduler(), controlnet=adapter)


def text(pictures, *, xl=False, negative=True):
    embeds = {"prompt_embeds": of_pictures(pictures, TOKENS, WIDTH, kind=1)}
    if negative:
        embeds["negative_prompt_embeds"] = of_pictures(pictures, TOKENS, WIDTH, kind=2)
    if xl:
        embeds["pooled_prompt_embeds"] = of_pictures(pictures, 10, kind=3)
        embeds["negative_pooled_prompt_embeds"] = of_pictures(pictures, 10, kind=4)
    return embeds


def call(pictures, *, xl=False, inputs=(), negative=True, **settings):
    """Arguments; `inputs` names what the class is given beside the text, from `INPUTS`."""
    kwargs = text(pictures, xl=xl, negative=negative)
    kwargs |= {"num_inference_steps": STEPS, "guidance_scale": 5.0, "output_type": "latent", "return_dict": False}
    for name in inputs:
        kwargs |= INPUTS[name](pictures)
    return kwargs | settings


INPUTS = {
    "latents": lambda pictures: {"latents": of_pictures(pictures, 4, SIZE // 2, SIZE // 2)},
    "size": lambda _: {"height": SIZE, "width": SIZE},
    "noise": lambda pictures: {"generator": generators(pictures)},
    "image": lambda pictures: {"image": images(pictures, SIZE, SIZE)},
    "low_resolution": lambda pictures: {"image": images(pictures, SIZE // 2, SIZE // 2)},
    "strength": lambda _: {"strength": 1.0},
    "mask": lambda pictures: {"mask_image": (of_pictures(pictures, 1, SIZE, SIZE, kind=5) > 0).float()},
    "depth": lambda pictures: {"depth_map": of_pictures(pictures, SIZE // 2, SIZE // 2, kind=6)},
    "control": lambda pictures: {"control_image": images(pictures, SIZE, SIZE, kind=7)},
    "control_as_image": lambda pictures: {"image": images(pictures, SIZE, SIZE, kind=7)},
    "two_controls": lambda pictures: {"image": [images(pictures, SIZE, SIZE, kind=kind) for kind in (7, 8)]},
    "union": lambda pictures: {"control_image": [images(pictures, SIZE, SIZE, kind=7)], "control_mode": [1]},
    "pag": lambda _: {"pag_scale": 2.0},
}
TEXT_TO_IMAGE = ("latents", "size")
IMAGE_TO_IMAGE = ("image", "strength", "noise")
INPAINT = ("image", "mask", "strength", "latents", "size", "noise")


def pipeline(name, inputs, *, branches=2, label=None, settings=None, **how):
    """Register a class; `how` is `build`'s."""
    xl = how.get("xl", False)
    register(
        label or name, partial(build, name, **how), partial(call, xl=xl, inputs=inputs, **settings or {}), branches
    )


for xl, prefix in ((False, "StableDiffusion"), (True, "StableDiffusionXL")):
    control = partial(controlnet, **XL_CONTROL if xl else {})
    size = ("size",) if xl else ()
    pipeline(f"{prefix}Pipeline", TEXT_TO_IMAGE, xl=xl)
    pipeline(f"{prefix}Img2ImgPipeline", IMAGE_TO_IMAGE, xl=xl)
    pipeline(f"{prefix}InpaintPipeline", INPAINT, xl=xl)
    pipeline(
        f"{prefix}InpaintPipeline",
        INPAINT,
        label=f"{prefix}InpaintPipeline (nine channels)",
        xl=xl,
        unet_changes={"in_channels": 9},
    )
    pipeline(
        f"{prefix}InstructPix2PixPipeline",
        ("image", "latents", *size),
        branches=3,
        xl=xl,
        unet_changes={"in_channels": 8},
        settings={"image_guidance_scale": 1.5},
    )
    pipeline(f"{prefix}ControlNetPipeline", ("control_as_image", "latents", "size"), xl=xl, controlnet=control)
    pipeline(f"{prefix}ControlNetImg2ImgPipeline", ("control", *IMAGE_TO_IMAGE), xl=xl, controlnet=control)
    pipeline(f"{prefix}ControlNetInpaintPipeline", ("control", *INPAINT), xl=xl, controlnet=control)
    pipeline(
        f"{prefix}ControlNetPipeline",
        ("two_controls", "latents", "size"),
        label=f"{prefix}ControlNetPipeline (two ControlNets)",
        xl=xl,
        controlnet=lambda control=control: [control(), control()],
        settings={"controlnet_conditioning_scale": [0.5, 1.0]},
    )
    pipeline(
        f"{prefix}ControlNetPipeline",
        ("control_as_image", "latents", "size"),
        label=f"{prefix}ControlNetPipeline (guess mode)",
        xl=xl,
        controlnet=control,
        settings={"guess_mode": True},
    )
    pipeline(f"{prefix}PAGPipeline", ("pag", *TEXT_TO_IMAGE), branches=3, xl=xl)
    pipeline(f"{prefix}PAGImg2ImgPipeline", ("pag", *IMAGE_TO_IMAGE), branches=3, xl=xl)
    pipeline(f"{prefix}PAGInpaintPipeline", ("pag", *INPAINT), branches=3, xl=xl)
    pipeline(
        f"{prefix}ControlNetPAGPipeline",
        ("pag", "control_as_image", "latents", "size"),
        branches=3,
        xl=xl,
        controlnet=control,
    )
    kind = {"adapter_type": "full_adapter_xl", "downscale_factor": 4} if xl else {"downscale_factor": 2}
    pipeline(
        f"{prefix}AdapterPipeline",
        ("control_as_image", "latents", "size"),
        xl=xl,
        adapter=partial(diffusers.T2IAdapter, channels=(8, 16), num_res_blocks=1, **kind),
    )
    register(
        f"{prefix}ControlNetXSPipeline",
        partial(build_xs, f"{prefix}ControlNetXSPipeline", xl),
        partial(call, xl=xl, inputs=("control_as_image", "latents", "size")),
    )

pipeline(
    "StableDiffusionControlNetPAGInpaintPipeline",
    ("pag", "control", *INPAINT),
    branches=3,
    controlnet=controlnet,
)
pipeline(
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    ("pag", "control", *IMAGE_TO_IMAGE),
    branches=3,
    xl=True,
    controlnet=partial(controlnet, **XL_CONTROL),
)
pipeline(
    "StableDiffusionPAGPipeline",
    TEXT_TO_IMAGE,
    label="StableDiffusionPAGPipeline (scale 0)",
    settings={"pag_scale": 0.0},
)
for variant, given in (
    ("", ("union", "latents", "size")),
    ("Img2Img", ("union", *IMAGE_TO_IMAGE)),
    ("Inpaint", ("union", *INPAINT)),
):
    pipeline(
        f"StableDiffusionXLControlNetUnion{variant}Pipeline",
        given,
        xl=True,
        controlnet=partial(union, **XL_CONTROL),
    )
pipeline("StableDiffusionDepth2ImgPipeline", ("depth", *IMAGE_TO_IMAGE), unet_changes={"in_channels": 5})
pipeline(
    "StableDiffusionUpscalePipeline",
    ("low_resolution", "latents", "noise"),
    unet_changes={"in_channels": 7, "num_class_embeds": 1000},
    low_res_scheduler=diffusers.DDPMScheduler,
    settings={"noise_level": 20},
)
for variant, given in (("", (*TEXT_TO_IMAGE, "noise")), ("Img2Img", IMAGE_TO_IMAGE)):
    pipeline(
        f"LatentConsistencyModel{variant}Pipeline",
        given,
        branches=1,
        scheduler=diffusers.LCMScheduler,
        unet_changes={"time_cond_proj_dim": 8},
        settings={"negative": False},
    )


def one_block():
    """Stable Diffusion whose UNet has one block down and one up, since compilers take long; and a call of it."""
    changes = {
        "block_out_channels": (8,),
        "transformer_layers_per_block": 2,
        "down_block_types": ("CrossAttnDownBlock2D",),
        "mid_block_type": None,
        "up_block_types": ("UpBlock2D",),
    }
    pipe = seeded(partial(build, "StableDiffusionPipeline", unet_changes=changes))
    return pipe, call([0], inputs=TEXT_TO_IMAGE)


def upscale_call(pictures):
    kwargs = call(pictures, xl=True, inputs=("latents",))
    return kwargs | {"image": of_pictures(pictures, 4, SIZE // 4, SIZE // 4, kind=9)}


register(
    "StableDiffusionLatentUpscalePipeline",
    partial(
        build,
        "StableDiffusionLatentUpscalePipeline",
        unet_changes={"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 2 * 64 + 10},
        scheduler=diffusers.EulerDiscreteScheduler,
    ),
    upscale_call,
)
