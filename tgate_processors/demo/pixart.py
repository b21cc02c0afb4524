"""The embedded PixArt-alpha, built from stock classes at a small size.

It shares the autoencoder of the embedded Stable Diffusion. Each function depends on its arguments alone, so training
builds exactly what the package ships.
"""

from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from tgate_processors.demo.model import LATENT_CHANNELS, SCALE, TOKENS, WIDTH
from tgate_processors.demo.world import RESOLUTION, WORDS


HEAD_WIDTH = 32  # channels
PAD = 0  # id of T5's padding token


def build_tokenizer() -> T5Tokenizer:
    """Return T5's unigram tokenizer for the words of this world, with one token for each."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in WORDS]  # the mark stands for the space before it
    return T5Tokenizer(vocab=[*special, *words], extra_ids=0, model_max_length=TOKENS)


def build_text_encoder(tokenizer: T5Tokenizer) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=24,
            d_ff=256,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )


def build_transformer(num_attention_heads: int = 6, num_layers: int = 6) -> PixArtTransformer2DModel:
    """Return a transformer on 64 patches of 2 x 2 latents. Every block attends to the caption."""
    return PixArtTransformer2DModel(
        sample_size=RESOLUTION // SCALE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,  # PixArt has twice as many, for a variance that the pipeline ignores
        num_attention_heads=num_attention_heads,
        attention_head_dim=HEAD_WIDTH,
        num_layers=num_layers,
        cross_attention_dim=num_attention_heads * HEAD_WIDTH,
        caption_channels=WIDTH,
    )


def velocity(networks: nn.ModuleDict, noised: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
    """Return the velocity that both networks predict from noised latents and token ids.

    Args:
        networks: The text encoder and the denoiser.
        noised: Noised latents, (batch, channels, height, width).
        timesteps: Timestep of each latent, (batch,).
        words: Token ids, (batch, tokens).
    """
    mask = words.not_equal(PAD).long()
    states = networks["text_encoder"](words, attention_mask=mask).last_hidden_state  # (batch, tokens, width)
    sizes = {"resolution": None, "aspect_ratio": None}
    predicted: Tensor = networks["transformer"](
        noised, states, timesteps, added_cond_kwargs=sizes, encoder_attention_mask=mask
    ).sample
    return predicted


def build_scheduler() -> DPMSolverMultistepScheduler:
    """Return PixArt's solver with Stable Diffusion's noise levels, for a network that predicts the velocity."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction"
    )


def build_pipeline(
    vae: AutoencoderKL, text_encoder: T5EncoderModel, transformer: PixArtTransformer2DModel
) -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        tokenizer=build_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=build_scheduler(),
    )
