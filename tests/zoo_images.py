"""Tiny pipelines whose transformer attends to text and picture together, newer ones of sound, and some of neither."""

from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import torch
from at_hand import diffusers, transformers
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from PIL import Image
from zoo import STEPS, generators, images, of_pictures, register, wake
from zoo_transformers import (
    CHANNELS,
    HEADS,
    WIDTH,
    build,
    call,
    control_image,
    ddim,
    mean_encoder,
    noise,
    pipeline,
    text,
    wan_vae,
)


# Pipelines that do not run on a batch of two, with the reason.
ONE_PICTURE_ONLY = {}

TOKENS = 5  # of the prompt
FEWER = 3  # of the negative prompt, where it may have a length of its own
PACKED = 4 * CHANNELS  # a token is a square of four latents
flow = diffusers.FlowMatchEulerDiscreteScheduler
# from where the picture that is given is still seen
SEEN = {"sigmas": [0.8, 0.6, 0.4, 0.2], "strength": 1.0}


def plain_text(pictures, fewer=FEWER):
    """Embeddings of the prompt and of the shorter negative prompt, without masks."""
    return {
        "prompt_embeds": of_pictures(pictures, TOKENS, WIDTH, kind=1),
        "negative_prompt_embeds": of_pictures(pictures, fewer, WIDTH, kind=2),
    }


same_length = partial(plain_text, fewer=TOKENS)


def masked_text(pictures):
    """As `text`, with the names of the newer pipelines."""
    return text(pictures, masks=("prompt_embeds_mask", "negative_prompt_embeds_mask"))


# Z-Image: its network takes lists, and pads a text to 32 tokens

LONG = 34  # tokens that fill more than that


def text_list(pictures):
    return {
        "prompt_embeds": list(of_pictures(pictures, TOKENS, WIDTH, kind=1)),
        "negative_prompt_embeds": list(of_pictures(pictures, LONG, WIDTH, kind=2)),
    }


def nested_list(pictures):
    """A text is cut where pictures would stand in it; here is none."""
    return {name: [[one] for one in ones] for name, ones in text_list(pictures).items()}


Z_IMAGE_SIZES = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 2}
z_image = partial(
    diffusers.ZImageTransformer2DModel,
    **Z_IMAGE_SIZES,
    in_channels=CHANNELS,
    n_layers=2,
    cap_feat_dim=WIDTH,
    axes_dims=[2, 2, 4],
    axes_lens=[256, 16, 16],
)


def z_image_controlnet(channels):
    return diffusers.ZImageControlNetModel(
        **Z_IMAGE_SIZES,
        control_layers_places=[0, 1],
        control_refiner_layers_places=[0, 1],
        control_in_dim=channels,
        add_control_noise_refiner="control_noise_refiner",
    )


def z_image_vae():
    vae = mean_encoder()
    vae.register_to_config(shift_factor=0.1)
    return vae


def picture(pictures):
    return {"image": images(pictures, 32, 32)}


def half_mask(pictures):
    """What is new in the picture: the right half."""
    mask = torch.zeros(len(pictures), 1, 32, 32)
    mask[..., 16:] = 1.0
    return {"mask_image": mask}


def photos(pictures, size):
    pixels = (255 * images(pictures, size, size)).byte().permute(0, 2, 3, 1)
    return [Image.fromarray(one.numpy()) for one in pixels]


class PicturePreparer:
    """Means of a picture's quarters."""

    def __call__(self, images, return_tensors):
        pixels = torch.tensor(np.array(images[0])).float().permute(2, 0, 1) / 255
        quarters = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1).T
        return transformers.BatchFeature({"pixel_values": quarters[None], "spatial_shapes": torch.tensor([[2, 2]])})


class PictureEncoder(torch.nn.Module):
    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, WIDTH)

    def forward(self, pixel_values, spatial_shapes):
        return SimpleNamespace(last_hidden_state=self.linear(pixel_values))


