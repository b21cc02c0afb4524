"""What the gated layers of a network do in the evaluation that is going on: put in before it, taken out after it."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from tgate_processors._modes import AttentionMode, StepMode


Outputs = dict[str, list[Tensor]]  # of each layer by its name: one for each of its calls in an evaluation


class LayerState:
    """What one layer does in the evaluation that is going on. Between evaluations it computes.

    `torch.compile` guards on these, so they are few: the mode and what is stored, never the step.

    Attributes:
        mode: What the layer does.
        keeps_first_half: Which half of its output it keeps in the mode that stores a half.
        offloads: Whether it keeps its output in the host's memory.
        stored: What it may reuse, one output for each call, `(batch, tokens, channels)`.
        new: What it has stored, each with the number of the call.
        calls: How often it was called.
    """

    def __init__(self) -> None:
        self.rest()

    def rest(self) -> None:
        """Only compute, as between evaluations."""
        self.mode = AttentionMode.COMPUTE
        self.keeps_first_half = True
        self.offloads = False
        self.stored: Sequence[Tensor] = ()
        self.new: list[tuple[int, Tensor]] = []
        self.calls = 0


class GatedLayer(Protocol):
    """A gated processor, as its network knows it."""

    is_cross_attention: bool
    state: LayerState


class GatedLayers:
    """The gated layers of one network.

    Attributes:
        is_retired: Whether they were taken off the network. Processors that somebody kept only compute then.
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
        """The names of the cross-attention layers."""
        return self._cross.keys()

    def number_in(self, mode: AttentionMode, step: StepMode) -> int:
        """How many layers are in a mode in a step of this mode."""
        return len(self._cross) * (step.cross_attention is mode) + len(self._self) * (step.self_attention is mode)

    def hold(self, layers: Mapping[str, GatedLayer]) -> None:
        """Have these layers from now on."""
        self._cross = {name: layer for name, layer in layers.items() if layer.is_cross_attention}
        self._self = {name: layer for name, layer in layers.items() if not layer.is_cross_attention}

    def put_in(
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
            mode: What the layers do.
            stored: What they may reuse.
            keeps_first_half: Which half is kept in a mode that stores a half.
            offloads: Whether they keep their outputs in the host's memory.
            watched: Cross-attention layers that hand their outputs out, though they only compute.
        """
        for layers, its_mode in ((self._cross, mode.cross_attention), (self._self, mode.self_attention)):
            if its_mode is not AttentionMode.COMPUTE:
                for name, layer in layers.items():
                    state = layer.state
                    state.mode = its_mode
                    state.keeps_first_half = keeps_first_half
                    state.offloads = offloads
                    state.stored = stored.get(name, ())
                    self._busy.append((name, state))
        for name in watched:
            if name in self._cross and self._cross[name].state.mode is AttentionMode.COMPUTE:
                state = self._cross[name].state
                state.mode = AttentionMode.STORE
                self._busy.append((name, state))

    def take_out(self) -> "Taken":
        """End the evaluation: every layer only computes. Gives what they have stored."""
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
        """Interrupt the evaluation for a call from within it, which finds layers that only compute."""
        aside = [(state, dict(vars(state))) for _, state in self._busy]
        for state, _ in aside:
            state.rest()
        return aside

    def go_on(self, aside: list[tuple[LayerState, dict[str, Any]]]) -> None:
        """Go on with the evaluation that was set aside."""
        for state, values in aside:
            vars(state).update(values)


@dataclass
class Taken:
    """What layers stored in an evaluation.

    Args:
        cross_attention: The names of the cross-attention layers.
        new: The outputs of each layer that stored, each with the number of the call.
        missed: Layers that computed, though they were asked to reuse what did not fit.
    """

    cross_attention: Collection[str]
    new: dict[str, list[tuple[int, Tensor]]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
