"""Gated attention processors: a processor's own class with a gate that decides whether the processor computes."""

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
    """Mixin for an attention processor. It computes with the class below it, stores the output, or reuses it.

    The stored output is the one before the layer's residual connection and rescaling, `(batch, tokens, channels)`. A
    layer with either adds its own fresh residual when it reuses. A layer reuses an output only if it fits the input:
    it has the same rows, tokens, channels and device, and comes from the layer's call of the same number in an
    evaluation. Otherwise the layer computes and stores again. Without a gate it only computes.

    A gated processor shares its attributes with the processor that it stands in for, so setting an attribute on one
    sets it on the other. It is copied and pickled as that processor, and its class compares equal to that processor's.

    Attributes:
        stands_over: The processor class below. Every call looks up its methods, since the class may be patched.
        below: The processor that this one stands in for; None if diffusers made this one from its class.
        layers: The gated layers that this one belongs to; None if diffusers made this one from its class.
        is_cross_attention: Whether the layer attends to the prompt.
        state: State of the layer during an evaluation.
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

        setattr(cls, "__call__", __call__)  # noqa: B010  # each class has its own, since each has its own signature
        carry_signature(cls)

    def __reduce_ex__(self, protocol: Any) -> Any:
        below = ungated(self)
        return object.__new__, (type(below),), *below.__reduce_ex__(2)[2:]

    def _gate(self, below: Any, layers: GatedLayers | None, is_cross_attention: bool) -> None:
        # Not by `torch.nn.Module.__setattr__`, if the class below is a module.
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
            return  # the batch has no halves
        is_mean = state.mode is AttentionMode.STORE_MEAN
        output = mean_of_halves(output) if is_mean else half_of(output, first=state.keeps_first_half)
    state.new.append((call, output.to("cpu") if state.offloads else output))


def _fits(stored: torch.Tensor, hidden_states: torch.Tensor) -> bool:
    """Return whether an output has the input's rows and tokens. In Lumina the channels are split into heads."""
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
    """Set the signature of a gated class's `__call__` to that of the class below, as it is now.

    `Attention.forward` passes on only the keywords that the signature names, and asks for the signature in every call.
    A function that carries its signature answers much faster than one that has to be inspected.
    """
    signature = inspect.signature(cls.stands_over.__call__)
    if getattr(cls.__call__, "__signature__", None) != signature:
        cls.__call__.__signature__ = signature


class TGateAttnProcessor2_0(GatedProcessor, AttnProcessor2_0):  # type: ignore[misc]  # an untyped base
    """The default processor of diffusers, gated."""


# Weak references: a gated class lives as long as its processors, and does not keep the class below alive.
_GATED: weakref.WeakKeyDictionary[type, "weakref.ref[type]"] = weakref.WeakKeyDictionary()
_GATED[AttnProcessor2_0] = weakref.ref(TGateAttnProcessor2_0)


def gated_class(base: type) -> Any:
    """Return the gated class for a processor class. While that class is in use, every call returns the same one."""
    known = _GATED.get(base)
    cls = None if known is None else known()
    if cls is None:
        same = {"__module__": __name__, "__doc__": f"`{base.__name__}`, gated."}
        cls = disguised(base, f"TGate{base.__name__}", (GatedProcessor, base), same)
        _GATED[base] = weakref.ref(cls)
    return cls


def gated(processor: Any, layers: GatedLayers, *, is_cross_attention: bool) -> GatedProcessor:
    """Return a gated processor that stands in for `processor` in one layer and shares its attributes."""
    cls = gated_class(type(processor))
    stand_in: GatedProcessor = cls.__new__(cls)
    object.__setattr__(stand_in, "__dict__", processor.__dict__)
    stand_in._gate(processor, layers, is_cross_attention)
    return stand_in


def ungated(processor: Any) -> Any:
    """Return the processor that a gated one stands in for. Return any other processor as it is."""
    if not isinstance(processor, GatedProcessor):
        return processor
    below = processor.below
    if below is None:  # diffusers made it from its class
        base = type(processor).stands_over
        below = base.__new__(base)
        object.__setattr__(below, "__dict__", processor.__dict__)
    return below


def gate_layers(network: torch.nn.Module, layers: GatedLayers, *, self_attention: bool) -> dict[str, Any]:
    """Return the processors to set with `set_processors`. Those to gate are gated, and the others are as they were.

    Args:
        network: A model with attention processors.
        layers: Gated layers of the network. Afterwards they hold the gated processors.
        self_attention: Whether self-attention is gated too.

    Raises:
        UnsupportedPipelineError: The network merges tokens around cross-attention, or has a processor whose maps the
            pipeline reads in every step.
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
        carry_signature(cls)  # the class below may have been patched since
    return processors


def gated_processors(denoiser: torch.nn.Module, gate: Gate) -> dict[str, Any]:
    """Return processors for `denoiser.set_attn_processor(...)` in a denoising loop of your own.

    Every cross-attention layer gets a gated processor, which stands in for the one that it has. Self-attention layers
    get one too if the configuration reuses self-attention. The other layers keep their processors.

    Args:
        denoiser: A model with attention processors, such as `pipe.unet` or PixArt's `pipe.transformer`.
        gate: Gate that decides whether the layers compute, store or reuse. `gate.start` begins a run.

    Raises:
        UnsupportedPipelineError: The denoiser has no cross-attention layer of its own, or it merges tokens around
            cross-attention, or it has a processor whose maps the pipeline reads in every step.
    """
    check_has_cross_attention(denoiser)
    return gate_layers(denoiser, gate.layers, self_attention=gate.config.reuses_self_attention)


def ungated_processors(denoiser: torch.nn.Module) -> dict[str, Any]:
    """Return processors for `denoiser.set_attn_processor(...)` that undo `gated_processors`.

    They are the processors that the denoiser had before.
    """
    return {name: ungated(layer.processor) for name, layer in attention_layers(denoiser).items()}


# Processors of diffusers 0.42 that keep the attention maps of every step for their pipeline, and what to do instead.
READ_IN_EVERY_STEP = {
    "AttendExciteAttnProcessor": "Run Attend-and-Excite without T-GATE",
    "LEDITSCrossAttnProcessor": "Pass `use_cross_attn_mask=False, use_intersect_mask=False` to the pipeline",
    "Pix2PixZeroAttnProcessor": "Run pix2pix-zero without T-GATE",
}


def _check_is_not_read(processor: Any) -> None:
    name = type(processor).__name__
    if name in READ_IN_EVERY_STEP:
        raise UnsupportedPipelineError(
            f"`pipe` must not read its cross-attention maps in every step, because T-GATE reuses outputs and computes "
            f"no maps after the gate, got layers with {name}. {READ_IN_EVERY_STEP[name]}."
        )
