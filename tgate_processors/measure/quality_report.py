"""What was measured of each way to run a pipeline faster, as a report that prints and is pictured."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
from torch import Tensor

from tgate_processors._tables import format_table
from tgate_processors.measure.plotting import BLUE, GREY, RED, new_figure


NORMAL_95 = 1.96  # standard deviations on either side that hold 95% of a normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def shown(self, digits: int, factor: float = 1) -> str:
        return " ".join(
            [
                f"{self.mean * factor:.{digits}f}",
                f"({self.low * factor:.{digits}f} to {self.high * factor:.{digits}f})",
            ]
        )


def estimate(values: Tensor) -> Estimate:
    """The interval of the mean of `(count,)` values: Wilson's interval for booleans, the normal one for numbers."""
    count = len(values)
    mean = float(values.double().mean())
    if values.dtype is not torch.bool:
        reach = NORMAL_95 * float(values.double().std()) / math.sqrt(count) if count > 1 else math.inf
        return Estimate(mean, mean - reach, mean + reach)
    square = NORMAL_95**2 / count
    centre, reach = mean + square / 2, math.sqrt(square * (mean * (1 - mean) + square / 4))
    return Estimate(mean, (centre - reach) / (1 + square), (centre + reach) / (1 + square))


@dataclass(frozen=True)
class Row:
    """What was measured of one way.

    Args:
        name: The name of the way.
        error: Why there is no measurement; None where there is one.
        arithmetic: Multiply-accumulates of the denoiser, attention's products among them, over the stock run's.
        psnr, ssim: Likeness to the stock pictures of the same seeds; of the stock pictures themselves None.
        scores: By name; "all" or the like.
        to_stock: The difference of the deciding score to the stock pipeline's, picture by picture.
        frechet: Distance to real pictures; None where there are none.
        gate_step: The gate step of the papers' gate; None: it is something else.
        gate_steps: Where a gate that decides itself closed, picture by picture.
    """

    name: str
    error: str | None = None
    arithmetic: float = math.nan
    psnr: Estimate | None = None
    ssim: Estimate | None = None
    scores: Mapping[str, Estimate] = field(default_factory=dict)
    to_stock: Estimate | None = None
    frechet: float | None = None
    gate_step: int | None = None
    gate_steps: tuple[int, ...] = ()

    @property
    def speed_up(self) -> float:
        """How many times less arithmetic it does than the stock run."""
        return 1 / self.arithmetic


@dataclass(frozen=True)
class Report:
    """All rows, the stock pipeline's first.

    Args:
        settings: How they were drawn.
        deciding: Name of the score that the frontier is of.
        rows: One for each way.
    """

    settings: Mapping[str, Any]
    deciding: str
    rows: tuple[Row, ...]

    def frontier(self) -> list[Row]:
        """The rows that no other beats in the deciding score with as little arithmetic, the cheapest first."""
        best, chosen = -math.inf, []
        for row in sorted(self.measured(), key=lambda row: (row.arithmetic, -self.score(row))):
            if self.score(row) > best:
                best = self.score(row)
                chosen.append(row)
        return chosen

    def gate_step(self) -> int | None:
        """The gate step that the frontier suggests: that of the largest score less half of the arithmetic.

        A per cent of the stock pipeline's arithmetic must buy half a point. What a gate loses is taken to fall
        exponentially with its step, fitted to all gates by least squares: single shares are noisy. None: fewer than
        three were drawn.
        """
        gates = {row.gate_step: row for row in self.measured() if row.gate_step is not None}
        if len(gates) < 3:
            return None
        losses = {step: self.score(self.rows[0]) - self.score(row) for step, row in gates.items()}

        def fit(rate: float) -> tuple[float, float]:
            """The sum of squares that is left, and the loss at step 0."""
            size = sum(loss * rate**step for step, loss in losses.items()) / sum(rate ** (2 * step) for step in losses)
            return sum((loss - size * rate**step) ** 2 for step, loss in losses.items()), size

        rate = min((hundredth / 100 for hundredth in range(30, 100)), key=fit)
        _, size = fit(rate)
        return min(gates, key=lambda step: size * rate**step + gates[step].arithmetic / 2)

    def score(self, row: Row) -> float:
        """The deciding score of a row."""
        return row.scores[self.deciding].mean

    def measured(self) -> list[Row]:
        """The rows of ways that did not fail."""
        return [row for row in self.rows if row.error is None]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"frontier": [row.name for row in self.frontier()], "gate_step": self.gate_step()}

    def __str__(self) -> str:
        measured = self.measured()
        names = list(measured[0].scores)
        has_frechet = ["Fréchet"] if any(row.frechet is not None for row in measured) else []
        heading = ("", "arithmetic", *names, "to stock", "PSNR, dB", "SSIM", *has_frechet, "")
        on_frontier = self.frontier()
        lines = [
            (
                row.name,
                f"{row.speed_up:.2f}x less",
                *(self._shown(row, name) for name in names),
                "" if row.to_stock is None else row.to_stock.shown(1, 100),
                "" if row.psnr is None else row.psnr.shown(1),
                "" if row.ssim is None else f"{row.ssim.mean:.3f}",
                *("" if row.frechet is None else f"{row.frechet:.2f}" for _ in has_frechet),
                "on the frontier" if row in on_frontier else "",
            )
            for row in measured
        ]
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return "\n".join([settings, "", format_table([heading, *lines]), "", *self._notes()]).rstrip()

    def _notes(self) -> Iterator[str]:
        suggested = self.gate_step()
        if suggested is not None:
            yield f"gate step {suggested}: of the papers' gates, the largest fitted score less half of the arithmetic"
        for row in self.rows:
            if row.gate_steps:
                yield (
                    f"{row.name}: the gate closed at step {median_low(row.gate_steps)}, the middle of "
                    f"{min(row.gate_steps)} to {max(row.gate_steps)}"
                )
            if row.error is not None:
                yield f"{row.name}: {row.error}"

    def _shown(self, row: Row, name: str) -> str:
        score = row.scores[name]
        return score.shown(1, 100) if name == self.deciding else f"{score.mean * 100:.1f}"


