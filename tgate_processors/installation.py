"""Putting gated processors on a network's layers, again where they were replaced, and taking them off."""

import warnings
from typing import Any

from tgate_processors.gate import Gate
from tgate_processors.layers import attention_layers, set_processors
from tgate_processors.processors import GatedProcessor, gated_processors, ungated


def is_gated(network: Any) -> bool:
    """Whether any layer of the network belongs to a gate."""
    return any(_gate_of(layer.processor) is not None for layer in attention_layers(network).values())


class Installation:
    """The gated processors of one network.

    Args:
        network: A diffusers model whose attention layers have processors.
        gate: The gate of the processors.
    """

    def __init__(self, network: Any, gate: Gate) -> None:
        self.network = network
        self.gate = gate
        self._below: dict[str, Any] = {}  # what the gated processors were put over

    def install(self) -> None:
        """Gate every layer whose processor is not ours, over whatever processor it has.

        Loading an IP-Adapter, fusing projections and others make processors anew: call this before each run.

        Raises:
            UnsupportedPipelineError: The network has no cross-attention layer of its own.
        """
        processors = gated_processors(self.network, self.gate)
        self._below.update({name: p.below for name, p in processors.items() if isinstance(p, GatedProcessor)})
        set_processors(self.network, processors)

    def remove(self) -> None:
        """Put the processors below back and free the caches. Safe to call twice.

        A processor that someone else has put in since stays, with a warning.
        """
        self.gate.stop()
        if not self._below:
            return
        now = {name: layer.processor for name, layer in attention_layers(self.network).items()}
        foreign = [name for name, below in self._below.items() if _is_foreign(now[name], below)]
        set_processors(self.network, {name: self._without_gate(processor) for name, processor in now.items()})
        self._clean_what_fusing_remembers()
        self._below.clear()
        self.gate.layers = []
        if foreign:
            warnings.warn(
                f"{len(foreign)} attention processors were replaced while the pipeline was gated and stay as they "
                f"are, the first of them `{foreign[0]}`.",
                stacklevel=4,
            )

    def _without_gate(self, processor: Any) -> Any:
        # diffusers may have made a gated processor anew, by its class: that one is nobody's and loses its gate
        return ungated(processor) if _gate_of(processor) in (None, self.gate) else processor

    def _clean_what_fusing_remembers(self) -> None:
        # `unfuse_qkv_projections` puts back what it found
        remembered = getattr(self.network, "original_attn_processors", None)
        if isinstance(remembered, dict) and any(isinstance(p, GatedProcessor) for p in remembered.values()):
            self.network.original_attn_processors = {n: self._without_gate(p) for n, p in remembered.items()}


def _is_foreign(processor: Any, below: Any) -> bool:
    return not isinstance(processor, GatedProcessor) and processor is not below


def _gate_of(processor: Any) -> Gate | None:
    return processor.gate if isinstance(processor, GatedProcessor) else None
