"""Tiny pipelines of Qwen-Image, of Bria and of HiDream: joint attention of the picture and the text."""

from functools import partial, wraps
from types import SimpleNamespace

import torch
from at_hand import diffusers, transformers
from PIL import Image
from zoo import images, of_pictures, register
from zoo_transformers import CHANNELS, TOKENS, WIDTH, build, call, noise, pipeline, plain_text, text, wan_vae


# Pipelines that do not run on a batch of two, with the reason.
ONE_PICTURE_ONLY = {
    "QwenImageEditPlusPipeline",  # refuses more than one prompt, with embeddings too
}

ROPE = {"num_attention_heads": 2, "attention_head_dim": 8, "axes_dims_rope": (2, 2, 4)}
flow_match = diffusers.FlowMatchEulerDiscreteScheduler


def loud(network, by=2):
    """With larger weights, so that the text and the picture tell more in a result that is mostly noise."""
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.data *= by
    return network


def pil(size, picture=0):
    return Image.fromarray((255 * images([picture], size, size)[0]).permute(1, 2, 0).byte().numpy())


def shared_picture(size):
    """One for all prompts: these pipelines take a list for several pictures of one prompt."""
    return lambda _: {"image": pil(size)}


def own_picture(pictures):
    return {"image": [pil(32, picture) for picture in pictures]}


# Bria: a text encoder's padding is zeros, and no mask tells of it


def bria_vae():
    return diffusers.AutoencoderKL(
        block_out_channels=(4,),
        norm_num_groups=2,
        latent_channels=CHANNELS,
        shift_factor=0.0,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )


def bria():
    network = diffusers.BriaTransformer2DModel(
        **ROPE, in_channels=4 * CHANNELS, num_layers=1, num_single_layers=1, joint_attention_dim=WIDTH
    )
    return loud(network)


pipeline(
    "BriaPipeline",
    {"transformer": bria, "vae": bria_vae, "scheduler": flow_match},
    plain_text,
    latents=(4 * 4, 4 * CHANNELS),
    height=8,
    width=8,
)


# Bria FIBO: every layer is given what a layer of the text encoder says, so its pipelines take words alone


class ByteTokenizer:
    """A byte is a token, and texts are padded on the right."""

    def __call__(self, texts, **settings):
        longest = max(map(len, texts))
        return transformers.BatchEncoding(
            {
                "input_ids": torch.tensor([list(one.encode()) + [0] * (longest - len(one)) for one in texts]),
                "attention_mask": torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in texts]),
            }
        )


def smol_lm():
    config = transformers.SmolLM3Config(
        vocab_size=128,
        hidden_size=WIDTH,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=1.0,
    )
    return transformers.SmolLM3ForCausalLM(config)


def fibo():
    """Of more layers than the text encoder has: some are given its last one."""
    network = diffusers.BriaFiboTransformer2DModel(
        **ROPE,
        in_channels=CHANNELS,
        num_layers=2,
        num_single_layers=2,
        joint_attention_dim=2 * WIDTH,
        text_encoder_dim=WIDTH,
    )
    return loud(network)


FIBO = {
    "transformer": fibo,
    "text_encoder": smol_lm,
    "tokenizer": ByteTokenizer,
    "scheduler": flow_match,
}


def words(pictures, form="{} cat"):
    """The prompt, and a negative prompt that is shorter."""
    letters = [chr(ord("a") + picture) for picture in pictures]
    return {"prompt": [form.format(letter) for letter in letters], "negative_prompt": [f"{one}!" for one in letters]}


in_fibo = {"latents": (4 * 4, CHANNELS), "height": 64, "width": 64}
pipeline("BriaFiboPipeline", FIBO, words, **in_fibo)
pipeline(
    "BriaFiboEditPipeline",
    FIBO | {"vae": wan_vae},
    partial(words, form='{{"edit_instruction": "{}"}}'),
    shared_picture(16),
    **in_fibo,
)


# Bria FIBO 2: several layers of a text in one tensor, of which it makes as many "gists" as the text is long


def fibo_2():
    return diffusers.BriaFibo2Transformer2DModel(
        in_channels=CHANNELS,
        dim=24,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        cap_feat_dim=WIDTH,
        injection_layer_ids=(1,),
        perceiver_num_layers=1,
        min_num_gist_tokens=2,
        max_num_gist_tokens=4,
        gist_step=1,
        gist_min_text_len=2,
        gist_max_text_len=TOKENS,
        axes_dims=(4, 4, 4),
        axes_lens=(16, 8, 8),
    )


def fibo_2_text(pictures):
    """Two layers of the text; the negative prompt is the shorter."""
    return {
        "prompt_embeds": of_pictures(pictures, 2, TOKENS, WIDTH, kind=1),
        "negative_prompt_embeds": of_pictures(pictures, 2, TOKENS - 2, WIDTH, kind=2),
    }


