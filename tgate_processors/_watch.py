"""Watching cross-attention converge while a pipeline runs: what `gate_step="auto"` decides by."""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from tgate_processors.schedule import LEAST_CHANGES_FOR_AUTO


NUM_WATCHED = 4  # layers, evenly spread over the network: their outputs are kept for a step
PATIENCE = 4  # of the papers' steps for which it stays under the tolerance: it is small for a while at the start too
PAPER_STEPS = 25  # of the papers' runs; a step of a shorter run is a larger part of it, and changes more


def watched_layers(count: int) -> list[int]:
    """Which of `count` cross-attention layers are watched."""
    watched = min(NUM_WATCHED, count)
    return [(2 * index + 1) * count // (2 * watched) for index in range(watched)]


def to_paper_steps(num_steps: int) -> float:
    """The factor from a change in one of `num_steps` steps to that in a twenty-fifth of the run."""
    return num_steps / PAPER_STEPS


def has_converged(changes: Sequence[Sequence[float]], num_steps: int, tolerance: float) -> bool:
    """Whether the last changes, each the mean over layers, all stayed under the tolerance; NaN does not.

    Args:
        changes: The changes of each watched layer, step by step.
        num_steps: Number of steps in the run.
        tolerance: What they have to stay under.
    """
    patience = max(LEAST_CHANGES_FOR_AUTO, round(PATIENCE * to_paper_steps(num_steps)))
    return len(changes) >= patience and all(fmean(layers) < tolerance for layers in changes[-patience:])


class Watch:
    """The changes of a run, step by step.

    Args:
        num_steps: Number of steps in the run.

    Attributes:
        changes: For each step from the second on: how much the output of each layer changed since the step before,
            relative to it and in a twenty-fifth of the run; of the sample that changed most.
        before: What the layers put out in the last step.
    """

    def __init__(self, num_steps: int) -> None:
        self.changes: list[list[float]] = []
        self.before: list[Tensor | None] = []
        self._scale = to_paper_steps(num_steps)

    def look(self, outputs: Sequence[Tensor | None], batch: int) -> None:
        """Take note of what the layers put out in a step; waits for the device once.

        A layer that was not evaluated in the step, as beside DeepCache, has the very output of the step before.

        Args:
            outputs: The output of each layer, `(rows, tokens, channels)`; a sample may have several rows, as frames.
            batch: Number of samples.
        """
        pairs = [
            (now, before)
            for now, before in zip(outputs, self.before, strict=False)  # nothing is before the first step
            if now is not None and before is not None and now is not before
        ]
        self.before = list(outputs)
        if pairs:
            changes = torch.stack([_relative_change(now, before, batch).max() for now, before in pairs])
            self.changes.append((changes * self._scale).tolist())


def _relative_change(now: Tensor, before: Tensor, batch: int) -> Tensor:
    now, before = now.reshape(batch, -1), before.reshape(batch, -1)
    change = torch.linalg.vector_norm(now - before, dim=1, dtype=torch.float32)
    size = torch.linalg.vector_norm(before, dim=1, dtype=torch.float32)
    return torch.where((change == 0) & (size == 0), 0.0, change / size)  # nothing that stays nothing has not changed
