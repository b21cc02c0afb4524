"""Older pipelines: DeepFloyd IF, Kandinsky 2, unCLIP, Wuerstchen and others, many of them deprecated by diffusers."""

import warnings
from functools import partial, wraps
from string import ascii_lowercase

import torch
from at_hand import diffusers, transformers
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from diffusers.pipelines.stable_diffusion.clip_image_project_model import CLIPImageProjection
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from zoo import STEPS, generators, images, of_pictures, register, wake
from zoo_motion import FRAMES, LETTERS, motion_adapter, tokenizer, vision, vocoder
from zoo_transformers import MeanEncoder, build, call, noise, pipeline
from zoo_unets import SIZE, TOKENS, WIDTH, controlnet, scheduler, text, unet, vae


ONE_PICTURE_ONLY = {
    "AmusedImg2ImgPipeline",  # draws the tokens of a whole batch with one generator
    "AmusedInpaintPipeline",  # likewise
    "AmusedPipeline",  # likewise
    "CycleDiffusionPipeline",  # gives its denoiser the first picture of a batch alone
    "RePaintPipeline",  # draws the noise of a whole batch with the first picture's generator
    "VQDiffusionPipeline",  # as aMUSEd
    "WuerstchenCombinedPipeline",  # as its decoder
    "WuerstchenDecoderPipeline",  # repeats each prompt for every picture of the batch
}


def words(pictures):
    """For classes that take no embeddings; the negative prompt is the shorter."""
    letters = [ascii_lowercase[picture] for picture in pictures]
    return {
        "prompt": [f"{letter} cat" for letter in letters],
        "negative_prompt": [f"{letter} no" for letter in letters],
    }


def prompt(pictures):
    """For classes whose negative prompt is always empty."""
    return {"prompt": words(pictures)["prompt"]}


def text_encoder(cls=transformers.CLIPTextModel, width=WIDTH):
    config = transformers.CLIPTextConfig(
        vocab_size=len(LETTERS),
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return cls(config)


def image(size):
    return lambda pictures: {"image": images(pictures, size, size)}


def mask(size):
    return lambda pictures: {"mask_image": (of_pictures(pictures, 1, size, size, kind=5) > 0).float()}


# DeepFloyd IF: in pixels; the network predicts a variance too

SIMPLE = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "resnet_time_scale_shift": "scale_shift",
}
IF_SIZES = SIMPLE | {
    "in_channels": 3,
    "out_channels": 6,
    "cross_attention_dim": 32,  # the norm before cross-attention has as many groups
    "cross_attention_norm": "group_norm",
    "encoder_hid_dim": WIDTH,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 2,
    "act_fn": "gelu",
}


def if_scheduler():
    return diffusers.DDPMScheduler(
        variance_type="learned_range", thresholding=True, dynamic_thresholding_ratio=0.95, sample_max_value=1.0
    )


IF = {"unet": partial(unet, **IF_SIZES), "scheduler": if_scheduler}
IF_LARGER = {
    "unet": partial(unet, **IF_SIZES | {"in_channels": 6, "class_embed_type": "timestep"}),
    "scheduler": if_scheduler,
    "image_noising_scheduler": diffusers.DDPMScheduler,
}


def original(pictures):
    return {"original_image": images(pictures, 8, 8, kind=51)}


deep_floyd = partial(pipeline, output_type="pt")
deep_floyd("IFPipeline", IF, text, noise)
deep_floyd("IFImg2ImgPipeline", IF, text, noise, image(8), strength=1.0)
deep_floyd("IFInpaintingPipeline", IF, text, noise, image(8), mask(8), strength=1.0)
deep_floyd("IFSuperResolutionPipeline", IF_LARGER, text, noise, image(4), height=8, width=8)
deep_floyd("IFImg2ImgSuperResolutionPipeline", IF_LARGER, text, noise, image(4), original, strength=1.0)
deep_floyd("IFInpaintingSuperResolutionPipeline", IF_LARGER, text, noise, image(4), original, mask(8), strength=1.0)


# Kandinsky 2.1 and 2.2: a prior makes an embedding of a picture, which the UNet attends to or is told


