"""The guidance that a run keeps from one look at the text to the next. It fades as fast as it was seen to fade."""

from collections.abc import Sequence

from torch import Tensor


UNMEASURED = 0.9  # left after a step, where guidance was seen in one step only: the run began with its first look


class KeptGuidance:
    """What the branch that is left out differs by from the branch that goes on, as the last look saw it.

    A look that sees the difference `g1`, where `n` steps before it was `g0`, measures `r = <g0, g1> / <g0, g0>`: how
    much of `g0` is left. It is one number for each picture, held between 0 and 1. `k` steps after the look,
    `g1 * r ** (k / n)` is kept. Guidance that persists is kept whole; guidance that a sampler's fresh noise makes
    stale is soon gone. Nothing here waits for the device.
    """

    def __init__(self) -> None:
        self._looks: list[tuple[int, Sequence[Tensor]]] = []  # the last two, each with its step
        self._left: list[Tensor | float] = []  # after a step: (rows, 1, ...)

    def note(self, differences: Sequence[Tensor], step: int, *, channels: int | None = None) -> None:
        """Keep what a step of both branches sees. A second evaluation of the same step replaces the first.

        Args:
            differences: One `(rows, ...)` for each tensor in the network's output.
            step: The step of the run.
            channels: Number of channels in the network's sample. Those beyond are a learned variance, which is not
                guided. None: all are compared.
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
        """What is left of each difference in a step; none where nothing is kept."""
        if not self._looks:
            return []
        seen, differences = self._looks[-1]
        pairs = zip(self._left, differences, strict=True)
        return [(left ** (step - seen) * difference).to(difference.dtype) for left, difference in pairs]


def _left(before: Tensor, now: Tensor, steps: int, channels: int | None) -> Tensor:
    """How much of `before` is in `now`, for each of the steps between them: `(rows, 1, ...)` in 0..1."""
    first, last = (tensor[:, :channels].flatten(1).float() for tensor in (before, now))
    left = (first * last).sum(1) / first.square().sum(1)
    left = left.nan_to_num(0.0).clamp(0, 1) ** (1 / steps)  # of no guidance nothing is left
    return left.reshape(-1, *[1] * (now.ndim - 1))
