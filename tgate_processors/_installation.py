"""Installation of gated processors on a network's layers, before every run, and their removal."""

import warnings
from typing import Any

from tgate_processors._gated_layers import GatedLayers
from tgate_processors._layers import attention_layers, is_of_diffusers, set_processors
from tgate_processors.processors import GatedProcessor, gate_layers, ungated


def is_gated(network: Any) -> bool:
    """Return whether any layer of the network belongs to a gate in use."""
    return any(_holder_of(layer.processor) is not None for layer in attention_layers(network).values())


class Installation:
    """Gated processors of one network.

    Args:
        network: A diffusers model whose attention layers have processors.

    Attributes:
        layers: The gated layers.
        processors: Processors of all layers at the last installation, without the gate. If a processor's class is not
            of diffusers, this has the name of the class, so as not to keep the processor alive.
    """

    def __init__(self, network: Any) -> None:
        self.layers = GatedLayers()
        self.processors: dict[str, Any] = {}
        self._network = network
        self._below: dict[str, Any] = {}  # by layer name: the processor that the gated one stands in for

    def install(self, *, self_attention: bool) -> None:
        """Set a gated processor, over the processor that is there, on each layer that this gate does not gate yet.

        Call this before each run, because `load_ip_adapter`, `fuse_qkv_projections` and others make new processors.

        Args:
            self_attention: Whether self-attention is gated too.

        Raises:
            UnsupportedPipelineError: The network merges tokens around cross-attention, or has a processor whose maps
                the pipeline reads in every step.
        """
        processors = gate_layers(self._network, self.layers, self_attention=self_attention)
        below = {name: ungated(processor) for name, processor in processors.items()}
        self._below = {name: p for name, p in below.items() if processors[name] is not p}
        set_processors(self._network, processors)
        self.processors = {name: p if is_of_diffusers(p) else type(p).__name__ for name, p in below.items()}

    def remove(self) -> None:
        """Restore the processors that were there before the gate. Safe to call twice.

        This also replaces gated processors of gates that are no longer in use. If the caller or another library has
        set a processor on a gated layer since, that processor stays, with a warning.
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
        """Return the processor that this one stands in for, or this one if it belongs to another gate in use."""
        return ungated(processor) if _holder_of(processor) in (None, self.layers) else processor

    def _clean_what_fusing_remembers(self) -> None:
        # `unfuse_qkv_projections` restores the processors that it finds here
        remembered = getattr(self._network, "original_attn_processors", None)
        if isinstance(remembered, dict) and any(isinstance(p, GatedProcessor) for p in remembered.values()):
            self._network.original_attn_processors = {n: self._without_gate(p) for n, p in remembered.items()}


def _is_foreign(processor: Any, below: Any) -> bool:
    return not isinstance(processor, GatedProcessor) and processor is not below


def _holder_of(processor: Any) -> GatedLayers | None:
    """Return the gated layers, still in use, that a processor belongs to; None if it belongs to none.

    A gated processor belongs to none if diffusers made it from a gated class, or if the caller kept it from a gate
    that was removed.
    """
    layers = processor.layers if isinstance(processor, GatedProcessor) else None
    return None if layers is None or layers.is_retired else layers
