"""The embedded Stable Diffusion, built from stock classes at a small size.

Each function depends on its arguments alone, so training builds exactly what the package ships.
"""

import string
from collections.abc import Iterable
from itertools import pairwise

from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tgate_processors.demo.world import RESOLUTION, WORDS


TOKENS = 20  # at most 16 words of a caption, the start and the end token, and some room
WIDTH = 96  # channels of a token, and of the UNet's cross-attention
SCALE = 4  # pixels per latent, along one side
LATENT_CHANNELS = 4
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer() -> CLIPTokenizer:
    """Return CLIP's byte-pair tokenizer for the words of this world, with one token for each."""
    vocabulary, merges = byte_pairs(WORDS)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def byte_pairs(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return a vocabulary and ranked merges that turn each of `words` into one token.

    The tokenizer's own algorithm finds the merges. As long as it cuts a word into several tokens, the first two get
    a new merge. The new merge has the last rank, so words that are finished stay as they are.
    """
    letters = string.ascii_lowercase
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        parts = _merged([*word[:-1], word[-1] + "</w>"], ranks)
        while len(parts) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            parts = _merged(parts, ranks)
    tokens += dict.fromkeys(left + right for left, right in ranks)
    return {token: index for index, token in enumerate([*tokens, START, END])}, list(ranks)


def _merged(parts: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join the neighbours with the best rank until no merge is left, as byte-pair encoding does."""
    while known := [pair for pair in pairwise(parts) if pair in ranks]:
        left, right = min(known, key=ranks.__getitem__)
        place = list(pairwise(parts)).index((left, right))
        parts = [*parts[:place], left + right, *parts[place + 2 :]]
    return parts


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            # CLIP's own standard deviations suit a width of 512; here the weights would begin too near to zero
            initializer_factor=2.0,
        )
    )


def build_unet(block_out_channels: tuple[int, ...] = (64, 64, 128)) -> UNet2DConditionModel:
    """Return a UNet with cross-attention at the two finer of its three resolutions and, as usual, in the middle."""
    return UNet2DConditionModel(
        sample_size=RESOLUTION // SCALE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,  # the number of heads, despite its name
        norm_num_groups=16,
    )


def velocity(networks: nn.ModuleDict, noised: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
    """Return the velocity that both networks predict from noised latents and token ids.

    Args:
        networks: The text encoder and the denoiser.
        noised: Noised latents, (batch, channels, height, width).
        timesteps: Timestep of each latent, (batch,).
        words: Token ids, (batch, tokens).
    """
    states = networks["text_encoder"](words).last_hidden_state  # (batch, tokens, width)
    predicted: Tensor = networks["unet"](noised, timesteps, states).sample
    return predicted


def build_vae(block_out_channels: tuple[int, ...] = (16, 32, 48)) -> AutoencoderKL:
    return AutoencoderKL(
        sample_size=RESOLUTION,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=block_out_channels,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def build_scheduler() -> DDIMScheduler:
    """Return a scheduler with Stable Diffusion's noise levels, for a network that predicts the velocity."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Return the stock pipeline of these parts. It needs no safety checker, since it draws only shapes."""
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
