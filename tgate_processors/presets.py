"""Named settings for the models of the documentation, each with its source."""

from dataclasses import dataclass

from tgate_processors.errors import ConfigError
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class Preset:
    """Settings and where they come from.

    Args:
        config: The settings; gate steps are fractions, for runs of any length.
        source: Who suggests them.
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
    "looks": Preset(
        TGateConfig(gate_step=0.2, look_interval=5),
        "docs/quality.md: measured on the embedded UNet under seven samplers",
    ),
    "auto": Preset(
        TGateConfig(gate_step="auto"), "docs/choosing.md: the tolerance was found on the embedded UNet, under DDIM"
    ),
}


def preset(name: str) -> TGateConfig:
    """The settings of this name, a key of `PRESETS`.

        tgate = apply_tgate(pipe, preset("sdxl"))

    Raises:
        ConfigError: There are none.
    """
    if name not in PRESETS:
        raise ConfigError(f"`name` must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name].config
