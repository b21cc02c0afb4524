"""Guidance that a run keeps from one look to the next. It fades as fast as the looks have seen it fade."""

from collections.abc import Sequence

from torch import Tensor


UNMEASURED = 0.9  # share of guidance left after a step, if only one step has seen guidance (`gate_step=1`)


class KeptGuidance:
    """Difference between the branch that is left out and the branch that goes on, as the last look saw it.

    Suppose that a look sees the difference `g1`, and that the look before, `n` steps earlier, saw `g0`. Then
    `r = <g0, g1> / <g0, g0>` is the share of `g0` that was left, one number for each picture, clamped to 0..1. The
    kept guidance is `g1 * r ** (k / n)` at `k` steps after the look. If guidance persists, it is kept whole. If a
    sampler adds fresh noise, it fades soon. Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self._looks: list[tuple[int, Sequence[Tensor]]] = []  # differences of the last two looks, each with its step
        self._left: list[Tensor | float] = []  # share of each difference left after a step: (rows, 1, ...)

    def note(self, differences: Sequence[Tensor], step: int, *, channels: int | None = None) -> None:
        """Keep the differences that a step of both branches sees. A second evaluation of a step replaces the first.

        Args:
            differences: Difference `(rows, ...)` for each tensor in the network's output.
            step: Step of the run.
            channels: Number of channels to compare, which is that of the network's sample. Further channels of the
                output are a learned variance, which is not guided. None compares all channels.
        """
        earlier = [look for look in self._looks if look[0] != step]
        self._looks = [*earlier[-1:], (step, differences)]
        (before, first), (_, now) = self._looks[0], self._looks[-1]
        if [tensor.shape for tensor in first] != [tensor.shape for tensor in now]:
            del self._looks[0]
        if len(self._looks) == 1:
            self._left = [UNMEASURED] * len(now)
        else:
            self._left = [_left(*pair, step - before, channels) for pair in zip(first, now, strict=True)]

    def at(self, step: int) -> list[Tensor]:
        """Return what is left of each difference in a step; an empty list if nothing is kept."""
        if not self._looks:
            return []
        seen, differences = self._looks[-1]
        pairs = zip(self._left, differences, strict=True)
        return [(left ** (step - seen) * difference).to(difference.dtype) for left, difference in pairs]


def _left(before: Tensor, now: Tensor, steps: int, channels: int | None) -> Tensor:
    """Return the share of `before` that is left after one of the steps up to `now`: `(rows, 1, ...)` in 0..1."""
    first, last = (tensor[:, :channels].flatten(1).float() for tensor in (before, now))
    left = (first * last).sum(1) / first.square().sum(1)
    left = left.nan_to_num(0.0).clamp(0, 1) ** (1 / steps)  # NaN if `before` is zero: nothing is left of it
    return left.reshape(-1, *[1] * (now.ndim - 1))