Z_IMAGE = {"transformer": z_image, "scheduler": flow}
Z_IMAGE_VAE = Z_IMAGE | {"vae": z_image_vae}
in_32 = {"latents": (CHANNELS, 4, 4), "height": 32, "width": 32}
pipeline("ZImagePipeline", Z_IMAGE, text_list, **in_32)
pipeline(
    "ZImagePipeline",
    Z_IMAGE,
    text_list,
    label="ZImagePipeline (normalised)",
    cfg_normalization=1.0,
    **in_32,
)
pipeline(
    "ZImagePipeline",
    Z_IMAGE,
    text_list,
    label="ZImagePipeline (truncated)",
    cfg_truncation=0.5,  # without guidance from there on
    **in_32,
)
pipeline("ZImageImg2ImgPipeline", Z_IMAGE_VAE, text_list, picture, noise, **SEEN)
pipeline("ZImageInpaintPipeline", Z_IMAGE_VAE, text_list, picture, half_mask, noise, **SEEN)
pipeline(
    "ZImagePipeline",
    Z_IMAGE,
    text_list,
    label="ZImagePipeline (without guidance)",
    branches=1,
    scale=0.0,  # as the distilled one is called
    **in_32,
)
pipeline("ZImageOmniPipeline", Z_IMAGE, nested_list, **in_32)
pipeline(
    "ZImageOmniPipeline",
    {
        "transformer": partial(z_image, siglip_feat_dim=WIDTH),
        "vae": lambda: z_image_vae().bfloat16(),  # the pipeline gives it that
        "siglip": PictureEncoder,
        "siglip_processor": PicturePreparer,
        "scheduler": flow,
    },
    lambda pictures: {name: [3 * one for one in ones] for name, ones in nested_list(pictures).items()},
    lambda _: {"image": photos([0], 64)},  # one for all prompts
    label="ZImageOmniPipeline (picture)",
    **in_32,
)
pipeline(
    "ZImageControlNetPipeline",
    Z_IMAGE_VAE | {"controlnet": partial(z_image_controlnet, CHANNELS)},
    text_list,
    control_image(32),
    **in_32,
)
pipeline(
    "ZImageControlNetInpaintPipeline",
    Z_IMAGE_VAE | {"controlnet": partial(z_image_controlnet, 2 * CHANNELS + 1)},
    text_list,
    picture,
    half_mask,
    control_image(32),
    **in_32,
)


# CogView: 3 in one batch, 4 in a call for each text

COGVIEW_SIZES = {
    **HEADS,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_layers": 2,
    "text_embed_dim": WIDTH,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
    "sample_size": 4,
}
cogview_4 = partial(diffusers.CogView4Transformer2DModel, **COGVIEW_SIZES, rope_axes_dim=(8, 8))
pipeline(
    "CogView3PlusPipeline",
    {"transformer": partial(diffusers.CogView3PlusTransformer2DModel, **COGVIEW_SIZES), "scheduler": ddim},
    same_length,  # the embeddings of a negative prompt are replaced with zeros
    **in_32,
)
pipeline("CogView4Pipeline", {"transformer": cogview_4, "scheduler": flow}, plain_text, **in_32)
pipeline(
    "CogView4ControlPipeline",
    {"transformer": partial(cogview_4, in_channels=2 * CHANNELS), "vae": mean_encoder, "scheduler": flow},
    same_length,
    control_image(32),
    **in_32,
)


# Lumina 2: what guidance makes is as long as what the prompt alone makes

LUMINA = {
    "transformer": partial(
        diffusers.Lumina2Transformer2DModel,
        sample_size=4,
        in_channels=CHANNELS,
        hidden_size=16,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(2, 2, 4),
        axes_lens=(16, 8, 8),
        cap_feat_dim=WIDTH,
    ),
    "scheduler": flow,
}
pipeline("Lumina2Pipeline", LUMINA, text, **in_32)
pipeline("Lumina2Pipeline", LUMINA, text, label="Lumina2Pipeline (truncated)", cfg_trunc_ratio=0.5, **in_32)


# Ovis-Image, Krea 2, LongCat-Image, NucleusMoE-Image: latents in a row, a call for each text

