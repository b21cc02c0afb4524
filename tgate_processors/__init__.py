"""T-GATE for diffusers pipelines, as attention processors."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tgate_processors.errors import ConfigError, MissingPackageError, StateError, TGateError, UnsupportedPipelineError
from tgate_processors.presets import preset
from tgate_processors.schedule import TGateConfig


if TYPE_CHECKING:
    from tgate_processors.gate import Gate
    from tgate_processors.handle import TGate, apply_tgate
    from tgate_processors.loaders import (
        TgatePixArtAlphaLoader,
        TgatePixArtLoader,
        TgatePixArtSigmaLoader,
        TgateSDDeepCacheLoader,
        TgateSDLoader,
        TgateSDXLDeepCacheLoader,
        TgateSDXLLoader,
        TgateSVDLoader,
    )
    from tgate_processors.measure.convergence import Convergence, measure_convergence
    from tgate_processors.processors import TGateAttnProcessor2_0, gated_processors, ungated_processors


__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Convergence",
    "Gate",
    "MissingPackageError",
    "StateError",
    "TGate",
    "TGateAttnProcessor2_0",
    "TGateConfig",
    "TGateError",
    "TgatePixArtAlphaLoader",
    "TgatePixArtLoader",
    "TgatePixArtSigmaLoader",
    "TgateSDDeepCacheLoader",
    "TgateSDLoader",
    "TgateSDXLDeepCacheLoader",
    "TgateSDXLLoader",
    "TgateSVDLoader",
    "UnsupportedPipelineError",
    "apply_tgate",
    "gated_processors",
    "measure_convergence",
    "preset",
    "ungated_processors",
]
# These modules import torch and diffusers, which is slow. They are imported on first use, so that the command answers
# `--help` and Ctrl-C at once.
_MODULES = ("gate", "handle", "loaders", "measure.convergence", "processors")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            value = vars(import_module(f"{__name__}.{module}")).get(name)
            if value is not None:
                globals()[name] = value
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
