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
    as_lists,
    as_tensors,
    batch_of,
    difference,
    difference_of_halves,
    double,
    half_of,
    halves_are_equal,
    has_lists,
    mean_of_halves,
    plus,
    sample_of,
    take_half,
    tensors_in,
    with_difference,
)
from tgate_processors._gated_layers import Outputs
from tgate_processors._kept import KeptGuidance
from tgate_processors._modes import Phase
from tgate_processors.schedule import Branch


class Whole:
    """Nothing is left out: cross-attention alone is reused.

    Attributes:
        keeps_first_half: Which half a layer keeps where it keeps a half.
    """

    keeps_first_half = True

    def has_halves(
        self, inputs: Inputs, does_guidance: bool | None, *, step: int, call: int, most_calls: int
    ) -> bool | None:
        """Whether the batch is two halves, one of which can be dropped; None where nobody can say yet.

        Args:
            inputs: What the network is called with.
            does_guidance: What the pipeline says; None where it says nothing.
            step: The step of the run, 0-based.
            call: Which call for its timestep it is.
            most_calls: The most calls that a timestep has had, this one among them.
        """
        return False

    def leaves_out(self, call: int) -> bool:
        """Whether call number `call` for a timestep is left out where one branch is denoised."""
        return False

    def half(self, tensor: torch.Tensor, phase: Phase) -> torch.Tensor:
        """The half of a batched tensor that goes on."""
        return half_of(tensor, first=self.takes_first_half(phase))

    def fold(self, inputs: Inputs, phase: Phase) -> Inputs:
        """The branch that goes on, of a batch of two halves."""
        return take_half(inputs, batch_of(inputs), first=self.takes_first_half(phase))

    def takes_first_half(self, phase: Phase) -> bool:
        """Which half goes on where one branch is denoised."""
        return self.keeps_first_half

    def unfold(self, output: Any, step: int) -> Any:
        """Both halves of the output of one, in a step of the run."""
        return output

    def answer(self, call: int, output: Any, step: int) -> Any:
        """What a call is answered that is left out, from the output of the timestep's first call."""
        return output

    def note(self, call: int, output: Any, step: int, channels: int | None = None) -> None:
        """See the guidance in the output of a call, where both branches are denoised.

        Args:
            call: Which call for its timestep it is.
            output: Its output.
            step: The step of the run.
            channels: Number of channels in the network's sample, if known.
        """

    def reduce(self, output: torch.Tensor) -> torch.Tensor:
        """What is kept of a layer's output that was stored before anybody knew of its halves."""
        return output

    def merge(self, calls: list[Outputs]) -> Outputs:
        """What the one call that is not left out reuses, of what each call of the step before the gate stored."""
        return calls[0]


class Halves(Whole):
    """The batch is `[negative, positive]`, or the other way round: one half goes on.

    Args:
        branch: Which branch goes on after the gate. Before guidance begins it is the positive one.
        positive_first: Whether the batch begins with the positive branch.
        looks: Whether the run looks again: layers then keep the half that goes on, and guidance is kept between looks.
        is_denoiser: Whether the output is guided. That of a ControlNet is not.
        is_tried: Whether the pipeline is known to do so in the first call for a timestep, and to say whether it does
            guidance. Of others the halves must be seen to be equal, and a pipeline that calls several times has none.
    """

    def __init__(
        self,
        branch: Branch,
        *,
        positive_first: bool = False,
        looks: bool = False,
        is_denoiser: bool = True,
        is_tried: bool = True,
    ) -> None:
        self._positive_first = positive_first
        self.keeps_first_half = (branch == "positive") is positive_first
        self._looks = looks
        self._keeps_guidance = looks and is_denoiser
        self._is_tried = is_tried
        self._seen: dict[int, bool] = {}  # by batch: whether the halves of the sample were equal
        self._kept = KeptGuidance()

    def has_halves(
        self, inputs: Inputs, does_guidance: bool | None, *, step: int, call: int, most_calls: int
    ) -> bool | None:
        batch = batch_of(inputs)
        # a ControlNet in guess mode is given the positive branch alone
        if does_guidance is False or batch % 2 or inputs[1].get("guess_mode", False):
            return False
        if call or (most_calls > 1 and not self._is_tried):
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
            self._seen[batch] = halves_are_equal(sample_of(inputs))
        return self._seen[batch]

    def takes_first_half(self, phase: Phase) -> bool:
        return self._positive_first if phase is Phase.UNGUIDED else self.keeps_first_half

    def unfold(self, output: Any, step: int) -> Any:
        kept = self._kept.at(step)
        if not _fit(kept, output):
            return double(output)
        return with_difference(output, kept, first=self.keeps_first_half)

    def note(self, call: int, output: Any, step: int, channels: int | None = None) -> None:
        if self._keeps_guidance and all(tensor.shape[0] % 2 == 0 for tensor in tensors_in(output)):
            self._kept.note(difference_of_halves(output, first=self.keeps_first_half), step, channels=channels)

    def reduce(self, output: torch.Tensor) -> torch.Tensor:
        if output.shape[0] % 2:
            return output
        return half_of(output, first=self.keeps_first_half) if self._looks else mean_of_halves(output)


class Lists(Halves):
    """Halves of a list of pictures: the network takes lists, and puts one out (Z-Image). Its ControlNet does not."""

    def unfold(self, output: Any, step: int) -> Any:
        if not has_lists(output):
            return super().unfold(output, step)
        return as_lists(super().unfold(as_tensors(output), step))

    def note(self, call: int, output: Any, step: int, channels: int | None = None) -> None:
        super().note(call, as_tensors(output) if has_lists(output) else output, step, None)


class Calls(Whole):
    """Each branch is a call, the positive one first: those after the first are left out.

    Args:
        looks: Whether the run looks again: layers then keep what they put out for the first call, and guidance is kept
            between looks.
    """

    def __init__(self, *, looks: bool) -> None:
        self._looks = looks
        self._first: Any = None  # the output of a timestep's first call, at a look
        self._kept: dict[int, KeptGuidance] = {}  # by call

    def leaves_out(self, call: int) -> bool:
        return call > 0

    def answer(self, call: int, output: Any, step: int) -> Any:
        kept = self._kept[call].at(step) if call in self._kept else []
        return plus(output, kept) if _fit(kept, output) else output

    def note(self, call: int, output: Any, step: int, channels: int | None = None) -> None:
        if not self._looks:
            return
        if call == 0:
            self._first = output
        elif _shapes(output) == _shapes(self._first):
            kept = self._kept.setdefault(call, KeptGuidance())
            kept.note(difference(self._first, output), step, channels=channels)

    def merge(self, calls: list[Outputs]) -> Outputs:
        if self._looks:
            return calls[0]
        return {name: _mean([outputs[name] for outputs in calls if name in outputs]) for name in calls[0]}


def _fit(kept: list[torch.Tensor], output: Any) -> bool:
    """Whether something is kept, and is of the size of an output."""
    return bool(kept) and [tensor.shape for tensor in kept] == _shapes(output)


def _shapes(output: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_in(output)]


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