in_row = {"latents": (4, PACKED), "height": 32, "width": 32}
IN_ROW = {"in_channels": PACKED, "num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
pipeline(
    "OvisImagePipeline",
    {
        "transformer": partial(
            diffusers.OvisImageTransformer2DModel,
            **IN_ROW,
            out_channels=PACKED,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=WIDTH,
        ),
        "scheduler": flow,
    },
    plain_text,
    negative_prompt=None,
    **in_row,
)


def layered_text(pictures):
    """Each token as two layers of the text encoder know it; the negative prompt is masked, not shorter."""
    given = masked_text(pictures)
    for number, name in enumerate(("prompt_embeds", "negative_prompt_embeds")):
        given[name] = of_pictures(pictures, TOKENS, 2, WIDTH, kind=1 + number)
        given[f"{name}_mask"] = given[f"{name}_mask"].bool()
    return given


def krea():
    return diffusers.Krea2Transformer2DModel(
        **IN_ROW,
        num_layers=2,
        num_key_value_heads=1,
        intermediate_size=16,
        timestep_embed_dim=8,
        text_hidden_dim=WIDTH,
        num_text_layers=2,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=8,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
    )


pipeline("Krea2Pipeline", {"transformer": krea, "scheduler": flow}, layered_text, **in_row)


def nucleus():
    network = diffusers.NucleusMoEImageTransformer2DModel(
        **IN_ROW,
        out_channels=CHANNELS,
        num_layers=2,
        num_key_value_heads=1,
        joint_attention_dim=WIDTH,
        mlp_ratio=2.0,
        dense_moe_strategy="leave_first_block_dense",
        num_experts=2,
        moe_intermediate_dim=8,
        capacity_factors=2.0,  # every expert takes every token: it would choose among those of the whole batch
    )
    for name, parameter in network.named_parameters():
        if "experts" in name:  # it leaves them as the memory was
            torch.nn.init.normal_(parameter, std=0.5)
    return network


pipeline("NucleusMoEImagePipeline", {"transformer": nucleus, "scheduler": flow}, masked_text, **in_row)


# ERNIE-Image: one batch, its texts padded to the longest

pipeline(
    "ErnieImagePipeline",
    {
        "transformer": partial(
            diffusers.ErnieImageTransformer2DModel,
            hidden_size=16,
            num_attention_heads=2,
            num_layers=2,
            ffn_hidden_size=16,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            text_in_dim=WIDTH,
            rope_axes_dim=(2, 2, 4),
        ),
        "scheduler": flow,
    },
    lambda pictures: {name: list(embeds) for name, embeds in plain_text(pictures).items()},
    latents=(CHANNELS, 4, 4),
    height=64,
    width=64,
)


# GLM-Image: without the prompt, the tokens of a first model are dropped too


def prior_tokens(pictures):
    tokens = [torch.randint(16, (4,), generator=generator) for generator in generators(pictures)]
    return {"prior_token_ids": torch.stack(tokens)}


def edited(pictures):
    """A picture for each, and its tokens: the network keeps its keys and values before the first step."""
    tokens = [torch.randint(16, (4,), generator=torch.Generator().manual_seed(100 + p)) for p in pictures]
    return {
        "image": [[one] for one in photos(pictures, 32)],
        "prior_token_image_ids": tokens,
        "source_image_grid_thw": [torch.tensor([[1, 2, 2]]) for _ in pictures],
    }


def glm_vae():
    vae = mean_encoder()
    vae.register_to_config(latents_mean=[0.1] * CHANNELS, latents_std=[0.5] * CHANNELS)
    return vae


GLM = {
    "transformer": partial(
        diffusers.GlmImageTransformer2DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        text_embed_dim=WIDTH,
        time_embed_dim=8,
        condition_dim=4,
        prior_vq_quantizer_codebook_size=16,
    ),
    "vae": glm_vae,
    "scheduler": flow,
}
pipeline("GlmImagePipeline", GLM, same_length, prior_tokens, **in_32)
pipeline("GlmImagePipeline", GLM, same_length, prior_tokens, edited, label="GlmImagePipeline (edit)", **in_32)


# PRX: the picture attends to itself and to the text; in latents, or in pixels where the network tells the picture

PRX_SIZES = {
    "context_in_dim": WIDTH,
    "hidden_size": 16,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 2,
    "axes_dim": [4, 4],
}
for name, channels, size in (("PRXPipeline", CHANNELS, 32), ("PRXPixelPipeline", 3, 4)):
    ONE_PICTURE_ONLY[name] = "gives two timesteps, however many pictures are made"
    pipeline(
        name,
        {
            "transformer": partial(diffusers.PRXTransformer2DModel, **PRX_SIZES, in_channels=channels),
            "scheduler": flow,
        },
        text,
        latents=(channels, 4, 4),
        height=size,
        width=size,
        use_resolution_binning=False,
    )


# Those that have to be given words: what would ask a tokenizer and a text encoder is replaced, once they are built


def words(pictures):
    return {"prompt": [f"a grey cat {p}" for p in pictures], "negative_prompt": [f"bad {p}" for p in pictures]}


def prompt_words(pictures):
    return {"prompt": words(pictures)["prompt"]}


def spoken(prompts):
    """Embeddings of prompts, a token a word, and their masks."""
    tokens = [of_pictures([sum(map(ord, one))], len(one.split()), WIDTH, kind=1)[0] for one in prompts]
    masks = [torch.ones(len(one), dtype=torch.int64) for one in tokens]
    return tuple(torch.nn.utils.rnn.pad_sequence(padded, batch_first=True) for padded in (tokens, masks))


def with_words(build, **methods):
    """What `build` makes, with these methods in place of its own; each is given the pipeline first."""
    pipe = build()
    for name, method in methods.items():
        setattr(pipe, name, partial(method, pipe))
    return pipe


def worded(name, methods, components, *inputs, branches=2, label=None, **settings):
    """As `pipeline`, for a class that is given words."""
    make = partial(with_words, partial(build, name, **components), **methods)
    register(label or name, make, partial(call, inputs=inputs, **settings), branches)


def embeddings(pipe, prompts, image=None):
    return spoken(prompts)[0]


# LongCat-Image: a call for each text; it makes any picture as large as a megapixel, and so the encoder is deep

LONG_CAT = {
    "transformer": partial(
        diffusers.LongCatImageTransformer2DModel,
        **IN_ROW | {"in_channels": 64},
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
    ),
    "scheduler": flow,
}
long_cat = {"_encode_prompt": embeddings}
worded(
    "LongCatImagePipeline",
    long_cat,
    LONG_CAT,
    words,
    latents=(4, 64),
    height=32,
    width=32,
    enable_prompt_rewrite=False,
)
ONE_PICTURE_ONLY["LongCatImageEditPipeline"] = "takes one prompt"


class TextProcessor:
    """Would prepare pictures for the text encoder."""

    image_processor = None


def deep_vae():
    """Makes a picture 256 times smaller."""
    return diffusers.AutoencoderKL(
        block_out_channels=(2,) * 9,
        norm_num_groups=1,
        latent_channels=16,
        layers_per_block=1,
        shift_factor=0.1,
        down_block_types=("DownEncoderBlock2D",) * 9,
        up_block_types=("UpDecoderBlock2D",) * 9,
    )


worded(
    "LongCatImageEditPipeline",
    long_cat,
    LONG_CAT | {"vae": deep_vae, "text_processor": TextProcessor},
    words,
    lambda pictures: {"image": photos(pictures, 32)[0]},
    latents=(4, 64),
)


# OmniGen: the text is in the network's own vocabulary, the same negative prompt for all


class WordTokenizer:
    model_max_length = 100

    def __call__(self, prompt):
        return SimpleNamespace(input_ids=[3 + sum(map(ord, word)) % 60 for word in prompt.split()])


def build_omnigen():
    """It needs torchvision, for pictures that are given, and here are none."""
    nothing = dict.fromkeys(("Compose", "Lambda", "ToTensor", "Normalize"), lambda *_, **__: None)
    processor = processor_omnigen.OmniGenMultiModalProcessor
    with (
        patch.object(processor_omnigen, "transforms", SimpleNamespace(**nothing), create=True),
        patch.object(pipeline_omnigen, "OmniGenMultiModalProcessor", processor, create=True),
    ):
        return build(
            "OmniGenPipeline",
            transformer=partial(
                diffusers.OmniGenTransformer2DModel,
                in_channels=CHANNELS,
                hidden_size=16,
                num_attention_heads=2,
                num_key_value_heads=2,
                intermediate_size=16,
                num_layers=2,
                pad_token_id=0,
                vocab_size=63,
                rope_scaling={"long_factor": [1.0] * 4, "short_factor": [1.0] * 4},
                pos_embed_max_size=8,
                time_step_dim=8,
            ),
            vae=mean_encoder,
            tokenizer=WordTokenizer,
            scheduler=flow,
        )


register("OmniGenPipeline", build_omnigen, partial(call, inputs=(prompt_words,), **in_32))


# Ideogram 4: another network is asked without the text, about the picture alone


def ideogram():
    return wake(
        diffusers.Ideogram4Transformer2DModel(
            in_channels=PACKED,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            intermediate_size=16,
            adaln_dim=8,
            llm_features_dim=WIDTH,
            mrope_section=(1, 1, 1),
        )
    )


def ideogram_text(pipe, prompt, grid_h, grid_w, max_sequence_length, device):
    """Padded on the left, and with zeros for the picture."""
    tokens, masks = spoken(prompt)
    ids = pipe._prepare_ids(masks.sum(1).tolist(), grid_h, grid_w, max_sequence_length, device)
    padding = (0, 0, max_sequence_length - tokens.shape[1], grid_h * grid_w)
    return torch.nn.functional.pad(tokens, padding), *ids


worded(
    "Ideogram4Pipeline",
    {"encode_prompt": ideogram_text},
    {"transformer": ideogram, "unconditional_transformer": ideogram, "scheduler": flow},
    prompt_words,
    branches=1,  # of each network
    max_sequence_length=TOKENS,
    guidance_schedule=None,
    **in_row,
)


# JoyImage-Edit: what guidance makes is as long as what the prompt alone makes


JoyImages = diffusers.pipelines.joyimage.image_processor.JoyImageEditImageProcessor


class AnySize(JoyImages):
    """Does not round a size up to a megapixel."""

    def get_default_height_width(self, image, height=None, width=None):
        return height or 16, width or 16


def mean_video_encoder():
    """Encodes a picture always to the same latents: one pipeline draws them without a generator."""
    vae = wan_vae()
    encode = vae.encode

    def mean(video):
        encoded = encode(video)
        encoded.latent_dist = type(encoded.latent_dist)(encoded.latent_dist.parameters, deterministic=True)
        return encoded

    vae.encode = mean
    return vae


def build_joy(name, **components):
    pipe = build(name, vae=mean_video_encoder, scheduler=flow, **components)
    for part in ("image_processor", "vae_image_processor"):
        if isinstance(getattr(pipe, part, None), JoyImages):
            setattr(pipe, part, AnySize(vae_scale_factor=4))
    return pipe


JOY_SIZES = {
    "in_channels": CHANNELS,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "text_dim": WIDTH,
    "num_layers": 2,
    "rope_dim_list": [2, 2, 4],
}
joy = partial(
    build_joy, "JoyImageEditPipeline", transformer=partial(diffusers.JoyImageEditTransformer3DModel, **JOY_SIZES)
)
joy_plus = partial(
    build_joy,
    "JoyImageEditPlusPipeline",
    transformer=partial(diffusers.JoyImageEditPlusTransformer3DModel, **JOY_SIZES),
)


def photo(pictures):
    return {"image": photos(pictures, 16)}


def two_photos(pictures):
    """Of each picture."""
    both = zip(photos(pictures, 16), photos([p + 100 for p in pictures], 16), strict=True)
    return {"images": [list(pair) for pair in both]}


in_16 = {"height": 16, "width": 16}
for label, inputs in (("JoyImageEditPipeline", (photo,)), ("JoyImageEditPipeline (no picture)", ())):
    register(label, joy, partial(call, inputs=(masked_text, *inputs), latents=(1, CHANNELS, 1, 4, 4), **in_16))
register(
    "JoyImageEditPlusPipeline",
    partial(with_words, joy_plus, encode_prompt_multiple_images=lambda pipe, prompt, **_: spoken(prompt)),
    partial(call, inputs=(words, two_photos), latents=(CHANNELS, 1, 4, 4), **in_16),
)


# HunyuanImage: guided by a component, and without one not at all


def unscaled(name, components, *inputs, branches=1, label=None, **settings):
    """As `pipeline`, for a class whose call takes no guidance scale."""

    def arguments(pictures):
        given = call(pictures, inputs=inputs, **settings)
        del given["guidance_scale"]
        return given

    register(label or name, partial(build, name, **components), arguments, branches)


def both_texts(pictures):
    masks = ("prompt_embeds_mask", "negative_prompt_embeds_mask")
    return masked_text(pictures) | text(pictures, masks=masks, tokens=TOKENS + 1, suffix="_2", kind=3)


HUNYUAN_SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "out_channels": CHANNELS,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": WIDTH,
}
HUNYUAN = {
    "transformer": partial(
        diffusers.HunyuanImageTransformer2DModel,
        **HUNYUAN_SIZES,
        in_channels=CHANNELS,
        text_embed_2_dim=WIDTH,
        rope_axes_dim=(4, 4),
    ),
    "scheduler": flow,
}
mixed = partial(diffusers.AdaptiveProjectedMixGuidance, guidance_scale=5.0, guidance_rescale=0.5)
projected = partial(mixed, adaptive_projected_guidance_start_step=1)  # from the step after that one on
plain = partial(diffusers.ClassifierFreeGuidance, guidance_scale=5.0)
in_128 = {"latents": (CHANNELS, 4, 4), "height": 128, "width": 128}
for label, guider in (
    ("HunyuanImagePipeline", {"guider": plain, "ocr_guider": plain}),
    ("HunyuanImagePipeline (projected)", {"guider": mixed, "ocr_guider": projected}),
    ("HunyuanImagePipeline (without guidance)", {}),
):
    unscaled("HunyuanImagePipeline", HUNYUAN | guider, both_texts, label=label, branches=2 if guider else 1, **in_128)
