"""A pipeline to time, made of an architecture with random weights, at full or reduced size.

Speed does not depend on the values of weights and prompts.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import diffusers
import torch

from tgate_processors._copying import structural_copy
from tgate_processors._validation import require_whole
from tgate_processors.errors import ConfigError
from tgate_processors.measure.architectures import Architecture
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class Rig:
    """Architecture, settings and device of a timed run.

    Args:
        name: Name of the architecture.
        known: Architecture, with the steps and the picture size of the run.
        config: Settings of the gate.
        batch: Number of pictures in a batch.
        device: Name of the device, such as `cpu` or `cuda`.
        dtype: Type of weights and latents.
    """

    name: str
    known: Architecture
    config: TGateConfig
    batch: int = 1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        require_whole("batch", self.batch, least=1)
        self.config.require_known_gate_step()
        if self.config.guidance_start:
            raise ConfigError(
                f"`guidance_start` must be 0 to time the steps before the gate, got {self.config.guidance_start}. "
                "Leave it out, because the steps before the gate would take two different times."
            )
        if self.gate_step >= self.known.steps:
            raise ConfigError(
                f"`gate_step` must be below the number of steps to time both phases, got {self.gate_step} of "
                f"{self.known.steps}. Pass a smaller one."
            )

    @property
    def gate_step(self) -> int:
        """First step after the gate."""
        return self.config.schedule(self.known.steps).gate_step

    @cached_property
    def denoiser(self) -> Any:
        """Stock denoiser on the rig's device."""
        torch.manual_seed(0)
        with torch.device(self.device):
            model = getattr(diffusers, self.known.denoiser).from_config(dict(self.known.config))
        # torch's own `to`, since that of diffusers warns of any dtype
        return torch.nn.Module.to(model, self.dtype).eval().requires_grad_(False)

    def pipeline(self) -> Any:
        """Return a new pipeline with a denoiser that shares the rig's weights and nothing else."""
        denoiser = structural_copy(self.denoiser, lambda tensor: tensor)
        parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
        settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
        if self._is_pixart:
            scheduler: Any = diffusers.DPMSolverMultistepScheduler()
            parts |= {"transformer": denoiser, "scheduler": scheduler}
            pipe = diffusers.PixArtAlphaPipeline(**parts)
        elif self._is_sdxl:
            scheduler = diffusers.EulerDiscreteScheduler(**settings)
            parts |= {"unet": denoiser, "scheduler": scheduler, "text_encoder_2": None, "tokenizer_2": None}
            pipe = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            scheduler = diffusers.DDIMScheduler(**settings, clip_sample=False)
            parts |= {"unet": denoiser, "scheduler": scheduler, "safety_checker": None, "feature_extractor": None}
            pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, steps: int | None = None) -> dict[str, Any]:
        """Return the arguments of the pipeline's call."""
        known, config = self.known, self.known.config
        width = config["caption_channels" if self._is_pixart else "cross_attention_dim"]
        size = known.height // known.scale, known.width // known.scale
        kwargs: dict[str, Any] = {
            "prompt_embeds": self._random(known.tokens, width),
            "latents": self._random(self.denoiser.config.in_channels, *size),
            "num_inference_steps": steps or known.steps,
            "guidance_scale": 5.0 if known.guidance else 1.0,
            "height": known.height,
            "width": known.width,
            "output_type": "latent",
        }
        if known.guidance:
            kwargs["negative_prompt_embeds"] = self._random(known.tokens, width)
        if self._is_sdxl:
            pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            kwargs["pooled_prompt_embeds"] = self._random(pooled)
            kwargs["negative_pooled_prompt_embeds"] = self._random(pooled)
        if self._is_pixart:
            mask = torch.ones(self.batch, known.tokens, device=self.device, dtype=torch.int64)
            kwargs |= {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
            kwargs |= {"negative_prompt": None, "use_resolution_binning": False}
        return kwargs

    @property
    def _is_pixart(self) -> bool:
        return self.known.denoiser == "PixArtTransformer2DModel"

    @property
    def _is_sdxl(self) -> bool:
        return self.known.config.get("addition_embed_type") == "text_time"

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn((self.batch, *shape), device=self.device, dtype=self.dtype)


def reduced(known: Architecture, divisor: int) -> Architecture:
    """Return the architecture with its width divided.

    The number of heads is divided too if it is a multiple of `divisor`. Then each head keeps its width.

    Raises:
        ConfigError: `divisor` is no whole number of at least 1, or the architecture's width cannot be divided by it.
    """
    require_whole("reduce", divisor, least=1)
    if divisor == 1:
        return known
    config = dict(known.config)
    if known.denoiser == "PixArtTransformer2DModel":
        heads = config.get("num_attention_heads", 16)
        if heads % divisor:
            raise ConfigError(f"`reduce` must divide the {heads} heads, got {divisor}. Pass 2 or 4.")
        config["num_attention_heads"] = heads // divisor
        config["cross_attention_dim"] //= divisor
    else:
        channels = config.get("block_out_channels", [320, 640, 1280, 1280])
        if channels[0] % (32 * divisor):
            raise ConfigError(
                f"`reduce` must leave the {channels[0]} channels of the first block a multiple of 32, got {divisor}. "
                "Pass 2 or 5."
            )
        config["block_out_channels"] = [width // divisor for width in channels]
        heads = config.get("attention_head_dim", 8)  # the number of heads, despite its name
        if isinstance(heads, list) and not any(number % divisor for number in heads):
            config["attention_head_dim"] = [number // divisor for number in heads]
    return replace(known, config=config)
