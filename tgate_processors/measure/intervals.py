"""Means of shares, of numbers and of paired differences, with 95% confidence intervals."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tgate_processors.errors import MissingPackageError


CONFIDENCE = 0.95
NORMAL = 1.96  # 95% of a normal distribution is within this many standard deviations of the mean


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def shown(self, digits: int, factor: float = 1) -> str:
        """Return the mean and the interval as text, multiplied by `factor`."""
        return " ".join(
            [
                f"{self.mean * factor:.{digits}f}",
                f"({self.low * factor:.{digits}f} to {self.high * factor:.{digits}f})",
            ]
        )


def estimate(values: Tensor) -> Estimate:
    """Return the mean of `(count,)` values, with Wilson's interval for booleans and Student's for numbers.

    Raises:
        MissingPackageError: `scipy` is not installed.
    """
    if values.dtype is torch.bool:
        share = _stats().binomtest(int(values.sum()), len(values)).proportion_ci(CONFIDENCE, method="wilson")
        return Estimate(float(values.double().mean()), float(share.low), float(share.high))
    numbers = values.double()
    mean = float(numbers.mean())
    if len(numbers) < 2 or not math.isfinite(mean):
        return Estimate(mean, -math.inf, math.inf)
    error = float(numbers.std()) / math.sqrt(len(numbers))
    reach = float(_stats().t.ppf((1 + CONFIDENCE) / 2, len(numbers) - 1)) * error
    return Estimate(mean, mean - reach, mean + reach)


def difference(values: Tensor, others: Tensor) -> Estimate:
    """Return the mean of `values` minus `others`, pair by pair.

    For booleans the interval is that of Bonett and Price (2012, doi 10.3102/1076998611411915). It counts one more pair
    of each kind of disagreement, so that there is an interval even if all pairs agree. For numbers it is Student's.

    Args:
        values, others: Paired values, `(count,)` or `(conditions, count)`. With conditions, the mean over them is one
            observation.

    Raises:
        MissingPackageError: `scipy` is not installed.
    """
    differences = (values.double() - others.double()).reshape(-1, values.shape[-1]).mean(0)
    if values.dtype is not torch.bool:
        return estimate(differences)
    counted = torch.cat([differences, torch.tensor([1.0, -1.0])])
    mean = float(counted.mean())
    reach = NORMAL * float(counted.std(correction=0)) / math.sqrt(len(counted))
    return Estimate(float(differences.mean()), max(-1.0, mean - reach), min(1.0, mean + reach))


def _stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise MissingPackageError(
            "`scipy` must be installed to measure quality. Run `pip install 'tgate-processors[quality]'`."
        ) from error
    return stats