for label, guider in (
    ("HunyuanImageRefinerPipeline", {"guider": mixed}),
    ("HunyuanImageRefinerPipeline (without guidance)", {}),
):
    unscaled(
        "HunyuanImageRefinerPipeline",
        {
            "transformer": partial(
                diffusers.HunyuanImageTransformer2DModel,
                **HUNYUAN_SIZES,
                in_channels=2 * CHANNELS,
                patch_size=(1, 1, 1),
                rope_axes_dim=(2, 2, 4),
                guidance_embeds=True,
            ),
            "scheduler": flow,
        }
        | guider,
        masked_text,
        noise,
        lambda pictures: {"image": of_pictures(pictures, CHANNELS, 1, 4, 4, kind=50)},
        label=label,
        branches=2 if guider else 1,
        latents=(CHANNELS, 1, 4, 4),
        height=64,
        width=64,
    )


# DreamLite: a UNet, of what is made beside what is given; each call makes one picture


def dream_unet():
    return wake(
        diffusers.DreamLiteUNetModel(
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
            ff_mult=2,
            down_block_types=("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
            up_block_types=("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
            addition_embed_type="time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=2 * 4,
        )
    )


class TextEncoder(torch.nn.Module):
    """Is asked for these alone."""

    device = torch.device("cpu")
    dtype = torch.float32


def tiny_vae():
    """Makes a picture eight times smaller."""
    return diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4,) * 4,
        decoder_block_out_channels=(4,) * 4,
        num_encoder_blocks=(1,) * 4,
        num_decoder_blocks=(1,) * 4,
    )


