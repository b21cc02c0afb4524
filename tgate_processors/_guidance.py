"""What of an evaluation is left out after the gate: strategies, one for each way to do classifier-free guidance.

A strategy is made for one network in one run, and is asked in every evaluation: guidance may begin late, end early, or
be cut by another callback.
"""

import warnings
from typing import Any

import torch

from tgate_processors._folding import (
    Inputs,
    ambiguous_argument,
    difference_of_halves,
    double,
    half_of,
    halves_are_equal,
    mean_of_halves,
    sample_of,
    take_half,
    tensors_in,
    with_difference,
)
from tgate_processors._gated_layers import Outputs


FADING = 0.9  # of kept guidance, in a twenty-fifth of the run


class Whole:
    """Nothing is left out: cross-attention alone is reused.

    Attributes:
        keeps_first_half: Which half a layer keeps where it keeps a half.
    """

    keeps_first_half = True

    def has_halves(self, inputs: Inputs, does_guidance: bool | None, *, step: int, calls: int) -> bool | None:
        """Whether the batch is two halves, one of which can be dropped; None where nobody can say yet.

        Args:
            inputs: What the network is called with.
            does_guidance: What the pipeline says; None where it says nothing.
            step: The step of the run, 0-based.
            calls: The most calls that a timestep has had, this one among them.
        """
        return False

    def leaves_out(self, call: int) -> bool:
        """Whether call number `call` for a timestep is left out after the gate, and answered as the first."""
        return False

    def half(self, tensor: torch.Tensor) -> torch.Tensor:
        """The half of a batched tensor that goes on."""
        return half_of(tensor, first=self.keeps_first_half)

    def fold(self, inputs: Inputs) -> Inputs:
        """The branch that goes on, of a batch of two halves."""
        return take_half(inputs, sample_of(inputs).shape[0], first=self.keeps_first_half)

    def unfold(self, output: Any, time: float) -> Any:
        """Both halves of an output of one; `time` is in twenty-fifths of the run."""
        return output

    def note(self, output: Any, time: float) -> None:
        """Keep the guidance in the output of both halves."""

    def reduce(self, output: torch.Tensor) -> torch.Tensor:
        """What is kept of a layer's output that was stored before anybody knew of its halves."""
        return output

    def merge(self, calls: list[Outputs]) -> Outputs:
        """What the one call that is not left out reuses, of what each call of the step before the gate stored."""
        return calls[0]


class Halves(Whole):
    """The batch is `[negative, positive]`, or the other way round: one half goes on.

    Args:
        first_half: Whether the first half goes on.
        looks: Whether the run looks again: layers then keep the half that goes on, and guidance is kept between looks.
        is_denoiser: Whether the output is guided. That of a ControlNet is not.
        is_tried: Whether the pipeline is known to call once for a timestep and to say whether it does guidance. Of
            others the halves must be seen to be equal, and a pipeline that calls several times has none.
    """

    def __init__(self, *, first_half: bool, looks: bool, is_denoiser: bool = True, is_tried: bool = True) -> None:
        self.keeps_first_half = first_half
        self._looks = looks
        self._keeps_guidance = looks and is_denoiser
        self._is_tried = is_tried
        self._seen: dict[int, bool] = {}  # by batch: whether the halves of the sample were equal
        self._kept: list[torch.Tensor] = []
        self._noted = 0.0  # when

    def has_halves(self, inputs: Inputs, does_guidance: bool | None, *, step: int, calls: int) -> bool | None:
        sample = sample_of(inputs)
        batch = sample.shape[0]
        # a ControlNet in guess mode is given the positive branch alone
        if does_guidance is False or batch % 2 or inputs[1].get("guess_mode", False):
            return False
        if not self._is_tried and calls > 1:
            return False
        name = ambiguous_argument(inputs, batch)
        if name is not None:
            _warn_of_ambiguous(name)
            return False
        if does_guidance and self._is_tried:
            return True
        if step == 0:
            return None  # two pictures may start from the same noise; in the next step they differ
        if batch not in self._seen:
            self._seen[batch] = halves_are_equal(sample)
        return self._seen[batch]

    def unfold(self, output: Any, time: float) -> Any:
        shapes = [tensor.shape for tensor in tensors_in(output)]
        if shapes != [kept.shape for kept in self._kept]:
            return double(output)  # nothing is kept, or it is of another size
        fades = FADING ** (time - self._noted)
        return with_difference(output, [fades * kept for kept in self._kept], first=self.keeps_first_half)

    def note(self, output: Any, time: float) -> None:
        if self._keeps_guidance and all(tensor.shape[0] % 2 == 0 for tensor in tensors_in(output)):
            self._kept, self._noted = difference_of_halves(output, first=self.keeps_first_half), time

    def reduce(self, output: torch.Tensor) -> torch.Tensor:
        if output.shape[0] % 2:
            return output
        return self.half(output) if self._looks else mean_of_halves(output)


class Calls(Whole):
    """Each branch is a call: those after the first are left out, and answered as the first."""

    def leaves_out(self, call: int) -> bool:
        return call > 0

    def merge(self, calls: list[Outputs]) -> Outputs:
        return {name: _mean([outputs[name] for outputs in calls if name in outputs]) for name in calls[0]}


def _mean(outputs: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """The mean of a layer's outputs over the calls of the network, its first with the others' first, and so on."""
    means = []
    for same in zip(*outputs, strict=False):
        fitting = [output for output in same if output.shape == same[0].shape]
        means.append(sum((output / len(fitting) for output in fitting[1:]), fitting[0] / len(fitting)))
    return means


def _warn_of_ambiguous(name: str) -> None:
    warnings.warn(
        f"`{name}` among the attention arguments may have a row for each picture of the doubled batch, or not: both "
        "branches of guidance are computed after the gate too, and cross-attention alone is reused.",
        stacklevel=2,
    )