def movq():
    return diffusers.VQModel(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        num_vq_embeddings=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def multilingual():
    config = MCLIPConfig(
        vocab_size=len(LETTERS),
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=80,  # the pipelines fill a text up to 77 tokens
        pad_token_id=1,
        transformerDimSize=WIDTH,
        imageDimSize=WIDTH,
    )
    return MultilingualCLIP(config)


def kandinsky_scheduler():
    return diffusers.DDIMScheduler(
        beta_schedule="linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


KANDINSKY_SIZES = SIMPLE | {"out_channels": 8, "encoder_hid_dim": WIDTH}
KANDINSKY = {
    "unet": partial(unet, **KANDINSKY_SIZES, addition_embed_type="text_image", encoder_hid_dim_type="text_image_proj"),
    "scheduler": kandinsky_scheduler,
    "movq": movq,
    "text_encoder": multilingual,
    "tokenizer": tokenizer,
}
KANDINSKY_22_SIZES = KANDINSKY_SIZES | {"addition_embed_type": "image", "encoder_hid_dim_type": "image_proj"}
KANDINSKY_22 = {"unet": partial(unet, **KANDINSKY_22_SIZES), "scheduler": kandinsky_scheduler, "movq": movq}
NINE = {"in_channels": 9}
HINT = {"in_channels": 8, "addition_embed_type": "image_hint"}


def embeds_of_image(pictures):
    return {
        "image_embeds": of_pictures(pictures, WIDTH, kind=3),
        "negative_image_embeds": of_pictures(pictures, WIDTH, kind=4),
    }


def tensors(pictures):
    """As a list; a tensor would be taken for a picture."""
    return {"image": list(images(pictures, SIZE, SIZE).split(1))}


def hint(pictures):
    return {"hint": images(pictures, 8 * SIZE // 2, 8 * SIZE // 2, kind=7)}


def same_image(pictures):
    """One for all prompts: the pipeline pastes the first picture into all."""
    return {"image": images([0], SIZE, SIZE).expand(len(pictures), -1, -1, -1) * 2 - 1} | {
        "mask_image": (of_pictures([0], 1, SIZE, SIZE, kind=5) > 0).float().expand(len(pictures), -1, -1, -1).clone()
    }


kandinsky = partial(pipeline, height=SIZE, width=SIZE, output_type="pt")
kandinsky_22 = partial(kandinsky, output_type="latent")
square = (4, SIZE // 2, SIZE // 2)
kandinsky("KandinskyPipeline", KANDINSKY, words, embeds_of_image, noise, latents=square)
kandinsky("KandinskyImg2ImgPipeline", KANDINSKY, words, embeds_of_image, noise, tensors, strength=1.0)
kandinsky(
    "KandinskyInpaintPipeline",
    KANDINSKY | {"unet": partial(KANDINSKY["unet"], **NINE)},
    words,
    embeds_of_image,
    noise,
    image(SIZE),
    mask(SIZE),
    latents=square,
)
kandinsky_22("KandinskyV22Pipeline", KANDINSKY_22, embeds_of_image, noise, latents=square)
kandinsky_22("KandinskyV22Img2ImgPipeline", KANDINSKY_22, embeds_of_image, noise, tensors, strength=1.0)
kandinsky_22(
    "KandinskyV22InpaintPipeline",
    KANDINSKY_22 | {"unet": partial(unet, **KANDINSKY_22_SIZES | NINE)},
    embeds_of_image,
    noise,
    same_image,
    latents=square,
)
hinted = KANDINSKY_22 | {"unet": partial(unet, **KANDINSKY_22_SIZES | HINT)}
kandinsky("KandinskyV22ControlnetPipeline", hinted, embeds_of_image, noise, hint, latents=square)
kandinsky("KandinskyV22ControlnetImg2ImgPipeline", hinted, embeds_of_image, noise, hint, tensors, strength=1.0)


def prior(**changes):
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 4,
        "num_layers": 2,
        "embedding_dim": WIDTH,
        "num_embeddings": TOKENS,
    }
    return wake(diffusers.PriorTransformer(**config | changes))


def prior_scheduler():
    return diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
    )


PRIOR = {
    "prior": prior,
    "image_encoder": vision,
    "text_encoder": partial(text_encoder, transformers.CLIPTextModelWithProjection),
    "tokenizer": tokenizer,
    "scheduler": prior_scheduler,
}
WITH_PRIOR = {f"prior_{part}": made for part, made in PRIOR.items()}


def both_latents(pictures):
    """With a negative prompt the pipeline makes an embedding of it too, behind those of the prompts."""
    return {
        "latents": torch.cat([of_pictures(pictures, WIDTH, kind=kind) for kind in (0, 9)]),
        "generator": generators(pictures) + generators([100 + picture for picture in pictures]),
    }


def both_embeds(pictures):
    return {
        "image": torch.cat([of_pictures(pictures, WIDTH, kind=kind) for kind in (3, 4)]),
        "generator": both_latents(pictures)["generator"],
    }


pipeline("KandinskyPriorPipeline", PRIOR, words, both_latents, branches=4, output_type="pt")
pipeline(
    "KandinskyPriorPipeline",
    PRIOR,
    prompt,
    noise,
    label="KandinskyPriorPipeline (no negative prompt)",
    latents=(WIDTH,),
    output_type="pt",
)
pipeline("KandinskyV22PriorPipeline", PRIOR, words, both_latents, branches=4, output_type="pt")
pipeline("KandinskyV22PriorEmb2EmbPipeline", PRIOR, words, both_embeds, branches=4, output_type="pt", strength=1.0)

combined = partial(kandinsky, prior_num_inference_steps=STEPS, prior_guidance_scale=4.0)
combined("KandinskyCombinedPipeline", KANDINSKY | WITH_PRIOR, prompt, noise)
combined("KandinskyImg2ImgCombinedPipeline", KANDINSKY | WITH_PRIOR, prompt, noise, tensors, strength=1.0)
combined(
    "KandinskyInpaintCombinedPipeline",
    KANDINSKY | WITH_PRIOR | {"unet": partial(KANDINSKY["unet"], **NINE)},
    prompt,
    noise,
    image(SIZE),
    mask(SIZE),
)
combined_22 = partial(combined, output_type="latent")
no_callback = {"callback_steps": None}  # diffusers warns of its own default
combined_22("KandinskyV22CombinedPipeline", KANDINSKY_22 | WITH_PRIOR, prompt, noise, **no_callback)
combined_22(
    "KandinskyV22Img2ImgCombinedPipeline",
    KANDINSKY_22 | WITH_PRIOR,
    prompt,
    noise,
    tensors,
    strength=1.0,
    **no_callback,
)
combined_22(
    "KandinskyV22InpaintCombinedPipeline",
    KANDINSKY_22 | WITH_PRIOR | {"unet": partial(unet, **KANDINSKY_22_SIZES | NINE)},
    prompt,
    noise,
    same_image,
)


# unCLIP: Stable Diffusion that is told an embedding of a picture, and Karlo, which makes pictures in three loops

STABLE = {"vae": vae, "unet": unet, "scheduler": scheduler}
UNCLIP = STABLE | {
    "unet": partial(unet, class_embed_type="projection", projection_class_embeddings_input_dim=2 * WIDTH),
    "image_normalizer": partial(StableUnCLIPImageNormalizer, embedding_dim=WIDTH),
    "image_noising_scheduler": partial(diffusers.DDPMScheduler, beta_schedule="squaredcos_cap_v2"),
}


def ddpm_prior_scheduler():
    return diffusers.DDPMScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        clip_sample_range=5.0,
        beta_schedule="squaredcos_cap_v2",
    )


def embeds_alone(pictures):
    return {"image_embeds": of_pictures(pictures, WIDTH, kind=3)}


pipeline(
    "StableUnCLIPPipeline",
    UNCLIP
    | {
        "prior": prior,
        "prior_scheduler": ddpm_prior_scheduler,
        "prior_text_encoder": PRIOR["text_encoder"],
        "prior_tokenizer": tokenizer,
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
    },
    words,
    noise,
    latents=square,
    prior_num_inference_steps=STEPS,
)
pipeline(
    "StableUnCLIPImg2ImgPipeline",
    UNCLIP | {"image_encoder": vision},
    text,
    embeds_alone,
    noise,
    latents=square,
    noise_level=20,
)

UNCLIP_SIZES = SIMPLE | {"in_channels": 3, "out_channels": 6, "class_embed_type": "identity"}


def enlarger():
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        in_channels=6,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("ResnetDownsampleBlock2D",) * 2,
        up_block_types=("ResnetUpsampleBlock2D",) * 2,
    )


KARLO = {
    "decoder": partial(unet, **UNCLIP_SIZES),
    "text_encoder": partial(text_encoder, transformers.CLIPTextModelWithProjection),
    "tokenizer": tokenizer,
    "text_proj": lambda: wake(
        diffusers.pipelines.deprecated.unclip.UnCLIPTextProjModel(
            clip_embeddings_dim=WIDTH, time_embed_dim=4 * 8, cross_attention_dim=WIDTH
        )
    ),
    "super_res_first": enlarger,
    "super_res_last": enlarger,
    "decoder_scheduler": partial(diffusers.UnCLIPScheduler, variance_type="learned_range"),
    "super_res_scheduler": partial(diffusers.UnCLIPScheduler, variance_type="fixed_small_log"),
}


def gives_tensors(pipe):
    """For classes that give arrays or PIL's pictures alone: the arrays are made tensors, not pictures."""
    pipe.numpy_to_pil = torch.from_numpy
    return pipe


def tensor_class(name):
    """The class, but that its array is made a tensor, and that it does not warn of what diffusers has deprecated."""
    cls = getattr(diffusers, name)

    @wraps(cls.__call__)
    def call_it(self, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return (torch.from_numpy(cls.__call__(self, **kwargs)[0]),)

    return type(name, (cls,), {"__call__": call_it, "__module__": cls.__module__})


def call_karlo(pictures, *, inputs):
    given = {"decoder_num_inference_steps": STEPS, "super_res_num_inference_steps": STEPS, "output_type": "pil"}
    for inputs_of in inputs:
        given |= inputs_of(pictures)
    return given | noise(pictures) | {"decoder_guidance_scale": 5.0, "return_dict": False}


def prior_steps(_):
    return {"prior_num_inference_steps": STEPS, "prior_guidance_scale": 4.0}


def build_karlo(name, **more):
    return gives_tensors(build(name, **KARLO | more))


register(
    "UnCLIPPipeline",
    partial(build_karlo, "UnCLIPPipeline", prior=prior, prior_scheduler=prior_scheduler),
    partial(call_karlo, inputs=(prompt, prior_steps)),
)
register(
    "UnCLIPImageVariationPipeline",
    partial(build_karlo, "UnCLIPImageVariationPipeline", image_encoder=vision),
    partial(call_karlo, inputs=(lambda pictures: {"image_embeddings": of_pictures(pictures, WIDTH, kind=3)},)),
)


# Latent diffusion, the ancestor


def bert():
    config = LDMBertConfig(
        vocab_size=len(LETTERS),
        d_model=WIDTH,
        encoder_layers=1,
        encoder_ffn_dim=8,
        encoder_attention_heads=2,
        head_dim=4,
        max_position_embeddings=77,
        pad_token_id=1,
        init_std=1.0,  # large enough to show in the result
    )
    return LDMBertModel(config)


pipeline(
    "LDMTextToImagePipeline",
    {"vqvae": vae, "bert": bert, "tokenizer": tokenizer, "unet": unet, "scheduler": scheduler},
    prompt,
    latents=(4, 4, 4),
    height=32,
    width=32,
    output_type="pt",
    scale=20.0,
)


# Shap-E: a prior makes a shape's latents, in twice as many steps less one

SHAPE = {
    "scheduler": partial(
        diffusers.HeunDiscreteScheduler,
        beta_schedule="exp",
        num_train_timesteps=1024,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
        clip_sample_range=1.0,
    ),
}
SHAPE_SIZES = {
    "num_embeddings": 6,
    "embedding_dim": 8,
    "embedding_proj_dim": WIDTH,
    "clip_embed_dim": 2 * 8,
    "time_embed_dim": 16,
    "additional_embeddings": 0,
    "time_embed_act_fn": "gelu",
    "norm_in_type": "layer",
    "encoder_hid_proj_type": None,
    "added_emb_type": None,
}


def vision_without_projection():
    return transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=SIZE,
            patch_size=SIZE // 2,
        )
    )