def one_word(pictures):
    return {name: one[0] for name, one in words(pictures).items()}


def one_prompt(pictures):
    return {"prompt": words(pictures)["prompt"][0]}


def one_photo(pictures):
    return {"image": photos(pictures, 32)[0]}


def one_noise(pictures):
    return {"generator": generators(pictures)[0]}


DREAM = {"text_encoder": TextEncoder, "vae": tiny_vae, "unet": dream_unet, "scheduler": flow}
for name, label, inputs, branches in (
    ("DreamLitePipeline", "DreamLitePipeline", (one_word,), 2),
    ("DreamLitePipeline", "DreamLitePipeline (edit)", (one_word, one_photo), 3),
    ("DreamLiteMobilePipeline", "DreamLiteMobilePipeline", (one_prompt,), 1),
    ("DreamLiteMobilePipeline", "DreamLiteMobilePipeline (edit)", (one_prompt, one_photo), 1),
):
    ONE_PICTURE_ONLY[label] = "takes one prompt"
    worded(
        name,
        {"encode_prompt": lambda pipe, prompts, **_: spoken(prompts)},
        DREAM,
        *inputs,
        one_noise,
        label=label,
        branches=branches,
        height=32,
        width=32,
    )


# DiT: a class instead of a text; both halves of the batch are denoised to the end


