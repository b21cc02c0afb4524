"""The attention outputs that a run keeps of one network, call by call of a timestep."""

from dataclasses import dataclass, field

from torch import Tensor

from tgate_processors._gated_layers import Outputs, Taken
from tgate_processors._guidance import Whole
from tgate_processors._modes import HALVING, AttentionMode, StepMode


@dataclass
class Stored:
    """What the layers of one kind stored: their outputs, and the batch that these are of."""

    batch: int
    outputs: Outputs = field(default_factory=dict)


class Store:
    """What is stored, by whether it is of cross-attention and by which call for a timestep stored it."""

    def __init__(self) -> None:
        self._stored: dict[tuple[bool, int], Stored] = {}

    @property
    def has_cross_attention(self) -> bool:
        """Whether cross-attention was stored in the first call for a timestep."""
        return (True, 0) in self._stored

    @property
    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [tensor for one in self._stored.values() for outputs in one.outputs.values() for tensor in outputs]

    def offer(self, call: int, mode: StepMode) -> Outputs:
        """What the layers may reuse in a call."""
        offered: Outputs = {}
        for is_cross, its_mode in kinds(mode):
            if its_mode is AttentionMode.REUSE and (is_cross, call) in self._stored:
                offered |= self._stored[is_cross, call].outputs
        return offered

    def keep(self, call: int, mode: StepMode, batch: int, taken: Taken) -> None:
        """Keep what layers that store, or had nothing that fits, put out in a call of this batch."""
        for is_cross, its_mode in kinds(mode):
            if its_mode is AttentionMode.COMPUTE:
                continue
            halves = its_mode in HALVING
            stored = self._stored.setdefault((is_cross, call), Stored(batch))
            stored.batch = batch // 2 if halves else batch
            for name, new in taken.new.items():
                # Nobody knows which rows are which branch's where a layer is called several times.
                if (name in taken.cross_attention) is is_cross and not (halves and len(new) > 1):
                    stored.outputs[name] = _updated(stored.outputs.get(name, []), new)

    def drop(self, call: int, mode: StepMode, *, keeps_skipped: bool) -> None:
        """Let go what is not read again: only a store comes right before a reuse.

        Args:
            call: Which call for a timestep it is.
            mode: What it does.
            keeps_skipped: Whether layers are skipped, as beside DeepCache, and keep what they have until they are not.
        """
        for is_cross, its_mode in kinds(mode):
            if its_mode is AttentionMode.COMPUTE or (its_mode.stores and not keeps_skipped):
                self._stored.pop((is_cross, call), None)

    def fit(self, call: int, batch: int, strategy: Whole, *, is_folded: bool) -> None:
        """Make what was stored before the gate fit an evaluation of one branch after it."""
        for is_cross in (True, False):
            calls = sorted(number for kind, number in self._stored if kind is is_cross)
            if len(calls) > 1 and strategy.leaves_out(1):
                merged = strategy.merge([self._stored.pop((is_cross, number)).outputs for number in calls])
                self._stored[is_cross, 0] = Stored(batch, merged)
            stored = self._stored.get((is_cross, call))
            if is_folded and stored is not None and stored.batch == 2 * batch:
                stored.outputs = {name: list(map(strategy.reduce, one)) for name, one in stored.outputs.items()}
                stored.batch = batch

    def clear(self) -> None:
        """Let everything go."""
        self._stored.clear()


def kinds(mode: StepMode) -> tuple[tuple[bool, AttentionMode], tuple[bool, AttentionMode]]:
    """The modes of cross-attention (True) and of self-attention (False)."""
    return (True, mode.cross_attention), (False, mode.self_attention)


def own(output: Tensor) -> Tensor:
    """A copy: a CUDA graph writes its next replay's outputs over those of the last, and half a tensor keeps it all."""
    return output.clone()


def _updated(stored: list[Tensor], new: list[tuple[int, Tensor]]) -> list[Tensor]:
    updated = list(stored)
    for call, output in new:
        if call < len(updated):
            updated[call] = own(output)
        elif call == len(updated):
            updated.append(own(output))
        # else an earlier call kept nothing, and this one would be taken for it
    return updated
