"""State of a network's gated layers during an evaluation. It is put in before the evaluation and taken out after."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tgate_processors._modes import AttentionMode, StepMode


Outputs = dict[str, list[Tensor]]  # by layer name: an output for each call of the layer in an evaluation


class LayerState:
    """State of one layer during an evaluation. Between evaluations the layer only computes.

    `torch.compile` guards on the state, so it has the mode and the stored outputs but never the step.

    Attributes:
        mode: Mode of the layer.
        keeps_first_half: Whether the layer keeps the first half of its output in the mode that stores a half.
        offloads: Whether the layer keeps its output in the host's memory.
        stored: Outputs that the layer may reuse, one for each call, `(batch, tokens, channels)`.
        new: Outputs that the layer has stored in this evaluation, each with the number of the call.
        calls: Number of calls of the layer so far.
    """

    def __init__(self) -> None:
        self.rest()

    def rest(self) -> None:
        """Return to the state between evaluations, in which the layer only computes."""
        self.mode = AttentionMode.COMPUTE
        self.keeps_first_half = True
        self.offloads = False
        self.stored: Sequence[Tensor] = ()
        self.new: list[tuple[int, Tensor]] = []
        self.calls = 0


class GatedLayer(Protocol):
    """What a network uses of a gated processor."""

    is_cross_attention: bool
    state: LayerState


class GatedLayers:
    """Gated layers of one network.

    Attributes:
        is_retired: Whether the gate was removed from the network. A processor that a caller kept only computes then.
    """

    def __init__(self) -> None:
        self.is_retired = False
        self._cross: dict[str, GatedLayer] = {}
        self._self: dict[str, GatedLayer] = {}
        self._busy: list[tuple[str, LayerState]] = []

    def __len__(self) -> int:
        return len(self._cross) + len(self._self)

    @property
    def cross_attention(self) -> Collection[str]:
        """Names of the cross-attention layers."""
        return self._cross.keys()

    def number_in(self, mode: AttentionMode, step: StepMode) -> int:
        """Return the number of layers that are in a mode during a step."""
        return len(self._cross) * (step.cross_attention is mode) + len(self._self) * (step.self_attention is mode)

    def hold(self, layers: Mapping[str, GatedLayer]) -> None:
        """Replace the layers with these."""
        self._cross = {name: layer for name, layer in layers.items() if layer.is_cross_attention}
        self._self = {name: layer for name, layer in layers.items() if not layer.is_cross_attention}

    def begin(
        self,
        mode: StepMode,
        stored: Outputs,
        *,
        keeps_first_half: bool = True,
        offloads: bool = False,
        watched: Iterable[str] = (),
    ) -> None:
        """Begin an evaluation.

        Args:
            mode: Mode of the step.
            stored: Outputs that the layers may reuse.
            keeps_first_half: Whether the layers keep the first half of their outputs in a mode that stores a half.
            offloads: Whether the layers keep their outputs in the host's memory.
            watched: Names of cross-attention layers that store their outputs even if their mode is to compute.
        """
        for layers, layer_mode in ((self._cross, mode.cross_attention), (self._self, mode.self_attention)):
            if layer_mode is not AttentionMode.COMPUTE:
                for name, layer in layers.items():
                    state = layer.state
                    state.mode = layer_mode
                    state.keeps_first_half = keeps_first_half
                    state.offloads = offloads
                    state.stored = stored.get(name, ())
                    self._busy.append((name, state))
        for name in watched:
            if name in self._cross and self._cross[name].state.mode is AttentionMode.COMPUTE:
                state = self._cross[name].state
                state.mode = AttentionMode.STORE
                self._busy.append((name, state))

    def end(self) -> "Taken":
        """End the evaluation, after which every layer only computes. Return what the layers have stored."""
        taken = Taken(self._cross.keys())
        for name, state in self._busy:
            if state.new:
                taken.new[name] = state.new
                if state.mode is AttentionMode.REUSE:
                    taken.missed.append(name)
            state.rest()
        self._busy = []
        return taken

    def set_aside(self) -> list[tuple[LayerState, dict[str, Any]]]:
        """Interrupt the evaluation for a call made inside of it. The layers only compute until `go_on`.

        Returns:
            The interrupted state, for `go_on`.
        """
        aside = [(state, dict(vars(state))) for _, state in self._busy]
        for state, _ in aside:
            state.rest()
        return aside

    def go_on(self, aside: list[tuple[LayerState, dict[str, Any]]]) -> None:
        """Resume the evaluation that `set_aside` interrupted."""
        for state, values in aside:
            vars(state).update(values)


@dataclass
class Taken:
    """Outputs that the layers stored in an evaluation.

    Args:
        cross_attention: Names of the cross-attention layers.
        new: Outputs of each layer that stored, each with the number of the call.
        missed: Names of layers that computed instead of reusing, because their stored outputs did not fit.
    """

    cross_attention: Collection[str]
    new: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
