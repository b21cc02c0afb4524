"""What a run did in a network, evaluation by evaluation."""

from dataclasses import dataclass

import torch

from tgate_processors._folding import Inputs, batch_of, map_tensors, tensors_in
from tgate_processors._modes import HALVING, StepMode


@dataclass(frozen=True)
class Evaluation:
    """A call of a network that was computed.

    Args:
        mode: What its attention did.
        batch: The batch that it computed.
        shallow: Whether DeepCache skipped its deep layers.
        given: Which of the record's inputs it was given.
        missed: Attention layers that computed, though the mode says that they reuse: what was stored did not fit.
    """

    mode: StepMode
    batch: int
    shallow: bool = False
    given: int = 0
    missed: frozenset[str] = frozenset()


class Record:
    """The evaluations of one network in one run.

    Attributes:
        evaluations: Those that were computed, in order.
        inputs: What the pipeline gave, without values: one for all calls of the same shapes.
        left_out: Which of `inputs` each call was given that was left out.
    """

    def __init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.inputs: list[Inputs] = []
        self.left_out: list[int] = []
        self._shapes: dict[tuple[torch.Size, ...], int] = {}

    @property
    def given(self) -> list[int]:
        """Which of `inputs` each call was given that was answered, in no order."""
        return [evaluation.given for evaluation in self.evaluations] + self.left_out

    @property
    def dropped_guidance(self) -> bool:
        """Whether anything of guidance was left out, or was about to be."""
        return bool(self.left_out) or any(
            evaluation.mode.cross_attention in HALVING or evaluation.batch < self.batch_of(evaluation.given)
            for evaluation in self.evaluations
        )

    def batch_of(self, given: int) -> int:
        """The batch of one of `inputs`."""
        return batch_of(self.inputs[given])

    def note_given(self, inputs: Inputs) -> int:
        """Note a call; gives which of `inputs` it was given."""
        shapes = tuple(tensor.shape for tensor in tensors_in(inputs))
        index = self._shapes.setdefault(shapes, len(self.inputs))
        if index == len(self.inputs):
            self.inputs.append(map_tensors(to_meta, inputs))
        return index


def to_meta(tensor: torch.Tensor) -> torch.Tensor:
    """An empty tensor of the same shape, in single precision, whatever the run's and however it is quantized."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, device="meta", dtype=dtype)