pipeline(
    "ShapEPipeline",
    SHAPE
    | {
        "prior": partial(prior, **SHAPE_SIZES),
        "text_encoder": partial(text_encoder, transformers.CLIPTextModelWithProjection),
        "tokenizer": tokenizer,
    },
    prompt,
    latents=(6 * 8,),
)
pipeline(
    "ShapEImg2ImgPipeline",
    SHAPE
    | {
        "prior": partial(prior, **SHAPE_SIZES, embedding_proj_norm_type="layer"),
        "image_encoder": vision_without_projection,
    },
    image(SIZE),
    latents=(6 * 8,),
)


# Wuerstchen and Stable Cascade: `[positive, negative]`; a prior, then a decoder that is told what the prior made


CASCADE_SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "timestep_ratio_embedding_dim": 8,
    "conditioning_dim": 8,
    "block_out_channels": (8, 8),
    "down_num_layers_per_block": (1, 1),
    "up_num_layers_per_block": (1, 1),
    "clip_text_pooled_in_channels": WIDTH,
}
CASCADE_PRIOR = {
    "prior": lambda: wake(
        diffusers.StableCascadeUNet(
            **CASCADE_SIZES,
            num_attention_heads=(2, 2),
            switch_level=(False,),
            clip_text_in_channels=WIDTH,
            clip_image_in_channels=8,
        )
    ),
    "text_encoder": partial(text_encoder, transformers.CLIPTextModelWithProjection),
    "scheduler": diffusers.DDPMWuerstchenScheduler,
}
CASCADE_DECODER = {
    "decoder": lambda: wake(
        diffusers.StableCascadeUNet(
            **CASCADE_SIZES,
            num_attention_heads=(-1, 2),
            block_types_per_layer=(
                ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
                ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
            ),
            effnet_in_channels=4,
        )
    ),
    "scheduler": diffusers.DDPMWuerstchenScheduler,
}
WUERSTCHEN_PRIOR = {
    "prior": lambda: wake(
        diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior.WuerstchenPrior(
            c_in=4, c=8, c_cond=WIDTH, c_r=8, depth=2, nhead=2
        )
    ),
    "text_encoder": text_encoder,
    "scheduler": diffusers.DDPMWuerstchenScheduler,
}
WUERSTCHEN_DECODER = {
    "decoder": lambda: wake(
        diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext.WuerstchenDiffNeXt(
            c_cond=WIDTH,
            c_hidden=[8],
            c_r=8,
            nhead=[2],
            blocks=[2],
            level_config=["CTA"],
            inject_effnet=[True],
            effnet_embd=4,
            clip_embd=WIDTH,
        )
    ),
    "tokenizer": tokenizer,
    "text_encoder": text_encoder,
    "scheduler": diffusers.DDPMWuerstchenScheduler,
}