def flux_2_vae():
    return diffusers.AutoencoderKLFlux2(
        block_out_channels=(4,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=CHANNELS
    )


FIBO_2 = {"transformer": fibo_2, "scheduler": flow_match}
in_fibo_2 = {"latents": (CHANNELS, 8, 8), "height": 64, "width": 64}
fibo_2_entry = partial(pipeline, "BriaFibo2Pipeline")
fibo_2_entry(FIBO_2, fibo_2_text, **in_fibo_2)
fibo_2_entry(
    FIBO_2 | {"vae": flux_2_vae},
    fibo_2_text,
    shared_picture(64),
    label="BriaFibo2Pipeline (edit)",
    **in_fibo_2,
)


# HiDream: two texts and a pooled one, and layers of experts


def hidream():
    return diffusers.HiDreamImageTransformer2DModel(
        **ROPE,
        patch_size=2,
        in_channels=CHANNELS,
        num_layers=1,
        num_single_layers=1,
        caption_channels=[WIDTH, WIDTH],
        text_emb_dim=WIDTH,
        max_resolution=(8, 8),
        llama_layers=[0, 1],
    )


def hidream_text(pictures):
    """The Llama's layers come before the pictures."""
    given = {}
    for number, start in enumerate(("", "negative_")):
        llama = of_pictures(pictures, 2, TOKENS + 1, WIDTH, kind=3 + number)
        given[f"{start}prompt_embeds_t5"] = of_pictures(pictures, TOKENS, WIDTH, kind=1 + number)
        given[f"{start}prompt_embeds_llama3"] = llama.transpose(0, 1)
        given[f"{start}pooled_prompt_embeds"] = of_pictures(pictures, WIDTH, kind=5 + number)
    return given


def small_hidream():
    pipe = build("HiDreamImagePipeline", transformer=hidream, scheduler=flow_match)
    pipe.default_sample_size = 8  # every size is scaled to this one's area
    return pipe


for label, latents, size in (
    ("HiDreamImagePipeline", (CHANNELS, 8, 8), {"height": 64, "width": 64}),
    # its tokens are filled up to a square's, and masked
    ("HiDreamImagePipeline (landscape)", (CHANNELS, 4, 16), {"height": 32, "width": 128}),
):
    register(label, small_hidream, partial(call, inputs=(hidream_text,), latents=latents, **size))


# Qwen-Image: a call for the prompt, a call for the negative prompt, and what comes of both is as long as the first


def qwen(**changes):
    config = ROPE | {
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 2,
        "joint_attention_dim": WIDTH,
    }
    return loud(diffusers.QwenImageTransformer2DModel(**config | changes))


class Encoder(diffusers.AutoencoderKLQwenImage):
    """Makes a picture four times smaller, always to the same latents: a pipeline draws them without a generator."""

    def __init__(self):
        super().__init__(
            base_dim=4,
            z_dim=CHANNELS,
            dim_mult=[1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.1] * CHANNELS,
            latents_std=[0.5] * CHANNELS,
        )
        loud(self.encoder)
        loud(self.decoder, by=1.4)  # by two, what it decodes would be clipped

    def encode(self, x, return_dict=True):
        encoded = super().encode(x)
        encoded.latent_dist = type(encoded.latent_dist)(encoded.latent_dist.parameters, deterministic=True)
        return encoded


class EncoderFromAfar(Encoder):
    """For pipelines that make every picture a megapixel: makes it 32 times smaller before."""

    def __init__(self):
        super().__init__()
        self.temperal_downsample = [True] * 7  # by their number pipelines know how much smaller the latents are

    def encode(self, x, return_dict=True):
        return super().encode(torch.nn.functional.avg_pool3d(x, (1, 32, 32)))


def true_cfg(pictures, **settings):
    """Arguments of a call, whose scale has another name."""
    given = call(pictures, **settings)
    return given | {"true_cfg_scale": given.pop("guidance_scale")}


def qwen_entry(name, components, *inputs, branches=2, label=None, **settings):
    register(label or name, partial(build, name, **components), partial(true_cfg, inputs=inputs, **settings), branches)


def prompt_alone(pictures):
    """Without a mask it would warn."""
    return {
        "prompt_embeds": of_pictures(pictures, TOKENS, WIDTH, kind=1),
        "prompt_embeds_mask": torch.ones(len(pictures), TOKENS, dtype=torch.int64),
    }


def two_lengths(pictures):
    """The negative prompt is the shorter, and nothing is masked: such a mask does not reach the network."""
    return prompt_alone(pictures) | {
        "negative_prompt_embeds": of_pictures(pictures, TOKENS - 2, WIDTH, kind=2),
        "negative_prompt_embeds_mask": torch.ones(len(pictures), TOKENS - 2, dtype=torch.int64),
    }


def image(pictures):
    return {"image": images(pictures, 32, 32)}


def right_half(size, name="mask_image"):
    """What is new in the picture."""

    def mask(pictures):
        given = torch.zeros(len(pictures), 1, size, size)
        given[..., size // 2 :] = 1.0
        return {name: given}

    return mask


def control_image(pictures):
    return {"control_image": images(pictures, 32, 32, kind=7)}


masked_text = partial(text, masks=("prompt_embeds_mask", "negative_prompt_embeds_mask"))
QWEN = {"transformer": qwen, "scheduler": flow_match}
FROM_PICTURE = QWEN | {"vae": Encoder}
PACKED = (4 * 4, 4 * CHANNELS)
in_qwen = {"latents": PACKED, "height": 64, "width": 64}
small = {"height": 32, "width": 32}  # with an autoencoder that makes it four times smaller
later = {"strength": 1.0, "sigmas": [0.8, 0.6, 0.4, 0.2]}  # from where the picture is still seen

qwen_entry("QwenImagePipeline", QWEN, masked_text, **in_qwen)
qwen_entry("QwenImagePipeline", QWEN, two_lengths, label="QwenImagePipeline (two lengths)", **in_qwen)
qwen_entry(
    "QwenImagePipeline",
    QWEN,
    prompt_alone,
    label="QwenImagePipeline (without guidance)",
    branches=1,
    scale=1.0,
    **in_qwen,
)
qwen_entry("QwenImageImg2ImgPipeline", FROM_PICTURE, two_lengths, image, noise, **small, **later)
qwen_entry("QwenImageInpaintPipeline", FROM_PICTURE, masked_text, image, right_half(32), noise, **small, **later)


# Of a ControlNet the prompt's residuals go to both calls


def controlnet(**changes):
    config = ROPE | {
        "in_channels": 4 * CHANNELS,
        "out_channels": CHANNELS,
        "num_layers": 1,
        "joint_attention_dim": WIDTH,
    }
    return diffusers.QwenImageControlNetModel(**config | changes)


qwen_entry(
    "QwenImageControlNetPipeline",
    FROM_PICTURE | {"controlnet": controlnet},
    two_lengths,
    control_image,
    latents=PACKED,
    **small,
)
qwen_entry(
    "QwenImageControlNetInpaintPipeline",
    FROM_PICTURE | {"controlnet": partial(controlnet, extra_condition_channels=4)},  # the mask's
    masked_text,
    control_image,
    right_half(32, "control_mask"),
    latents=PACKED,
    **small,
)


# Edits: the picture's latents follow the noise, and what the network says of them is dropped


EDIT = QWEN | {"vae": EncoderFromAfar}


def two_pictures(_):
    """For one prompt."""
    return {"image": [pil(32), pil(32, 7)]}


qwen_entry("QwenImageEditPipeline", EDIT, two_lengths, own_picture, latents=PACKED)
qwen_entry("QwenImageEditInpaintPipeline", EDIT, two_lengths, own_picture, right_half(32), noise, **later)
qwen_entry(
    "QwenImageEditPlusPipeline",
    EDIT | {"transformer": partial(qwen, zero_cond_t=True)},
    two_lengths,
    two_pictures,
    latents=PACKED,
)


# Layers of a picture


LAYERS = 2


class Dtype:
    """What is asked of a text encoder that is given no text."""

    dtype = torch.float32


class Layered(diffusers.QwenImageLayeredPipeline):
    """In a tensor, `(pictures, LAYERS, 3, height, width)`.

    The class itself gives lists that are cut one layer too long, so that in a batch a picture has a layer of the next
    one's among its own; and asked for latents it fails.
    """

    @wraps(diffusers.QwenImageLayeredPipeline.__call__)
    def __call__(self, *args, **kwargs):
        return (torch.cat(super().__call__(*args, **kwargs)[0]).unflatten(0, (-1, LAYERS)),)


Layered.__name__ = "QwenImageLayeredPipeline"


def build_layered():
    return Layered(
        transformer=qwen(use_additional_t_cond=True, use_layer3d_rope=True),
        scheduler=flow_match(),
        vae=EncoderFromAfar(),
        text_encoder=Dtype(),
        tokenizer=None,
        processor=None,
    )


def layered_text(pictures):
    """Without words it would have the picture described, embeddings or not."""
    return two_lengths(pictures) | {"prompt": ["words"] * len(pictures)}


register(
    "QwenImageLayeredPipeline",
    build_layered,
    partial(
        true_cfg,
        inputs=(layered_text, own_picture),
        latents=((LAYERS + 1) * 4 * 4, 4 * CHANNELS),
        layers=LAYERS,
        resolution=1024,
        output_type="pt",
    ),
)


# Qwen-Image 2.1: the text does not see the picture, so its keys and values are kept from the first step


def qwen_21():
    network = diffusers.QwenImage21Transformer2DModel(
        **ROPE, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, context_in_dim=WIDTH, mlp_ratio=1
    )
    return loud(network)


class Processor:
    """What is asked of it as the pipeline is built."""

    tokenizer = SimpleNamespace(encode=lambda words: [0])

    def apply_chat_template(self, messages, **settings):
        return [[0]]


QWEN_21 = {"transformer": qwen_21, "processor": Processor, "scheduler": flow_match}
qwen_21_entry = partial(qwen_entry, "QwenImage21Pipeline", QWEN_21, latents=(4 * 4, CHANNELS), height=64, width=64)
qwen_21_entry(two_lengths)
qwen_21_entry(masked_text, label="QwenImage21Pipeline (without cache)", use_kv_cache=False)
qwen_21_entry(prompt_alone, label="QwenImage21Pipeline (without guidance)", branches=1, scale=1.0)
