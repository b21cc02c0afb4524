"""Putting gated processors on a denoiser's layers, again where they were replaced, and taking them off."""

import warnings
from typing import Any

from tgate_processors.gate import Gate
from tgate_processors.processors import GatedProcessor, attention_layers, gated_processors, ungated


def is_gated(denoiser: Any) -> bool:
    """Whether any layer of the denoiser belongs to a gate."""
    return any(_gate_of(layer.processor) is not None for layer in attention_layers(denoiser).values())


class Installation:
    """The gated processors of one denoiser, and the processors that they stand in for.

    Args:
        denoiser: A diffusers model with `attn_processors`.
        gate: The gate of the processors.
    """

    def __init__(self, denoiser: Any, gate: Gate) -> None:
        self.denoiser = denoiser
        self.gate = gate
        self._originals: dict[str, Any] = {}

    def install(self) -> None:
        """Gate every layer whose processor is not ours, over whatever processor it has.

        Loading an IP-Adapter, fusing projections and others make processors anew: call this before each run.

        Raises:
            UnsupportedPipelineError: The denoiser has no cross-attention layer of its own.
        """
        layers = attention_layers(self.denoiser)
        if self._originals and all(self._is_ours(layers[name].processor) for name in self._originals):
            return
        processors = gated_processors(self.denoiser, self.gate)
        for name, layer in layers.items():
            if isinstance(processors[name], GatedProcessor) and not self._is_ours(layer.processor):
                self._originals[name] = ungated(layer.processor)
        self.denoiser.set_attn_processor(processors)

    def remove(self) -> None:
        """Put the original processors back and free the caches. Safe to call twice.

        A processor that someone else has put in since stays, with a warning.
        """
        self.gate.stop()
        if not self._originals:
            return
        layers = attention_layers(self.denoiser)
        foreign = [name for name in self._originals if self._is_foreign(name, layers[name].processor)]
        self.denoiser.set_attn_processor(
            {name: self._original(name, layer.processor) for name, layer in layers.items()}
        )
        self._originals.clear()
        self.gate.layers = []
        if foreign:
            warnings.warn(
                f"{len(foreign)} attention processors were replaced while the pipeline was gated and stay as they "
                f"are, the first of them `{foreign[0]}`.",
                stacklevel=3,
            )

    def _original(self, name: str, processor: Any) -> Any:
        # diffusers may have made a gated processor anew, by its class: that one is nobody's, it loses its gate
        return self._originals[name] if self._is_ours(processor) else ungated(processor)

    def _is_foreign(self, name: str, processor: Any) -> bool:
        return not isinstance(processor, GatedProcessor) and processor is not self._originals[name]

    def _is_ours(self, processor: Any) -> bool:
        return _gate_of(processor) is self.gate


def _gate_of(processor: Any) -> Gate | None:
    return processor.gate if isinstance(processor, GatedProcessor) else None
