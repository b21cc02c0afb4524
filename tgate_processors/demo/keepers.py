"""Rules that estimate guidance in the steps with one branch, from the guidance of the last looks, for experiments."""

from typing import Protocol

import torch
from torch import Tensor

from tgate_processors._kept import KeptGuidance


class Keeper(Protocol):
    """Rule that estimates, in one run, the guidance of steps with one branch."""

    def note(self, guidance: Tensor, step: int) -> None:
        """Record the guidance of a step with both branches. A second evaluation of a step replaces its first."""

    def at(self, step: int) -> Tensor:
        """Return the guidance that a step with one branch uses."""


class LastLooks:
    """Base of keepers that remember the last three looks, each with its step."""

    def __init__(self) -> None:
        self.looks: list[tuple[int, Tensor]] = []

    def note(self, guidance: Tensor, step: int) -> None:
        self.looks = [*(look for look in self.looks if look[0] != step), (step, guidance)][-3:]


class Fading(LastLooks):
    """Keeper that multiplies the last look's guidance by a constant for each step since."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def at(self, step: int) -> Tensor:
        seen, guidance = self.looks[-1]
        return guidance * self.rate ** (step - seen)


class ByFrequency(LastLooks):
    """Keeper that lets low frequencies of guidance fade and keeps high ones, with the weights of FasterCache."""

    def at(self, step: int) -> Tensor:
        seen, guidance = self.looks[-1]
        spectrum = torch.fft.rfft2(guidance.float())
        rows = torch.fft.fftfreq(guidance.shape[-2]).abs()[:, None]
        columns = torch.fft.rfftfreq(guidance.shape[-1])[None]
        low = torch.maximum(rows, columns) <= 0.2
        weights = torch.where(low, 0.8 ** (step - seen), 1.0)
        weighed: Tensor = torch.fft.irfft2(spectrum * weights, s=guidance.shape[-2:])
        return weighed.to(guidance.dtype)


class Measured:
    """Keeper that lets guidance fade as fast as it did between the last two looks, as the library does."""

    def __init__(self) -> None:
        self.kept = KeptGuidance()

    def note(self, guidance: Tensor, step: int) -> None:
        self.kept.note([guidance], step)

    def at(self, step: int) -> Tensor:
        return self.kept.at(step)[0]


class Cosine(LastLooks):
    """As `Measured`, but the share that is left is the cosine between the last two looks, whatever their norms."""

    def at(self, step: int) -> Tensor:
        (before, g0), (seen, g1) = self.looks[-2:]
        left = _dot(g0, g1) / (_dot(g0, g0) * _dot(g1, g1)).sqrt()
        left = left.nan_to_num(0.0).clamp(0, 1)  # NaN if a look had no guidance
        return (g1 * left ** ((step - seen) / (seen - before))).to(g1.dtype)


class Extrapolated(LastLooks):
    """As `Measured`, plus a share of the last change of guidance.

    The share is the one that would have helped most at the last look, with the change before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fading = Measured()

    def note(self, guidance: Tensor, step: int) -> None:
        super().note(guidance, step)
        self.fading.note(guidance, step)

    def at(self, step: int) -> Tensor:
        (earlier, gm), (before, g0), (seen, g1) = self.looks
        change = (g0 - gm).float() * (seen - before) / (before - earlier)
        change = change - (_dot(change, g0) / _dot(g0, g0)).nan_to_num(0.0) * g0
        # Fading alone leaves an error of `g1 - r * g0`. Its part in `g0` drops out, since the change is orthogonal.
        helped = (_dot(change, g1) / _dot(change, change)).nan_to_num(0.0).clamp(0, 0.5)
        ahead = helped * (step - seen) / (seen - before) * (g1 - g0)
        return (self.fading.at(step) + ahead).to(g1.dtype)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Return the inner product of each picture's two tensors, `(rows, 1, 1, 1)`."""
    return (one.float() * other.float()).sum((1, 2, 3), keepdim=True)