def pooled(pictures):
    return {
        "prompt_embeds_pooled": of_pictures(pictures, 1, WIDTH, kind=3),
        "negative_prompt_embeds_pooled": of_pictures(pictures, 1, WIDTH, kind=4),
    }


def from_prior(pictures):
    return {"image_embeddings": of_pictures(pictures, 4, 4, 4, kind=6)}


def build_both(name, prior_parts, decoder_parts):
    """Both together; the decoder's latents are twice as large as what the prior makes, not ten times."""
    pipe = build(name, **decoder_parts, **{f"prior_{part}": made for part, made in prior_parts.items()})
    pipe.decoder_pipe.register_to_config(latent_dim_scale=2.0)
    return pipe


def call_both(pictures, *, inputs):
    steps = {"prior_num_inference_steps": STEPS, "prior_guidance_scale": 5.0, "decoder_guidance_scale": 5.0}
    kwargs = call(pictures, (*inputs, noise), latents=(4, 4, 4), height=160, width=160, return_dict=True, **steps)
    del kwargs["guidance_scale"]
    return kwargs


prior_stage = partial(pipeline, latents=(4, 4, 4), height=160, width=160, output_type="pt")
decoder_stage = partial(pipeline, latents=(4, 8, 8), return_dict=True)  # without, it would be the bare latents
TWICE = {"latent_dim_scale": 2.0}
prior_stage("StableCascadePriorPipeline", CASCADE_PRIOR, text, pooled, noise)
decoder_stage("StableCascadeDecoderPipeline", CASCADE_DECODER | TWICE, text, pooled, from_prior, noise)
prior_stage("WuerstchenPriorPipeline", WUERSTCHEN_PRIOR, text, noise)
decoder_stage("WuerstchenDecoderPipeline", WUERSTCHEN_DECODER | TWICE, words, from_prior, noise)
for name, parts, inputs in (
    ("StableCascadeDecoderPipeline", CASCADE_DECODER, (text, pooled)),
    ("WuerstchenDecoderPipeline", WUERSTCHEN_DECODER, (words,)),
):
    decoder_stage(
        name,
        parts | TWICE,
        *inputs,
        from_prior,
        noise,
        label=f"{name} (without guidance)",  # which is their default
        branches=1,
        scale=0.0,
    )
