"""Putting gated processors on a network's layers, again where they were replaced, and taking them off."""

import warnings
from typing import Any

from tgate_processors._gated_layers import GatedLayers
from tgate_processors._layers import attention_layers, is_of_diffusers, set_processors
from tgate_processors.processors import GatedProcessor, gate_layers, ungated


def is_gated(network: Any) -> bool:
    """Whether any layer of the network belongs to a gate that is in use."""
    return any(_holder_of(layer.processor) is not None for layer in attention_layers(network).values())


class Installation:
    """The gated processors of one network.

    Args:
        network: A diffusers model whose attention layers have processors.

    Attributes:
        layers: The gated layers.
        processors: Those of all layers when they were gated last, without the gate; of somebody's own the class's
            name, since nothing shall keep it alive.
    """

    def __init__(self, network: Any) -> None:
        self.layers = GatedLayers()
        self.processors: dict[str, Any] = {}
        self._network = network
        self._below: dict[str, Any] = {}  # what the gated processors were put over

    def install(self, *, self_attention: bool) -> None:
        """Gate the layers whose processors are not ours, over whatever processor they have.

        Loading an IP-Adapter, fusing projections and others make processors anew: call this before each run.

        Args:
            self_attention: Whether self-attention is gated too.

        Raises:
            UnsupportedPipelineError: The network merges tokens around cross-attention, or has a processor whose maps
                are read in every step.
        """
        processors = gate_layers(self._network, self.layers, self_attention=self_attention)
        below = {name: ungated(processor) for name, processor in processors.items()}
        self._below = {name: p for name, p in below.items() if processors[name] is not p}
        set_processors(self._network, processors)
        self.processors = {name: p if is_of_diffusers(p) else type(p).__name__ for name, p in below.items()}

    def remove(self) -> None:
        """Put the processors below back, those of gates that are in use no more too. Safe to call twice.

        A processor that someone else has put in since stays, with a warning.
        """
        now = {name: layer.processor for name, layer in attention_layers(self._network).items()}
        foreign = [name for name, below in self._below.items() if _is_foreign(now.get(name), below)]
        set_processors(self._network, {name: self._without_gate(processor) for name, processor in now.items()})
        self._clean_what_fusing_remembers()
        self._below.clear()
        self.processors = {}
        self.layers.hold({})
        self.layers.is_retired = True
        if foreign:
            warnings.warn(
                f"{len(foreign)} attention processors were replaced while the pipeline was gated and stay as they "
                f"are, the first of them `{foreign[0]}`.",
                stacklevel=5,
            )

    def _without_gate(self, processor: Any) -> Any:
        """The processor below, unless it is of another gate that is in use."""
        return ungated(processor) if _holder_of(processor) in (None, self.layers) else processor

    def _clean_what_fusing_remembers(self) -> None:
        # `unfuse_qkv_projections` puts back what it found
        remembered = getattr(self._network, "original_attn_processors", None)
        if isinstance(remembered, dict) and any(isinstance(p, GatedProcessor) for p in remembered.values()):
            self._network.original_attn_processors = {n: self._without_gate(p) for n, p in remembered.items()}


def _is_foreign(processor: Any, below: Any) -> bool:
    return not isinstance(processor, GatedProcessor) and processor is not below


def _holder_of(processor: Any) -> GatedLayers | None:
    """The gate in use that a processor belongs to; diffusers, or somebody who kept it, may have put in one of none."""
    layers = processor.layers if isinstance(processor, GatedProcessor) else None
    return None if layers is None or layers.is_retired else layers
