"""Strategies that say what the gate leaves out of an evaluation, one for each kind of classifier-free guidance.

A strategy serves one network in one run. The run asks it in every evaluation, because guidance may begin late, end
early, or be turned off by another callback.
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
    """Strategy that leaves nothing out, so that the gate only reuses cross-attention.

    Attributes:
        keeps_first_half: Whether a layer that keeps a half keeps the first one.
    """

    keeps_first_half = True

    def has_halves(
        self, inputs: Inputs, does_guidance: bool | None, *, step: int, call: int, most_calls: int
    ) -> bool | None:
        """Return whether the batch has two halves, one of which can be dropped; None if this is not known yet.

        Args:
            inputs: Inputs of the call.
            does_guidance: Whether the pipeline says that it does guidance; None if it does not say.
            step: Step of the run, 0-based.
            call: Number of the call for its timestep, from 0.
            most_calls: Largest number of calls that a timestep has had, including this call.
        """
        return False

    def leaves_out(self, call: int) -> bool:
        """Return whether call number `call` for a timestep is left out when one branch is denoised."""
        return False

    def half(self, tensor: torch.Tensor, phase: Phase) -> torch.Tensor:
        """Return the half of a batched tensor that goes on."""
        return half_of(tensor, first=self.takes_first_half(phase))

    def fold(self, inputs: Inputs, phase: Phase) -> Inputs:
        """Return the inputs of the branch that goes on, from those of two halves."""
        return take_half(inputs, batch_of(inputs), first=self.takes_first_half(phase))

    def takes_first_half(self, phase: Phase) -> bool:
        """Return whether the first half goes on when one branch is denoised."""
        return self.keeps_first_half

    def unfold(self, output: Any, step: int) -> Any:
        """Return both halves of an output, from the output of the branch that goes on."""
        return output

    def answer(self, call: int, output: Any, step: int) -> Any:
        """Return the answer to a call that is left out.

        Args:
            call: Number of the call for its timestep.
            output: Output of the timestep's first call.
            step: Step of the run.
        """
        return output

    def note(self, call: int, output: Any, step: int, channels: int | None = None) -> None:
        """Keep the guidance in the output of a call, when both branches are denoised.

        Args:
            call: Number of the call for its timestep.
            output: Output of the call.
            step: Step of the run.
            channels: Number of channels in the network's sample, if known.
        """

    def reduce(self, output: torch.Tensor) -> torch.Tensor:
        """Return what is kept of a layer's output that was stored before the halves of its batch were known."""
        return output

    def merge(self, calls: list[Outputs]) -> Outputs:
        """Return the outputs that the timestep's first call reuses after the gate.

        Args:
            calls: Outputs that each call of the step before the gate stored.
        """
        return calls[0]


class Halves(Whole):
    """Strategy for a batch `[negative, positive]`, or the other way round. One half goes on.

    Args:
        branch: Branch that goes on after the gate. Before guidance begins, the positive branch does.
        positive_first: Whether the batch begins with the positive branch.
        looks: Whether the run has looks. Layers then keep the half that goes on, and the run keeps guidance between
            looks.
        is_denoiser: Whether the output is guided. A ControlNet's is not.
        is_tried: Whether the pipeline's class is known. Then the first call for a timestep has the two halves, and the
            pipeline says whether it does guidance. Otherwise the halves must prove to be equal, and a pipeline that
            calls several times for a timestep is taken to have none.
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
        self._seen: dict[int, bool] = {}  # by batch size: whether the halves of the sample were equal
        self._kept = KeptGuidance()

    def has_halves(
        self, inputs: Inputs, does_guidance: bool | None, *, step: int, call: int, most_calls: int
    ) -> bool | None:
        batch = batch_of(inputs)
        # a ControlNet in guess mode gets only the positive branch
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
            return None  # two pictures may start from the same noise, but they differ in the next step
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
    """`Halves` for a network that takes and returns lists of pictures (Z-Image). Its ControlNet returns no lists."""

    def unfold(self, output: Any, step: int) -> Any:
        if not has_lists(output):
            return super().unfold(output, step)
        return as_lists(super().unfold(as_tensors(output), step))

    def note(self, call: int, output: Any, step: int, channels: int | None = None) -> None:
        super().note(call, as_tensors(output) if has_lists(output) else output, step, None)


class Calls(Whole):
    """Strategy for a pipeline that calls the network once for each branch, the positive one first.

    The calls after the first are left out.

    Args:
        looks: Whether the run has looks. Layers then keep their outputs of the first call, and the run keeps guidance
            between looks.
    """

    def __init__(self, *, looks: bool) -> None:
        self._looks = looks
        self._first: Any = None  # output of a timestep's first call, at a look
        self._kept: dict[int, KeptGuidance] = {}  # by the number of the call

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
    """Return whether any guidance is kept and has the shapes of the output."""
    return bool(kept) and [tensor.shape for tensor in kept] == _shapes(output)


def _shapes(output: Any) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_in(output)]


def _mean(outputs: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """Return the mean of a layer's outputs over the calls of the network.

    The layer may run several times in each call. So its first outputs are averaged, then its second ones, and so on.
    """
    means = []
    for same in zip(*outputs, strict=False):
        fitting = [output for output in same if output.shape == same[0].shape]
        means.append(sum((output / len(fitting) for output in fitting[1:]), fitting[0] / len(fitting)))
    return means


def _warn_of_ambiguous(name: str) -> None:
    warnings.warn(
        f"`{name}` among the attention arguments may or may not have a row for each picture of the doubled batch, so "
        "after the gate both branches of guidance are computed, and only cross-attention is reused.",
        stacklevel=2,
    )
