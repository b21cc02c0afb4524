"""The attention outputs that a run keeps of one network, for each of a timestep's calls."""

from dataclasses import dataclass, field

from torch import Tensor

from tgate_processors._gated_layers import Outputs, Taken
from tgate_processors._guidance import Whole
from tgate_processors._modes import HALVING, AttentionMode, StepMode


@dataclass
class Stored:
    """Stored outputs of the layers of one kind.

    Args:
        batch: Size of the batch that the outputs belong to.
        outputs: The outputs by layer name.
    """

    batch: int
    outputs: Outputs = field(default_factory=dict)


class Store:
    """Stored outputs, by kind of attention and by the number of the call for its timestep."""

    def __init__(self) -> None:
        self._stored: dict[tuple[bool, int], Stored] = {}

    @property
    def has_cross_attention(self) -> bool:
        """Whether outputs of cross-attention are stored for the first call for a timestep."""
        return (True, 0) in self._stored

    @property
    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [tensor for one in self._stored.values() for outputs in one.outputs.values() for tensor in outputs]

    def offer(self, call: int, mode: StepMode) -> Outputs:
        """Return the outputs that the layers may reuse in a call."""
        offered: Outputs = {}
        for is_cross, kind_mode in kinds(mode):
            if kind_mode is AttentionMode.REUSE and (is_cross, call) in self._stored:
                offered |= self._stored[is_cross, call].outputs
        return offered

    def keep(self, call: int, mode: StepMode, batch: int, taken: Taken) -> None:
        """Keep the outputs of layers that were to store, or that had no fitting output to reuse.

        Args:
            call: Number of the call for its timestep.
            mode: Mode of the call.
            batch: Size of the call's batch.
            taken: Outputs that were taken out of the layers.
        """
        for is_cross, kind_mode in kinds(mode):
            if kind_mode is AttentionMode.COMPUTE:
                continue
            halves = kind_mode in HALVING
            stored = self._stored.setdefault((is_cross, call), Stored(batch))
            stored.batch = batch // 2 if halves else batch
            for name, new in taken.new.items():
                # If a layer is called several times, it is unknown which rows belong to which branch.
                if (name in taken.cross_attention) is is_cross and not (halves and len(new) > 1):
                    stored.outputs[name] = _updated(stored.outputs.get(name, []), new)

    def drop(self, call: int, mode: StepMode, *, keeps_skipped: bool) -> None:
        """Free outputs that no later call reuses, because the layers now compute or store again.

        Args:
            call: Number of the call for its timestep.
            mode: Mode of the call.
            keeps_skipped: Whether layers may be skipped, as with DeepCache. A skipped layer keeps its outputs until it
                is evaluated again.
        """
        for is_cross, kind_mode in kinds(mode):
            if kind_mode is AttentionMode.COMPUTE or (kind_mode.stores and not keeps_skipped):
                self._stored.pop((is_cross, call), None)

    def fit(self, call: int, batch: int, strategy: Whole, *, is_folded: bool) -> None:
        """Convert what was stored before the gate, so that it fits an evaluation of one branch after it.

        Args:
            call: Number of the call for its timestep.
            batch: Size of the evaluation's batch.
            strategy: Strategy of guidance.
            is_folded: Whether the evaluation computes one half of its batch.
        """
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
        """Free everything."""
        self._stored.clear()


def kinds(mode: StepMode) -> tuple[tuple[bool, AttentionMode], tuple[bool, AttentionMode]]:
    """Return the modes of cross-attention (True) and of self-attention (False)."""
    return (True, mode.cross_attention), (False, mode.self_attention)


def own(output: Tensor) -> Tensor:
    """Return a copy of an output.

    The output itself may not last, because the next replay of a CUDA graph writes over it. And a half that is a view
    would keep the whole tensor in memory.
    """
    return output.clone()


def _updated(stored: list[Tensor], new: list[tuple[int, Tensor]]) -> list[Tensor]:
    updated = list(stored)
    for call, output in new:
        if call < len(updated):
            updated[call] = own(output)
        elif call == len(updated):
            updated.append(own(output))
        # otherwise an earlier call kept nothing, and this output would take its place
    return updated