def numbered(pictures):
    return {"class_labels": [p % 1000 for p in pictures]}


pipeline(
    "DiTPipeline",
    {
        "transformer": partial(
            diffusers.DiTTransformer2DModel,
            **HEADS,
            in_channels=CHANNELS,
            out_channels=2 * CHANNELS,
            num_layers=2,
            norm_num_groups=4,
            sample_size=4,
        ),
        "vae": mean_encoder,
        "scheduler": ddim,
    },
    numbered,
    noise,
    output_type="pt",  # it gives no latents
)


# Stable Audio 3: the duration follows the text; to change a sound, it knows no guidance


class SoundEncoder(torch.nn.Module):
    """Makes a sound half as long."""

    device = torch.device("cpu")
    dtype = torch.float32
    downsampling_ratio = 2
    config = SimpleNamespace(sampling_rate=4, latent_dim=CHANNELS)

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(2, CHANNELS, 2, stride=2)

    def encode(self, sound):
        return SimpleNamespace(latents=self.conv(sound))


STABLE_AUDIO = {
    "transformer": partial(
        diffusers.StableAudio3DiTModel,
        io_channels=CHANNELS,
        embed_dim=16,
        depth=2,
        num_heads=2,
        cond_token_dim=WIDTH,
        global_cond_dim=WIDTH,
        local_add_cond_dim=1 + CHANNELS,
        timestep_features_dim=8,
        ff_mult=2.0,
        num_memory_tokens=2,
    ),
    "vae": SoundEncoder,
    "duration_embedder": partial(diffusers.StableAudio3DurationEmbedder, output_dim=WIDTH, fourier_dim=8),
    "scheduler": partial(flow, num_train_timesteps=1),
}