def plot_quality(report: Report, path: Path) -> None:
    """The deciding score against arithmetic, the frontier drawn, as a picture that stands alone.

    Raises:
        MissingPackageError: `matplotlib` is not installed.
    """
    figure = new_figure(10, 6.5)
    axes = figure.subplots()
    frontier = report.frontier()
    axes.step(
        [row.arithmetic for row in frontier],
        [report.score(row) for row in frontier],
        where="post",
        color=GREY,
        label="frontier",
    )
    for prefix, (colour, marker, label) in KINDS.items():
        rows = [row for row in report.measured() if _kind(row) == prefix]
        if not rows:
            continue
        estimates = [row.scores[report.deciding] for row in rows]
        spread = [[max(0, e.mean - e.low) for e in estimates], [max(0, e.high - e.mean) for e in estimates]]
        axes.errorbar(
            [row.arithmetic for row in rows],
            [e.mean for e in estimates],
            yerr=spread,
            fmt=marker,
            color=colour,
            elinewidth=0.6,
            label=label,
        )
    for row in report.measured():
        if _kind(row) in NAMED_IN_PLOTS:
            place = (row.arithmetic, row.scores[report.deciding].high)
            axes.annotate(row.name, place, (0, 3), textcoords="offset points", fontsize=7, rotation=90, ha="center")
    scores = [report.score(row) for row in report.measured()]
    most = max(scores)
    bottom = max(min(scores) - 0.02, 0.75 * most)
    axes.set_ylim(bottom, most + max(0.4 * (most - bottom), 0.02))  # with room for the names
    axes.set_yticks([tick for tick in axes.get_yticks() if bottom <= tick <= 1])
    axes.set_xlabel("arithmetic of the denoiser, as a part of the stock pipeline's")
    axes.set_ylabel(f"{report.deciding}, with 95% intervals")
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    axes.set_title(f"What each way costs in its pictures: {settings}", fontsize=9, loc="left", wrap=True)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


KINDS = {  # by how a way's name begins: colour, marker, label
    "stock": ("#111111", "*", "stock"),
    "gate step": (BLUE, "o", "the gate, at each step"),
    "look": ("#1b8a5a", "D", "the gate, with looks"),
    "guidance dropped": ("#d9a441", "x", "control: guidance dropped, cross-attention computed"),
    "fewer steps": (RED, "s", "fewer steps"),
    "": ("#7d5ba6", "^", "others, and with them"),
}
NAMED_IN_PLOTS = ("stock", "look", "fewer steps", "")


def _kind(row: Row) -> str:
    return next(prefix for prefix in KINDS if row.name.startswith(prefix))