register(
    "StableCascadeCombinedPipeline",
    partial(
        build_both,
        "StableCascadeCombinedPipeline",
        CASCADE_PRIOR,
        CASCADE_DECODER | {"text_encoder": CASCADE_PRIOR["text_encoder"]},
    ),
    partial(call_both, inputs=(text, pooled)),
)
register(
    "WuerstchenCombinedPipeline",
    partial(build_both, "WuerstchenCombinedPipeline", WUERSTCHEN_PRIOR | {"tokenizer": tokenizer}, WUERSTCHEN_DECODER),
    partial(call_both, inputs=(words,)),
)


# Built around Stable Diffusion's UNet

square_call = {"height": SIZE, "width": SIZE, "latents": square}
with_words = STABLE | {"text_encoder": text_encoder, "tokenizer": tokenizer}

pipeline("AltDiffusionPipeline", STABLE, text, **square_call)
pipeline("AltDiffusionImg2ImgPipeline", STABLE, text, noise, image(SIZE), strength=1.0)
pipeline("StableDiffusionModelEditingPipeline", STABLE, text, **square_call)


def build_legacy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it is deprecated
        return build("StableDiffusionInpaintPipelineLegacy", **STABLE)


call_legacy = partial(call, inputs=(text, noise, image(SIZE), mask(SIZE)), strength=1.0)
register("StableDiffusionInpaintPipelineLegacy", build_legacy, call_legacy)
register(  # to the kept part of the picture it adds what the negative branch predicts
    "StableDiffusionInpaintPipelineLegacy (adds predicted noise)",
    build_legacy,
    partial(call_legacy, add_predicted_noise=True),
)


def build_ldm3d():
    """Without the post-processing, which would make a picture and a depth of latents too."""
    pipe = build("StableDiffusionLDM3DPipeline", **STABLE)
    pipe.image_processor.postprocess = lambda latents, **settings: (latents, None)
    return pipe


def call_ldm3d(pictures):
    """Its output is in a dict: without one its first element would be a tuple."""
    return call(pictures, inputs=(text,), **square_call, return_dict=True)


register("StableDiffusionLDM3DPipeline", build_ldm3d, call_ldm3d)


