"""Gated attention processors: a processor's own class, plus a gate that decides whether it has to compute."""

import inspect
import weakref
from typing import Any, ClassVar

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tgate_processors._disguise import Disguised, disguised
from tgate_processors._folding import half_of, mean_of_halves
from tgate_processors._gated_layers import GatedLayers, LayerState
from tgate_processors._layers import (
    attention_layers,
    check_has_cross_attention,
    check_merges_no_cross_attention,
    cross_attention_layers,
    is_joint,
)
from tgate_processors._modes import HALVING, AttentionMode
from tgate_processors.errors import UnsupportedPipelineError
from tgate_processors.gate import Gate


class GatedProcessor(metaclass=Disguised):
    """Mixin over an attention processor: computes with the class below it, stores the output, or reuses it.

    What is stored is the output before the layer's residual connection and rescaling, `(batch, tokens, channels)`;
    a layer with either adds its own fresh residual on reuse. A layer reuses an output only where it fits the input:
    rows, tokens, channels, device, and which call of the layer in the evaluation it is. Otherwise it computes, and
    stores anew. Without a gate it only computes.

    It has the attributes of the processor that it stands in for, the same and not copies: what is set on either is set
    on both. It is copied and pickled as that processor, and its class compares equal to that processor's.

    Attributes:
        stands_over: The processor class below; looked up in every call, since it may be patched.
        below: The processor that it stands in for; None where diffusers made this one anew, by its class.
        layers: The gated layers that it is one of; None where diffusers made it anew.
        is_cross_attention: Whether its layer attends to the prompt.
        state: What it does in the evaluation that is going on.
    """

    __slots__ = ("below", "is_cross_attention", "layers", "state")

    stands_over: ClassVar[Any]
    below: Any
    layers: GatedLayers | None
    is_cross_attention: bool
    state: LayerState

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        self = super().__new__(cls)
        self._gate(None, None, False)
        return self

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if GatedProcessor not in cls.__bases__:
            return  # a subclass of a gated class is gated already
        mro = cls.__mro__
        cls.stands_over = below = mro[mro.index(GatedProcessor) + 1]

        def __call__(self: Any, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            state = self.state
            if state.mode is AttentionMode.COMPUTE:
                return below.__call__(self, attn, hidden_states, *args, **kwargs)
            call = state.calls
            state.calls = call + 1
            if state.mode is AttentionMode.REUSE and call < len(state.stored):
                stored = state.stored[call]
                if _fits(stored, hidden_states) and (state.offloads or stored.device == hidden_states.device):
                    return _as_output(attn, hidden_states, stored)
            output = below.__call__(self, attn, hidden_states, *args, **kwargs)
            _store(state, call, attn, hidden_states, output)
            return output

        setattr(cls, "__call__", __call__)  # noqa: B010  # one for each class, since each has a signature of its own
        carry_signature(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        below = ungated(self)
        return object.__new__, (type(below),), *below.__reduce_ex__(2)[2:]

    def _gate(self, below: Any, layers: GatedLayers | None, is_cross_attention: bool) -> None:
        # Past `torch.nn.Module.__setattr__`, where the class below is a module.
        object.__setattr__(self, "below", below)
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "is_cross_attention", is_cross_attention)
        object.__setattr__(self, "state", LayerState())


def _store(state: LayerState, call: int, attn: Any, hidden_states: torch.Tensor, output: torch.Tensor) -> None:
    if _rescales(attn):
        output = output * attn.rescale_output_factor
    if _adds_residual(attn):
        output = output - hidden_states
    if state.mode in HALVING:
        if output.shape[0] % 2:
            return  # no halves
        is_mean = state.mode is AttentionMode.STORE_MEAN
        output = mean_of_halves(output) if is_mean else half_of(output, first=state.keeps_first_half)
    state.new.append((call, output.to("cpu") if state.offloads else output))


def _fits(stored: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    """Whether an output has the input's rows and tokens; Lumina's has its channels by heads."""
    if hidden_states.ndim == 3:
        return stored.shape[:2] == hidden_states.shape[:2]
    return stored.shape == hidden_states.shape


def _as_output(attn: Any, hidden_states: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    output = stored.to(hidden_states.device)
    if _adds_residual(attn):
        output = output + hidden_states
    return output / attn.rescale_output_factor if _rescales(attn) else output


def _adds_residual(attn: Any) -> bool:
    return bool(getattr(attn, "residual_connection", False))


def _rescales(attn: Any) -> bool:
    return getattr(attn, "rescale_output_factor", 1.0) != 1.0


def carry_signature(cls: Any) -> None:
    """Have a gated class show the signature of the class below, as it is now.

    `Attention.forward` passes on only the keywords that the signature names, and asks for it in every call: a function
    that carries it answers much faster than one that has to be inspected.
    """
    signature = inspect.signature(cls.stands_over.__call__)
    if getattr(cls.__call__, "__signature__", None) != signature:
        cls.__call__.__signature__ = signature


class TGateAttnProcessor2_0(GatedProcessor, AttnProcessor2_0):  # type: ignore[misc]  # an untyped base
    """diffusers' default processor, gated."""


# A gated class lives as long as a processor of it, and does not keep the class below alive.
_GATED: weakref.WeakKeyDictionary[type, "weakref.ref[type]"] = weakref.WeakKeyDictionary()
_GATED[AttnProcessor2_0] = weakref.ref(TGateAttnProcessor2_0)


def gated_class(base: type) -> Any:
    """The gated class over a processor class: the same one at every call, while it is in use."""
    known = _GATED.get(base)
    cls = None if known is None else known()
    if cls is None:
        same = {"__module__": __name__, "__doc__": f"`{base.__name__}`, gated."}
        cls = disguised(base, f"TGate{base.__name__}", (GatedProcessor, base), same)
        _GATED[base] = weakref.ref(cls)
    return cls


def gated(processor: Any, layers: GatedLayers, *, is_cross_attention: bool) -> GatedProcessor:
    """A gated stand-in for `processor` in one layer, with its attributes."""
    cls = gated_class(type(processor))
    stand_in: GatedProcessor = cls.__new__(cls)
    object.__setattr__(stand_in, "__dict__", processor.__dict__)
    stand_in._gate(processor, layers, is_cross_attention)
    return stand_in


def ungated(processor: Any) -> Any:
    """The processor that a gated one stands in for; any other one is itself."""
    if not isinstance(processor, GatedProcessor):
        return processor
    below = processor.below
    if below is None:  # diffusers made it anew, by its class
        base = type(processor).stands_over
        below = base.__new__(base)
        object.__setattr__(below, "__dict__", processor.__dict__)
    return below


def gate_layers(network: torch.nn.Module, layers: GatedLayers, *, self_attention: bool) -> dict[str, Any]:
    """Processors for `set_processors`: gated ones, which `layers` holds from now on, and the others as they are.

    Args:
        network: A model with attention processors.
        layers: The gated layers of the network.
        self_attention: Whether self-attention is gated too.

    Raises:
        UnsupportedPipelineError: The network merges tokens around cross-attention, or has a processor whose maps are
            read in every step.
    """
    check_merges_no_cross_attention(network)
    cross = cross_attention_layers(network)
    processors: dict[str, Any] = {}
    for name, layer in attention_layers(network).items():
        processor: Any = layer.processor
        if not (isinstance(processor, GatedProcessor) and processor.layers is layers):
            processor = ungated(processor)
            _check_is_not_read(processor)
            if name in cross or (self_attention and not is_joint(layer)):
                processor = gated(processor, layers, is_cross_attention=name in cross)
        processors[name] = processor
    held = {name: processor for name, processor in processors.items() if isinstance(processor, GatedProcessor)}
    layers.hold(held)
    for cls in {type(processor) for processor in held.values()}:
        carry_signature(cls)  # a class below may have been patched since
    return processors


def gated_processors(denoiser: torch.nn.Module, gate: Gate) -> dict[str, Any]:
    """Processors for `denoiser.set_attn_processor(...)` in a loop of your own: gated where `gate` has to decide.

    Every cross-attention layer gets a gated stand-in for the processor that it has; self-attention layers too where
    the configuration reuses self-attention. The other layers keep the very processors that they have.

    Args:
        denoiser: A model with attention processors, such as `pipe.unet` or PixArt's `pipe.transformer`.
        gate: Decides what they do; `gate.start` begins a run.

    Raises:
        UnsupportedPipelineError: The denoiser has no cross-attention layer of its own, or a processor whose maps
            are read in every step.
    """
    check_has_cross_attention(denoiser)
    return gate_layers(denoiser, gate.layers, self_attention=gate.config.reuses_self_attention)


def ungated_processors(denoiser: torch.nn.Module) -> dict[str, Any]:
    """Processors for `denoiser.set_attn_processor(...)` that undo `gated_processors`: the ones that it had before."""
    return {name: ungated(layer.processor) for name, layer in attention_layers(denoiser).items()}


# Processors that keep the attention maps of every step for their pipeline, and how to do without, in diffusers 0.42.
READ_IN_EVERY_STEP = {
    "AttendExciteAttnProcessor": "Run Attend-and-Excite without T-GATE",
    "LEDITSCrossAttnProcessor": "Pass `use_cross_attn_mask=False, use_intersect_mask=False` to the pipeline",
    "Pix2PixZeroAttnProcessor": "Run pix2pix-zero without T-GATE",
}


def _check_is_not_read(processor: Any) -> None:
    name = type(processor).__name__
    if name in READ_IN_EVERY_STEP:
        raise UnsupportedPipelineError(
            f"`pipe` must not read its cross-attention in every step beside T-GATE, which reuses it, got layers with "
            f"{name}. {READ_IN_EVERY_STEP[name]}."
        )