def sound_text(pictures):
    return text(pictures, masks=("encoder_attention_mask", "negative_encoder_attention_mask"))


def sound(pictures):
    """Of four seconds, and its text."""
    prompts = {name: value for name, value in sound_text(pictures).items() if "negative" not in name}
    return prompts | {"audio": of_pictures(pictures, 2, 16, kind=50)}


four_seconds = {"latents": (CHANNELS, 8), "duration": 4.0}
pipeline("StableAudio3Pipeline", STABLE_AUDIO, sound_text, **four_seconds)
pipeline(
    "StableAudio3Pipeline",
    STABLE_AUDIO | {"scheduler": partial(flow, num_train_timesteps=1, stochastic_sampling=True)},
    sound_text,
    noise,
    label="StableAudio3Pipeline (new noise in each step)",
    **four_seconds,
)
unscaled(
    "StableAudio3AudioToAudioPipeline",
    STABLE_AUDIO,
    sound,
    init_noise_level=0.8,
    logsnr_min=-2.0,  # at the default the second of so few timesteps is higher than the first
    **four_seconds,
)
unscaled(
    "StableAudio3InpaintPipeline",
    STABLE_AUDIO,
    sound,
    mask_start_seconds=1.0,
    mask_end_seconds=3.0,
    **four_seconds,
)


# ACE-Step: what guidance did in a step moves the next; without the prompt, a vector of its own

ACE_SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "sliding_window": 4,
}


def ace_step_text(pipe, prompt, lyrics, **_):
    given = (*spoken(prompt), *spoken(lyrics))
    return tuple(part if part.is_floating_point() else part.bool() for part in given)


def song(pictures):
    return {"prompt": words(pictures)["prompt"], "lyrics": [f"la la {p}" for p in pictures]}


def ace_step(**changes):
    return {
        "transformer": partial(
            diffusers.AceStepTransformer1DModel,
            **ACE_SIZES,
            num_hidden_layers=2,
            in_channels=3 * CHANNELS,
            audio_acoustic_hidden_dim=CHANNELS,
            **changes,
        ),
        "condition_encoder": partial(
            diffusers.pipelines.ace_step.AceStepConditionEncoder,
            **ACE_SIZES,
            text_hidden_dim=WIDTH,
            timbre_hidden_dim=CHANNELS,
            num_lyric_encoder_hidden_layers=1,
            num_timbre_encoder_hidden_layers=1,
        ),
        "scheduler": partial(flow, num_train_timesteps=1),
    }


for label, changes, settings in (
    ("AceStepPipeline", {}, {}),
    ("AceStepPipeline (guided at first)", {}, {"cfg_interval_end": 0.2}),
    ("AceStepPipeline (without guidance)", {"is_turbo": True}, {"scale": 1.0}),
):
    worded(
        "AceStepPipeline",
        {"encode_prompt": ace_step_text},
        ace_step(**changes),
        song,
        label=label,
        branches=1 if changes else 2,
        latents=(8, CHANNELS),
        audio_duration=8 / 25,
        **settings,
    )


# LongCat-AudioDiT: a call for each text


def spoken_lengths(pipe, prompts, device):
    tokens, masks = spoken(prompts)
    return tokens, masks.sum(1)


worded(
    "LongCatAudioDiTPipeline",
    {"encode_prompt": spoken_lengths},
    {
        "transformer": partial(
            diffusers.LongCatAudioDiTTransformer,
            dit_dim=16,
            dit_depth=2,
            dit_heads=2,
            dit_text_dim=WIDTH,
            latent_dim=CHANNELS,
            ff_mult=2.0,
        ),
        "vae": SoundEncoder,
        "scheduler": partial(flow, invert_sigmas=True),
    },
    words,
    latents=(8, CHANNELS),
)


# RFD4-Proteina: the backbone of a protein, with a scheduler of its own, and latents of the rest with another

PROTEIN_SIZES = {"nheads": 2, "latent_dim": CHANNELS, "token_type_emb_dim": 4}


def protein_scheduler():
    return diffusers.RFD4ProteinaScheduler("log", "1/t", tsr_k=1.0, tsr_sigma=1.0, tail_steps=0)


