"""Convergence of cross-attention, watched while a pipeline runs. `gate_step="auto"` decides by it."""

from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from tgate_processors.schedule import LEAST_CHANGES_FOR_AUTO


NUM_WATCHED = 4  # watched layers, spread evenly over the network; the run keeps their outputs for one step
PATIENCE = 4  # steps, of 25, for which the change must stay under the tolerance; it is small for a while at first too
PAPER_STEPS = 25  # steps of the papers' runs; a step of a shorter run is a larger part of it, and changes more


def watched_layers(count: int) -> list[int]:
    """Return the indices of the watched layers among `count` cross-attention layers."""
    watched = min(NUM_WATCHED, count)
    return [(2 * index + 1) * count // (2 * watched) for index in range(watched)]


def to_paper_steps(num_steps: int) -> float:
    """Return the factor that scales a change in one of `num_steps` steps to a twenty-fifth of the run."""
    return num_steps / PAPER_STEPS


def has_converged(changes: Sequence[Sequence[float]], num_steps: int, tolerance: float) -> bool:
    """Return whether each of the last changes, as a mean over layers, is under the tolerance. NaN is not.

    Args:
        changes: Changes of each watched layer, step by step.
        num_steps: Number of steps in the run.
        tolerance: Upper bound of the changes.
    """
    patience = max(LEAST_CHANGES_FOR_AUTO, round(PATIENCE * to_paper_steps(num_steps)))
    return len(changes) >= patience and all(fmean(layers) < tolerance for layers in changes[-patience:])


class Watch:
    """Changes of the watched layers in a run, step by step.

    Args:
        num_steps: Number of steps in the run.

    Attributes:
        changes: Relative change of each layer's output since the step before, for each step from the second on. It is
            the change of the sample that changed most, scaled to a twenty-fifth of the run.
        before: Outputs of the layers in the last step.
    """

    def __init__(self, num_steps: int) -> None:
        self.changes: list[list[float]] = []
        self.before: list[Tensor | None] = []
        self._scale = to_paper_steps(num_steps)

    def compare(self, outputs: Sequence[Tensor | None], batch: int) -> None:
        """Compare the outputs of the layers in a step with those of the step before. This waits for the device once.

        A layer that was not evaluated in the step, as with DeepCache, has the same tensor as in the step before. It is
        not compared.

        Args:
            outputs: Output of each layer, `(rows, tokens, channels)`. A sample may have several rows, such as frames.
            batch: Number of samples.
        """
        pairs = [
            (now, before)
            for now, before in zip(outputs, self.before, strict=False)  # `before` is empty in the first step
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
    return torch.where((change == 0) & (size == 0), 0.0, change / size)  # an output that stays zero has not changed
