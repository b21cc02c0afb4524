"""T-GATE for diffusers pipelines, as attention processors."""

from tgate_processors.errors import ConfigError, MissingPackageError, StateError, TGateError, UnsupportedPipelineError
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
from tgate_processors.presets import preset
from tgate_processors.processors import TGateAttnProcessor2_0, gated_processors, ungated_processors
from tgate_processors.schedule import TGateConfig


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
