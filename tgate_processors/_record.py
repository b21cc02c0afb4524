"""Record of what a run did in a network, evaluation by evaluation."""

from dataclasses import dataclass

import torch

from tgate_processors._folding import Inputs, batch_of, map_tensors, tensors_in
from tgate_processors._modes import HALVING, StepMode


@dataclass(frozen=True)
class Evaluation:
    """A call of a network that was computed.

    Args:
        mode: Mode of the attention layers.
        batch: Size of the computed batch.
        shallow: Whether DeepCache skipped the deep layers.
        given: Index of the call's inputs in the record's `inputs`.
        missed: Names of attention layers that computed instead of reusing, because their stored outputs did not fit.
    """

    mode: StepMode
    batch: int
    shallow: bool = False
    given: int = 0
    missed: frozenset[str] = frozenset()


class Record:
    """Evaluations of one network in one run.

    Attributes:
        evaluations: Evaluations that were computed, in order.
        inputs: Inputs that the pipeline gave, without values; one entry for all calls with the same shapes.
        left_out: Index into `inputs` for each call that was left out.
    """

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.inputs: list[Inputs] = []
        self.left_out: list[int] = []
        self._shapes: dict[tuple[torch.Size, ...], int] = {}

    @property
    def given(self) -> list[int]:
        """Index into `inputs` for each call, computed or left out, in no order."""
        return [evaluation.given for evaluation in self.evaluations] + self.left_out

    @property
    def dropped_guidance(self) -> bool:
        """Whether guidance was dropped in any evaluation, or was about to be."""
        return bool(self.left_out) or any(
            evaluation.mode.cross_attention in HALVING or evaluation.batch < self.batch_of(evaluation.given)
            for evaluation in self.evaluations
        )

    def batch_of(self, given: int) -> int:
        """Return the batch size of one of `inputs`, by its index."""
        return batch_of(self.inputs[given])

    def note_given(self, inputs: Inputs) -> int:
        """Record the inputs of a call, and return their index in `inputs`."""
        shapes = tuple(tensor.shape for tensor in tensors_in(inputs))
        index = self._shapes.setdefault(shapes, len(self.inputs))
        if index == len(self.inputs):
            self.inputs.append(map_tensors(to_meta, inputs))
        return index


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """Return an empty tensor of the same shape on the meta device, in single precision if it is of floating point."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, device="meta", dtype=dtype)