build_protein = partial(
    build,
    "RFD4ProteinaPipeline",
    transformer=partial(
        diffusers.RFD4ProteinaTransformer,
        **PROTEIN_SIZES,
        nlayers=2,
        token_dim=16,
        dim_cond=8,
        pair_repr_dim=8,
        t_emb_dim=8,
        tri_mult_c=8,
        xt_pair_dist_dim=8,
        num_sequence_classes=4,
        feats_seq=("xt_bb_ca", "xt_local_latents", "secondary_structure"),
        feats_pair_repr=("xt_bb_ca_pair_dists", "molecule_idx_pair"),
        feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
    ),
    vae=partial(
        diffusers.RFD4ProteinaAutoencoder,
        **PROTEIN_SIZES,
        atom37_mask=[[True] * 37] * 4,
        allowed_residue_types=[[True] * 4],
        n_residue_types=4,
        num_token_types=1,
        nlayers=1,
        token_dim=16,
        dim_cond=8,
        pair_repr_dim=8,
        decoder_feats_seq=("ca_coors_nm", "z_latent_seq"),
    ),
    bb_ca_scheduler=protein_scheduler,
    local_latents_scheduler=protein_scheduler,
    recycle_depths=[1, 2] * (STEPS // 2),  # a number for each step, which a call cannot change
)


def call_protein(pictures):
    """A molecule of four residues, whose secondary structure is what is asked for."""
    tokens = torch.ones(len(pictures), 4, dtype=torch.bool)
    structure = torch.tensor([[1 + (p + residue) % 3 for residue in range(4)] for p in pictures])
    return {
        "padding_mask": tokens,
        "is_in_context_conditioning": ~tokens,
        "supports_local_latent": tokens,
        "conditioning_features": {
            "condition_sequence_1_residue": tokens.long(),
            "condition_secondary-structure_1_residue": structure,
            "molecule_iid": tokens.long(),
        },
        "generator": generators(pictures),
        "return_dict": False,
    }


register("RFD4ProteinaPipeline", build_protein, call_protein, branches=1)


# Models that write words: they are told no timestep, and their result is tokens


def writer():
    """It knows twelve words."""
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=12,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
            initializer_range=0.5,
        )
    )


def tokens(pictures):
    return torch.stack([torch.randint(11, (4,), generator=generator) for generator in generators(pictures)])


def call_llada(pictures):
    """One word in each step, since none is so certain."""
    return {
        "input_ids": tokens(pictures),
        "num_inference_steps": STEPS,
        "gen_length": STEPS,
        "block_length": STEPS,
        "threshold": 2.0,
        "editing_threshold": None,
        "mask_token_id": 11,
        "sampling_method": "greedy",
        "output_type": "seq",
        "return_dict": False,
    }


register(
    "LLaDA2Pipeline",
    partial(build, "LLaDA2Pipeline", model=writer, scheduler=diffusers.BlockRefinementScheduler),
    call_llada,
    branches=1,
)


def gemma():
    """Without eyes; a model with experts, as there is no other."""
    config = transformers.DiffusionGemmaConfig(
        text_config={
            "vocab_size": 12,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "global_head_dim": 8,
            "num_experts": 2,
            "top_k_experts": 1,
            "moe_intermediate_size": 8,
            "sliding_window": 8,
            "initializer_range": 0.5,
        },
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
        },
        canvas_length=STEPS,
    )
    model = transformers.DiffusionGemmaForBlockDiffusion(config)
    decoder = model.model.decoder
    mask = decoder.create_diffusion_decoder_attention_mask
    # newer than diffusers, which knows this argument by another name
    decoder.create_diffusion_decoder_attention_mask = lambda past_key_values, **given: mask(
        cache=past_key_values, **given
    )
    return model


class NumberProcessor:
    """Of prompts that are numbers of pictures."""

    eos_token_id = None

    def apply_chat_template(self, messages, **settings):
        return {"input_ids": tokens([int(one["content"]) for (one,) in messages])}


def call_gemma(pictures):
    return {
        "prompt": [str(p) for p in pictures],
        "num_inference_steps": STEPS,
        "gen_length": STEPS,
        "confidence_threshold": None,  # or it might stop early
        "generator": generators(pictures)[0],
        "output_type": "seq",
        "return_dict": False,
    }


register(
    "DiffusionGemmaPipeline",
    partial(
        build,
        "DiffusionGemmaPipeline",
        model=gemma,
        processor=NumberProcessor,
        scheduler=diffusers.EntropyBoundScheduler,
    ),
    call_gemma,
    branches=1,
)
ONE_PICTURE_ONLY["DiffusionGemmaPipeline"] = "draws the noise of all pictures with one generator"
