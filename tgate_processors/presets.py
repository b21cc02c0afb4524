"""Settings by name, each with its source, and the choice of those that suit a pipeline."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tgate_processors._families import class_names
from tgate_processors.errors import ConfigError
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class Preset:
    """Settings and their source.

    Args:
        config: The settings. Gate steps are fractions, so they fit runs of any length.
        source: Paper, README or page of the documentation that suggests the settings.
    """

    config: TGateConfig
    source: str


_V1 = "T-GATE, arXiv 2404.02747v1: two fifths of the steps, 10 of 25"
_V2 = "T-GATE, arXiv 2404.02747v2, and the README of tgate 1.0.0"
_LCM = "README of tgate 0.1.2: 1 of 4 steps"

PRESETS = {
    "sd-1.5": Preset(TGateConfig(gate_step=0.4), _V1),
    "sd-2.1": Preset(TGateConfig(gate_step=0.4), _V1),
    "sdxl": Preset(TGateConfig(gate_step=0.4), _V1),
    "sdxl-v2": Preset(TGateConfig(gate_step=0.4, sp_interval=5, warm_up=2), _V2),
    "pixart-alpha": Preset(TGateConfig(gate_step=0.6), "T-GATE, arXiv 2404.02747v2: three fifths, 15 of 25"),
    "pixart-alpha-v2": Preset(TGateConfig(gate_step=0.6, sp_interval=3, warm_up=2), _V2),
    "pixart-sigma": Preset(TGateConfig(gate_step=0.6), "as pixart-alpha, whose architecture it has"),
    "pixart-sigma-v2": Preset(TGateConfig(gate_step=0.6, sp_interval=3, warm_up=2), _V2),
    "svd": Preset(TGateConfig(gate_step=0.4), "T-GATE, arXiv 2404.02747v2: 10 of 25"),
    "lcm-sdxl": Preset(TGateConfig(gate_step=0.25), _LCM),
    "lcm-pixart": Preset(TGateConfig(gate_step=0.25), _LCM),
    "other-unet": Preset(TGateConfig(gate_step=0.4), "as sd-1.5: the papers have no other UNets of pictures"),
    "other-transformer": Preset(TGateConfig(gate_step=0.6), "as pixart-alpha: the papers have no other transformers"),
    "looks": Preset(
        TGateConfig(gate_step=0.2, look_interval=5),
        "docs/quality.md: measured on the embedded UNet under seven samplers",
    ),
    "auto": Preset(
        TGateConfig(gate_step="auto"), "docs/choosing.md: the tolerance was found on the embedded UNet, under DDIM"
    ),
}


# How the names of pipeline classes begin, before the part that names the task, and the preset for each. The first
# that fits counts.
KINDS = {
    "StableDiffusion3": "other-transformer",
    "StableDiffusionLatentUpscale": "other-unet",  # it embeds its noise level as other models embed their guidance
    "StableDiffusionXL": "sdxl",
    "StableDiffusion": "sd-1.5",
    "StableVideoDiffusion": "svd",
    "LatentConsistencyModel": "lcm-sdxl",
    "PixArtAlpha": "pixart-alpha",
    "PixArtSigma": "pixart-sigma",
}
SD_2_TEXT_WIDTH = 1024  # width of the text that Stable Diffusion 2's UNet attends to; it is 768 in Stable Diffusion 1


def preset(name: str) -> TGateConfig:
    """Return the settings of a preset.

        tgate = apply_tgate(pipe, preset("sdxl"))

    Args:
        name: Name of the preset, a key of `PRESETS` in upper or lower case.

    Raises:
        ConfigError: There is no preset of this name.
    """
    return PRESETS[preset_name("name", name)].config


def preset_name(argument: str, value: object) -> str:
    """Return the key of `PRESETS` that an argument names.

    Args:
        argument: Name of the argument, for the error.
        value: Value of the argument.

    Raises:
        ConfigError: The value names no preset.
    """
    name = value.lower() if isinstance(value, str) else value
    if not isinstance(name, str) or name not in PRESETS:
        raise ConfigError(f"`{argument}` must be one of {', '.join(PRESETS)}, got {value!r}. Pass one of these.")
    return name


def suitable_preset(pipe: Any, denoiser: Any) -> str:
    """Return the key of `PRESETS` that suits a pipeline as it is now, by its class, its denoiser and its scheduler.

    Args:
        pipe: The pipeline.
        denoiser: Network that the pipeline's loop evaluates first.
    """
    denoiser = getattr(denoiser, "_orig_mod", denoiser)  # what `torch.compile` was given
    settings = getattr(denoiser, "config", None)
    # priors inherit from a mixin that loads UNets
    is_unet = any("UNet" in name and not name.endswith("Mixin") for name in class_names(denoiser))
    name = next(_kinds(pipe), "other-unet" if is_unet else "other-transformer")
    embeds_guidance = name != "other-unet" and getattr(settings, "time_cond_proj_dim", None) is not None
    if embeds_guidance or "LCMScheduler" in class_names(getattr(pipe, "scheduler", None)):
        return "lcm-sdxl" if is_unet else "lcm-pixart"
    if name == "sd-1.5" and getattr(settings, "cross_attention_dim", None) == SD_2_TEXT_WIDTH:
        return "sd-2.1"
    return name


def _kinds(pipe: Any) -> Iterator[str]:
    for name in class_names(pipe):
        for begin, kind in KINDS.items():
            if re.match(rf"{begin}\w*Pipeline", name):  # not a mixin, which other pipelines inherit from too
                yield kind
