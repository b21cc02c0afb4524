"""Gated attention processors: a processor's own class, plus a gate that decides whether it has to compute."""

import functools
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from tgate_processors.errors import UnsupportedPipelineError
from tgate_processors.gate import Gate
from tgate_processors.layers import attention_layers, check_can_be_gated, cross_attention_layers, is_joint
from tgate_processors.schedule import AttentionMode


class GatedProcessor:
    """Mixin over an attention processor: computes with the class below it, stores the output, or reuses it.

    What is stored is the output before the layer's residual connection and rescaling, `(batch, tokens, channels)`;
    a layer with either adds its own fresh residual on reuse. A layer that was passed over in the step that stores
    (DeepCache evaluates few layers in most steps) computes and stores in the first step that would reuse. Without a
    gate the processor only computes, so a gated class can be made as diffusers makes processors anew
    (`type(processor)()`).
    """

    gate: Gate | None = None
    below: Any = None  # the processor that this one stands in for
    is_cross_attention: bool = False
    is_watched: bool = False  # whether the gate looks at its output to decide when to close
    cached: torch.Tensor | None = None
    owns_cached: bool = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if GatedProcessor not in cls.__bases__:
            return  # a subclass of a gated class is gated already
        below = super().__call__  # type: ignore[misc]  # the class below is callable

        # `Attention.forward` passes on only the keywords that the signature names, so it must be the one below.
        @functools.wraps(below)
        def __call__(
            self: GatedProcessor,
            attn: Any,
            hidden_states: torch.Tensor,
            *args: Any,
            **kwargs: Any,
        ) -> torch.Tensor:
            if self.reuses:
                return self._reuse(attn, hidden_states)
            mode = self.mode
            output: torch.Tensor = below(self, attn, hidden_states, *args, **kwargs)
            if mode is not AttentionMode.COMPUTE:
                self._store(attn, hidden_states, output, mode)
            return output

        cls.__call__ = __call__  # type: ignore[method-assign]  # a signature for each class

    @property
    def mode(self) -> AttentionMode:
        """What the layer does in this step."""
        return AttentionMode.COMPUTE if self.gate is None else self.gate.mode_of(self)

    @property
    def reuses(self) -> bool:
        """Whether a call now returns what is stored."""
        return self.mode is AttentionMode.REUSE and self.cached is not None

    @property
    def _is_offloaded(self) -> bool:
        return self.gate is not None and self.gate.config.offload_cache

    def _store(self, attn: Any, hidden_states: torch.Tensor, output: torch.Tensor, mode: AttentionMode) -> None:
        if _rescales(attn):
            output = output * attn.rescale_output_factor
        if _adds_residual(attn):
            output = output - hidden_states
        assert self.gate is not None
        output = self.gate.kept(output, mode)
        # what is watched is looked at after the step, where it is
        self.cached = output.to("cpu") if self._is_offloaded and not self.is_watched else output
        self.owns_cached = False

    def _reuse(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        output = self.cached
        assert output is not None
        if self._is_offloaded:
            output = output.to(hidden_states.device)
        if _adds_residual(attn):
            output = output + hidden_states
        return output / attn.rescale_output_factor if _rescales(attn) else output


def _adds_residual(attn: Any) -> bool:
    return bool(getattr(attn, "residual_connection", False))


def _rescales(attn: Any) -> bool:
    return getattr(attn, "rescale_output_factor", 1.0) != 1.0


class TGateAttnProcessor2_0(GatedProcessor, AttnProcessor2_0):  # type: ignore[misc]  # an untyped base
    """diffusers' default processor, gated."""


@functools.cache
def gated_class(base: Any) -> type[GatedProcessor]:
    """The gated class over a processor class: the same one at every call."""
    if base is AttnProcessor2_0:
        return TGateAttnProcessor2_0
    doc = f"`{base.__name__}`, gated."
    return type(f"TGate{base.__name__}", (GatedProcessor, base), {"__module__": __name__, "__doc__": doc})


def gated(processor: Any, gate: Gate, *, is_cross_attention: bool) -> GatedProcessor:
    """A gated copy of `processor` with the same attributes, for one layer."""
    cls = gated_class(processor.__class__)
    copy = cls.__new__(cls)
    copy.__dict__.update(vars(processor))
    vars(copy).update(gate=gate, below=processor, is_cross_attention=is_cross_attention)
    return copy


def ungated(processor: Any) -> Any:
    """The processor that a gated one stands in for, with the attributes that were set since; others are themselves."""
    if not isinstance(processor, GatedProcessor):
        return processor
    below = processor.below
    if below is None:  # diffusers made it anew, by its class
        mro = type(processor).__mro__
        base: Any = mro[mro.index(GatedProcessor) + 1]
        below = base.__new__(base)
    below.__dict__.update({k: v for k, v in vars(processor).items() if k not in GatedProcessor.__annotations__})
    return below


def gated_processors(denoiser: torch.nn.Module, gate: Gate) -> dict[str, Any]:
    """Processors for `denoiser.set_attn_processor(...)`: gated where `gate` has something to decide.

    Every cross-attention layer gets a gated copy of the processor that it has; self-attention layers too where
    the configuration reuses self-attention. The other layers keep the very processors that they have, and so do
    those that `gate` has already.

    Args:
        denoiser: A model with attention processors, such as `pipe.unet` or PixArt's `pipe.transformer`.
        gate: Moves the processors from step to step; they become its layers.

    Raises:
        UnsupportedPipelineError: The denoiser has no cross-attention layer of its own, or a processor whose maps
            are read in every step.
    """
    check_can_be_gated(denoiser)
    layers = attention_layers(denoiser)
    cross = cross_attention_layers(denoiser)
    processors = {}
    for name, layer in layers.items():
        processor: Any = layer.processor
        is_ours = isinstance(processor, GatedProcessor) and processor.gate is gate
        if not is_ours:
            processor = ungated(processor)
            _check_is_not_read(processor)
            if name in cross or (gate.config.reuses_self_attention and not is_joint(layer)):
                processor = gated(processor, gate, is_cross_attention=name in cross)
        processors[name] = processor
    gate.layers = [processor for processor in processors.values() if isinstance(processor, GatedProcessor)]
    return processors


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
