"""T-GATE for diffusers pipelines, as attention processors."""

from tgate_processors.errors import ConfigError, StateError, TGateError, UnsupportedPipelineError
from tgate_processors.gate import Gate
from tgate_processors.handle import TGate, apply_tgate
from tgate_processors.processors import TGateAttnProcessor2_0, gated_processors
from tgate_processors.schedule import TGateConfig


__all__ = [
    "ConfigError",
    "Gate",
    "StateError",
    "TGate",
    "TGateAttnProcessor2_0",
    "TGateConfig",
    "TGateError",
    "UnsupportedPipelineError",
    "apply_tgate",
    "gated_processors",
]
