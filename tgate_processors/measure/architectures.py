"""Architectures of the denoisers in the original's documentation, at full size and without weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch

from tgate_processors._copying import build_on_meta
from tgate_processors._folding import Inputs
from tgate_processors.errors import ConfigError, UnsupportedPipelineError


@dataclass(frozen=True)
class Architecture:
    """A denoiser and the inputs that a pipeline gives it.

    Args:
        denoiser: Name of the denoiser's class in diffusers.
        config: Config of the denoiser.
        height, width: Size of the picture, in pixels.
        tokens: Number of tokens of the prompt.
        guidance: Whether the pipeline batches two branches of classifier-free guidance.
        steps: Number of denoising steps.
        scale: Pixels per latent, along one side.
    """

    denoiser: str
    config: Mapping[str, Any] = field(repr=False)
    height: int
    width: int
    tokens: int = 77
    guidance: bool = True
    steps: int = 25
    scale: int = 8

    def build(self) -> Any:
        """Return the denoiser on the meta device."""
        return build_on_meta(getattr(diffusers, self.denoiser), dict(self.config))

    def inputs(self, model: Any) -> Inputs:
        """Return the inputs of an evaluation before the gate, for one picture, on the meta device."""
        batch = 2 if self.guidance else 1
        config = model.config
        with torch.device("meta"):
            sample = torch.empty(batch, config.in_channels, self.height // self.scale, self.width // self.scale)
            if self.denoiser == "PixArtTransformer2DModel":
                return (sample,), _pixart_inputs(config, batch, self.tokens)
            return (sample, torch.empty(())), _unet_inputs(config, batch, self.tokens)


def _unet_inputs(config: Any, batch: int, tokens: int) -> dict[str, Any]:
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.empty(batch, tokens, config.cross_attention_dim)}
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": torch.empty(batch, pooled), "time_ids": torch.empty(batch, 6)}
    if config.time_cond_proj_dim is not None:
        inputs["timestep_cond"] = torch.empty(batch, config.time_cond_proj_dim)
    return inputs


def _pixart_inputs(config: Any, batch: int, tokens: int) -> dict[str, Any]:
    sizes = {"resolution": torch.empty(batch, 2), "aspect_ratio": torch.empty(batch, 1)}
    return {
        "encoder_hidden_states": torch.empty(batch, tokens, config.caption_channels),
        "encoder_attention_mask": torch.empty(batch, tokens),
        "timestep": torch.empty(batch),
        "added_cond_kwargs": sizes if config.sample_size == 128 else dict.fromkeys(sizes),
    }


_SD = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
_SD_2 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
_SDXL = {
    "sample_size": 128,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# as many layers as SDXL with hardly any arithmetic, to time Python alone, for which a fast GPU waits
_PYTHON = {
    "sample_size": 8,
    "block_out_channels": [8, 8, 8],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": 1,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
}
_PIXART = {
    "sample_size": 128,
    "num_layers": 28,
    "caption_channels": 4096,
    "cross_attention_dim": 1152,
    "out_channels": 8,
}

_UNET, _PIXART_CLASS = "UNet2DConditionModel", "PixArtTransformer2DModel"
ARCHITECTURES = {
    "sd-1.5": Architecture(_UNET, _SD, 512, 512),
    "sd-2.1": Architecture(_UNET, _SD_2, 768, 768),
    "sdxl": Architecture(_UNET, _SDXL, 1024, 1024),
    "lcm-sdxl": Architecture(_UNET, _SDXL | {"time_cond_proj_dim": 256}, 1024, 1024, guidance=False, steps=4),
    "pixart-alpha": Architecture(_PIXART_CLASS, _PIXART, 1024, 1024, tokens=120),
    "lcm-pixart": Architecture(_PIXART_CLASS, _PIXART, 1024, 1024, tokens=120, guidance=False, steps=4),
    "python": Architecture(_UNET, _PYTHON, 64, 64, tokens=8),
    "pixart-sigma": Architecture(
        _PIXART_CLASS, _PIXART | {"use_additional_conditions": False}, 1024, 1024, tokens=300
    ),
}


def architecture(name: str) -> Architecture:
    """Return the architecture of a name in `ARCHITECTURES`, or of the saved pipeline in a folder.

    Raises:
        ConfigError: `name` is neither a key of `ARCHITECTURES` nor the folder of a saved pipeline.
        UnsupportedPipelineError: The saved pipeline's denoiser has another class than those of `ARCHITECTURES`.
    """
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if (Path(name) / "model_index.json").is_file():
        return _pipeline_on_disk(Path(name))
    raise ConfigError(
        f"`model` must be one of {', '.join(ARCHITECTURES)}, or the folder of a saved pipeline, with its "
        f"model_index.json, got {name!r}. Pass one of these."
    )


def _pipeline_on_disk(folder: Path) -> Architecture:
    """Return the architecture of a saved pipeline, from its configs alone."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text())
    name = "unet" if "unet" in parts else "transformer"
    denoiser = parts.get(name, ["", "nothing"])[1]
    if denoiser not in (_UNET, _PIXART_CLASS):
        raise UnsupportedPipelineError(
            f"`model` must have a {_UNET} or a {_PIXART_CLASS}, got {denoiser}. The inputs of others are unknown."
        )
    config = json.loads((folder / name / "config.json").read_text())
    scale = 2 ** (len(json.loads((folder / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    pixels = config["sample_size"] * scale
    tokens = _text_tokens(folder) if name == "unet" else 120 if parts["_class_name"] == "PixArtAlphaPipeline" else 300
    guidance = config.get("time_cond_proj_dim") is None
    return Architecture(denoiser, config, pixels, pixels, tokens, guidance, scale=scale)


def _text_tokens(folder: Path) -> int:
    """Return the number of tokens to which the CLIP tokenizer pads a prompt. 77 if the folder has no tokenizer."""
    config = folder / "tokenizer" / "tokenizer_config.json"
    return int(json.loads(config.read_text())["model_max_length"]) if config.is_file() else 77


def resized(known: Architecture, *, steps: int | None, height: int | None, width: int | None) -> Architecture:
    """Return the same architecture with other steps or another picture size. None keeps a value.

    Raises:
        ConfigError: A size is no multiple of a latent's pixels.
    """
    changes: dict[str, Any] = {"steps": steps, "height": height, "width": width}
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None and (pixels <= 0 or pixels % known.scale):
            raise ConfigError(f"`{name}` must be a multiple of {known.scale}, got {pixels}. Pass pixels.")
    return replace(known, **{name: value for name, value in changes.items() if value is not None})