def inverted(pictures):
    return {
        "mask_image": (of_pictures(pictures, 1, SIZE // 2, SIZE // 2, kind=5) > 0).float(),
        "image_latents": of_pictures(pictures, STEPS, *square, kind=6),
    }


pipeline("StableDiffusionDiffEditPipeline", STABLE, text, inverted, inpaint_strength=1.0)


def source(pictures):
    return prompt(pictures) | {"source_prompt": [f"{ascii_lowercase[picture]} dog" for picture in pictures]}


pipeline(
    "CycleDiffusionPipeline",
    with_words | {"scheduler": kandinsky_scheduler},  # at another's last step there is no variance to divide by
    source,
    noise,
    image(SIZE),
    branches=4,
    strength=1.0,
    source_guidance_scale=3.0,
)


def edits(_):
    return {"editing_prompt": ["hat", "x"], "edit_guidance_scale": [5.0, 4.0], "edit_warmup_steps": 1}


pipeline("SemanticStableDiffusionPipeline", with_words, words, edits, branches=4, edit_threshold=0.5, **square_call)
pipeline(
    "SemanticStableDiffusionPipeline",
    with_words,
    words,
    label="SemanticStableDiffusionPipeline (without edits)",
    **square_call,
)


def build_safe():
    """Gives the latents, because diffusers warns of its way to decode them."""
    pipe = build("StableDiffusionPipelineSafe", **with_words)
    pipe.decode_latents = lambda latents: latents
    return pipe


register(
    "StableDiffusionPipelineSafe",
    build_safe,
    partial(call, inputs=(words,), sld_warmup_steps=1, **square_call),
    branches=3,
)


class Pixels:
    """What an image encoder is given: the pictures as they are, and grey for a class's own empty picture."""

    def __init__(self):
        self.crop_size = {"width": SIZE, "height": SIZE}

    def __call__(self, images, **settings):
        grey = torch.full((3, SIZE, SIZE), 0.5)
        pixels = [one if torch.is_tensor(one) else grey for one in images]
        return transformers.BatchFeature({"pixel_values": torch.stack(pixels)})


def boxes(_):
    """Of all pictures of a batch."""
    return {
        "gligen_phrases": ["a dog", "hat"],
        "gligen_images": list(images([0, 1], SIZE, SIZE, kind=8)),
        "gligen_boxes": [[0.1, 0.2, 0.5, 0.7], [0.4, 0.0, 0.9, 0.4]],
    }


pipeline(
    "StableDiffusionGLIGENTextImagePipeline",
    with_words
    | {
        "unet": lambda: wake(unet(attention_type="gated-text-image"), std=0.5),
        "processor": Pixels,
        "image_encoder": vision,
        "image_project": partial(CLIPImageProjection, hidden_size=WIDTH),
    },
    text,
    boxes,
    branches=4,
    **square_call,
)


def example_encoder():
    config = transformers.CLIPVisionConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,  # the mapper behind them has a layer then
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=SIZE // 2,
    )
    return diffusers.pipelines.deprecated.paint_by_example.PaintByExampleImageEncoder(config, proj_size=WIDTH)


def example(pictures):
    return {
        "example_image": images(pictures, SIZE, SIZE, kind=8),
        "image": images(pictures, SIZE, SIZE) * 2 - 1,
    }


pipeline(
    "PaintByExamplePipeline",
    STABLE | {"unet": partial(unet, in_channels=9), "image_encoder": example_encoder},
    example,
    mask(SIZE),
    noise,
    **square_call,
)


# BLIP-Diffusion: a subject's queries stand among the words


class Subject(diffusers.ModelMixin, ConfigMixin):
    """Queries of a picture; in place of the BLIP-2 that makes them of the picture and its name."""

    @register_to_config
    def __init__(self, num_query_tokens=2):
        super().__init__()
        self.queries = torch.nn.Linear(3 * SIZE * SIZE, num_query_tokens * WIDTH)

    def forward(self, image_input, text_input, return_dict):
        return self.queries(image_input.flatten(1)).unflatten(1, (-1, WIDTH))


class WithQueries(diffusers.ModelMixin):
    """CLIP's text encoder, and where the queries are put among its words."""

    def __init__(self):
        super().__init__()
        self.text_model = text_encoder()

    def forward(self, input_ids, ctx_embeddings, ctx_begin_pos=None):
        words = self.text_model(input_ids)[0]
        if ctx_embeddings is None:
            return (words,)
        where = ctx_begin_pos[0]
        return (torch.cat([words[:, :where], ctx_embeddings, words[:, where:]], dim=1),)


class Unprocessed:
    def preprocess(self, image, **settings):
        return {"pixel_values": image}

    def postprocess(self, image, output_type):
        return image


BLIP = with_words | {"text_encoder": WithQueries, "qformer": Subject, "image_processor": Unprocessed}


def subject(pictures):
    letters = [ascii_lowercase[picture] for picture in pictures]
    return {
        "prompt": ["cat"] * len(letters),
        "neg_prompt": "no",
        "source_subject_category": letters,
        "target_subject_category": letters,
        "reference_image": images(pictures, SIZE, SIZE),
    }


def conditioning(pictures):
    return {"condtioning_image": images(pictures, SIZE, SIZE, kind=7)}


blip = partial(pipeline, output_type="pt", **square_call)
blip("BlipDiffusionPipeline", BLIP, subject)
blip("BlipDiffusionControlNetPipeline", BLIP | {"controlnet": controlnet}, subject, conditioning)


# Videos of a picture


def mean_vae():
    """Encodes a picture always to the same latents; the pipeline draws them without a generator."""
    return MeanEncoder.from_config(vae().config)


def i2vgen_unet():
    return wake(
        diffusers.I2VGenXLUNet(
            sample_size=SIZE // 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
            attention_head_dim=4,
            num_attention_heads=None,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        )
    )


video_call = {"height": SIZE, "width": SIZE, "num_frames": FRAMES, "latents": (4, FRAMES, SIZE // 2, SIZE // 2)}
pipeline(
    "I2VGenXLPipeline",
    STABLE | {"vae": mean_vae, "unet": i2vgen_unet, "image_encoder": vision, "feature_extractor": Pixels},
    text,
    image(SIZE),
    **video_call,
)
pipeline(
    "PIAPipeline",
    STABLE | {"unet": partial(unet, in_channels=9), "motion_adapter": motion_adapter},
    text,
    image(SIZE),
    noise,
    strength=1.0,
    **video_call,
)


# Sound: the text is a class label, and what is called cross-attention attends to the sound itself


def clap():
    config = transformers.ClapTextConfig(
        vocab_size=4, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1, projection_dim=4
    )
    return transformers.ClapTextModelWithProjection(config)


SOUND = {
    "vae": lambda: diffusers.AutoencoderKL.from_config(vae().config, in_channels=1, out_channels=1),
    "unet": partial(
        unet,
        cross_attention_dim=(8, 16),
        class_embed_type="simple_projection",
        class_embeddings_concat=True,
        projection_class_embeddings_input_dim=WIDTH,
    ),
    "scheduler": scheduler,
    "text_encoder": clap,  # asked for its dtype alone
    "vocoder": vocoder,
}


def embeds_of_sound(pictures):
    return {
        "prompt_embeds": of_pictures(pictures, WIDTH, kind=1),
        "negative_prompt_embeds": of_pictures(pictures, WIDTH, kind=2),
    }


pipeline("AudioLDMPipeline", SOUND, embeds_of_sound, latents=square, output_type="pt")
pipeline("MusicLDMPipeline", SOUND, embeds_of_sound, latents=square)


# UniDiffuser: a call for the prompt, and then one for noise in its place


def unidiffuser():
    return wake(
        diffusers.pipelines.deprecated.unidiffuser.UniDiffuserModel(
            text_dim=WIDTH,
            clip_img_dim=WIDTH,
            num_text_tokens=TOKENS,
            num_attention_heads=2,
            attention_head_dim=4,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            norm_num_groups=4,
            sample_size=SIZE // 2,
            patch_size=2,
            activation_fn="gelu",
            num_embeds_ada_norm=1000,
        )
    )


def text_decoder():
    return diffusers.pipelines.deprecated.unidiffuser.UniDiffuserTextDecoder(
        prefix_length=TOKENS,
        prefix_inner_dim=WIDTH,
        prefix_hidden_dim=WIDTH,
        vocab_size=8,  # more than the beams of its search
        n_positions=TOKENS + 67,  # the words that it writes
        n_embd=4,
        n_layer=1,
        n_head=1,
    )


def clip_latents(pictures):
    return {"clip_latents": of_pictures(pictures, 1, WIDTH, kind=3), "vae_latents": of_pictures(pictures, *square)}


class NoWords:
    """In place of the tokenizer that turns what the pipeline has made into words."""

    eos_token_id = 0

    def decode(self, tokens, **settings):
        return ""


UNIDIFFUSER = {
    "vae": vae,
    "text_encoder": text_encoder,
    "image_encoder": vision,
    "text_decoder": text_decoder,
    "text_tokenizer": NoWords,
    "unet": unidiffuser,
    "scheduler": scheduler,
}


def prompt_latents(pictures):
    return clip_latents(pictures) | {"prompt_latents": of_pictures(pictures, TOKENS, WIDTH, kind=1)}


diffuser = partial(pipeline, "UniDiffuserPipeline", UNIDIFFUSER)
diffuser(text, clip_latents, noise, height=SIZE, width=SIZE)  # the negative prompt is not used
diffuser(  # a picture and its text: noise in place of either
    prompt_latents,
    noise,
    label="UniDiffuserPipeline (joint)",
    branches=3,
    height=SIZE,
    width=SIZE,
)


# Versatile Diffusion: a UNet for pictures, which is lent the attention of another for texts


ATTENDING = {
    "sample_size": SIZE // 2,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": WIDTH,
}
VERSATILE = {
    "vae": vae,
    "scheduler": scheduler,
    "image_unet": partial(
        diffusers.UNet2DConditionModel,
        **ATTENDING,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ),
}
VERSATILE_TEXT = {
    "text_encoder": PRIOR["text_encoder"],
    "tokenizer": tokenizer,
    "text_unet": partial(
        diffusers.pipelines.deprecated.versatile_diffusion.modeling_text_unet.UNetFlatConditionModel,
        **ATTENDING,
        down_block_types=("CrossAttnDownBlockFlat", "DownBlockFlat"),
        up_block_types=("UpBlockFlat", "CrossAttnUpBlockFlat"),
    ),
}
VERSATILE_IMAGE = {"image_encoder": vision, "image_feature_extractor": Pixels}


def image_list(pictures):
    return {"image": list(images(pictures, SIZE, SIZE))}


def other_image_list(pictures):
    return {"negative_prompt": list(images(pictures, SIZE, SIZE, kind=8))}


pipeline("VersatileDiffusionTextToImagePipeline", VERSATILE | VERSATILE_TEXT, words, **square_call)
pipeline(
    "VersatileDiffusionImageVariationPipeline",
    VERSATILE | VERSATILE_IMAGE,
    image_list,
    other_image_list,
    **square_call,
)


# Tokens in place of latents: VQ-Diffusion and aMUSEd


def one_noise(pictures):
    return {"generator": generators(pictures)[0]}


CODES = 12


def codes():
    return diffusers.VQModel(
        block_out_channels=(4, 8),
        norm_num_groups=2,
        latent_channels=4,
        num_vq_embeddings=CODES,
        vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


def transformer():
    return wake(
        diffusers.Transformer2DModel(
            num_attention_heads=2,
            attention_head_dim=4,
            num_layers=2,
            cross_attention_dim=WIDTH,
            attention_bias=True,
            num_vector_embeds=CODES,
            num_embeds_ada_norm=STEPS,
            norm_type="ada_norm",
            norm_num_groups=4,
            sample_size=SIZE // 2,
            activation_fn="geglu-approximate",
        )
    )


def build_vq():
    return tensor_class("VQDiffusionPipeline")(
        vqvae=codes(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        transformer=transformer(),
        scheduler=diffusers.VQDiffusionScheduler(num_vec_classes=CODES),
        learned_classifier_free_sampling_embeddings=wake(
            diffusers.pipelines.deprecated.vq_diffusion.LearnedClassifierFreeSamplingEmbeddings(
                learnable=True, hidden_size=WIDTH, length=TOKENS
            ),
            std=1.0,
        ),
    )


BOLD = 20.0  # a scale at which small changes are not lost in tokens
register("VQDiffusionPipeline", build_vq, partial(call, inputs=(prompt, one_noise), output_type="np", scale=BOLD))

AMUSED = {
    "vqvae": codes,
    "transformer": lambda: wake(
        diffusers.UVit2DModel(
            hidden_size=8,
            cond_embed_dim=WIDTH,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=WIDTH,
            vocab_size=CODES + 1,
            codebook_size=CODES,
            in_channels=8,
            block_out_channels=8,
            num_res_blocks=1,
            block_num_heads=2,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
            sample_size=SIZE // 2,
        )
    ),
    "scheduler": partial(diffusers.AmusedScheduler, mask_token_id=CODES),
}


def hidden_states(pictures):
    """Here the embeds are the pooled ones."""
    return embeds_of_sound(pictures) | {
        "encoder_hidden_states": of_pictures(pictures, TOKENS, WIDTH, kind=3),
        "negative_encoder_hidden_states": of_pictures(pictures, TOKENS, WIDTH, kind=4),
    }


amused = partial(pipeline, scale=BOLD)
amused("AmusedPipeline", AMUSED, hidden_states, one_noise, height=SIZE, width=SIZE)
# at a strength of 1 there are as few unknown tokens as before the last step
amused("AmusedImg2ImgPipeline", AMUSED, hidden_states, one_noise, image(SIZE), strength=0.75)
amused("AmusedInpaintPipeline", AMUSED, hidden_states, one_noise, image(SIZE), mask(SIZE), strength=1.0)


# Without a text: what they are given is noise, a class or a picture


def plain_unet(**changes):
    config = {
        "sample_size": SIZE // 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D"),
    }
    return diffusers.UNet2DModel(**config | changes)


def sound_unet():
    return diffusers.UNet1DModel(
        sample_size=32,
        sample_rate=32,
        block_out_channels=(32, 32, 64),  # a head of its attention has 32
        extra_in_channels=2 * 32,  # those of the timestep
        flip_sin_to_cos=True,
        use_timestep_embedding=False,
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )


def call_plain(pictures, *, inputs=(noise,), size=True, **settings):
    given = {"num_inference_steps": STEPS, "return_dict": False} | settings
    if size:
        given["batch_size"] = len(pictures)
    for inputs_of in inputs:
        given |= inputs_of(pictures)
    return given


def build_plain(name, unet=plain_unet, **components):
    return gives_tensors(build(name, unet=unet, **components))


def build_sound():
    return tensor_class("DanceDiffusionPipeline")(unet=sound_unet(), scheduler=diffusers.IPNDMScheduler())


def build_repaint():
    return tensor_class("RePaintPipeline")(unet=plain_unet(), scheduler=diffusers.RePaintScheduler())


def three_channels():
    return diffusers.VQModel.from_config(movq().config, latent_channels=3)


def repainted(pictures):
    return {
        "image": images(pictures, SIZE // 2, SIZE // 2) * 2 - 1,
        "mask_image": (of_pictures(pictures, 1, SIZE // 2, SIZE // 2, kind=5) > 0).float(),
    }


def labels(pictures):
    return {"class_labels": [picture % 10 for picture in pictures]}


def plain(name, scheduler, *, branches=1, parts=None, **settings):
    build_it = partial(build_plain, name, scheduler=scheduler, **parts or {})
    register(name, build_it, partial(call_plain, **{"output_type": "pil"} | settings), branches)


plain("DDIMPipeline", diffusers.DDIMScheduler)
plain("DDPMPipeline", diffusers.DDPMScheduler)
plain("PNDMPipeline", partial(diffusers.PNDMScheduler, skip_prk_steps=True))
plain("KarrasVePipeline", diffusers.KarrasVeScheduler, branches=2)  # in the last step it is called once
plain("ScoreSdeVePipeline", diffusers.ScoreSdeVeScheduler, branches=2)
plain(
    "LDMPipeline",
    diffusers.DDIMScheduler,
    parts={"vqvae": movq, "unet": partial(plain_unet, in_channels=4, out_channels=4)},
)
plain(
    "ConsistencyModelPipeline",
    diffusers.CMStochasticIterativeScheduler,
    parts={"unet": partial(plain_unet, num_class_embeds=10)},
    inputs=(noise, labels),
    timesteps=[39, 26, 13, 0],
    output_type="pt",
)
plain(
    "LDMSuperResolutionPipeline",
    diffusers.DDIMScheduler,
    parts={"vqvae": three_channels, "unet": partial(plain_unet, in_channels=6)},
    inputs=(noise, image(SIZE // 2)),
)
register(
    "RePaintPipeline",
    build_repaint,
    partial(call_plain, inputs=(noise, repainted), size=False, jump_length=1, jump_n_sample=1, output_type="np"),
    branches=1,
)
register("DanceDiffusionPipeline", build_sound, call_plain, branches=1)
