"""What was measured of each way to run a pipeline faster, under each sampler: a report that prints and is pictured."""

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import torch
from torch import Tensor

from tgate_processors._tables import Shown, Table, format_settings
from tgate_processors.measure.intervals import Estimate, difference, estimate
from tgate_processors.measure.plotting import BLUE, GREY, PALE, RED, new_figure


@dataclass(frozen=True, eq=False)  # tensors do not compare to one truth
class Row:
    """What one way drew, measured picture by picture.

    Args:
        name: The name of the way.
        error: Why there is no measurement; None where there is one.
        arithmetic: Multiply-accumulates of the denoiser, attention's products among them, over the stock run's.
        scores: By name; `(count,)` each, a boolean or a number for every picture.
        psnr, ssim: Likeness to the stock pictures of the same seeds, `(count,)`; None for these themselves.
        frechet: Distance to real pictures; None where there are none.
        gate_step: The gate step of the papers' gate; None: it is something else.
        gate_steps: Where a gate that decides itself closed, picture by picture.
    """

    name: str
    error: str | None = None
    arithmetic: float = math.nan
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    psnr: Tensor | None = None
    ssim: Tensor | None = None
    frechet: float | None = None
    gate_step: int | None = None
    gate_steps: tuple[int, ...] = ()

    @property
    def speed_up(self) -> float:
        """How many times less arithmetic it does than the stock run."""
        return 1 / self.arithmetic


@dataclass(frozen=True)
class Report(Shown):
    """All rows under one sampler, the stock pipeline's first.

    Args:
        sampler: The name of the sampler.
        deciding: The name of the score that the frontier is of.
        rows: One for each way.
        papers: The name of the way that others are compared with beside the stock pipeline: the papers' gate.
    """

    sampler: str
    deciding: str
    rows: tuple[Row, ...]
    papers: str | None = None

    @cached_property
    def measured(self) -> list[Row]:
        """The rows of ways that did not fail."""
        return [row for row in self.rows if row.error is None]

    def score(self, row: Row) -> float:
        """The mean of the deciding score of a row."""
        return float(row.scores[self.deciding].double().mean())

    def to_stock(self, row: Row) -> Estimate:
        """What the deciding score of a row is more than the stock pipeline's, picture by picture."""
        return difference(row.scores[self.deciding], self.rows[0].scores[self.deciding])

    def to_papers(self, row: Row) -> tuple[Estimate, Estimate] | None:
        """What a row has more than the papers' gate: of the deciding score, and of PSNR; None without both."""
        papers = self.row(self.papers)
        if papers is None or papers.psnr is None or row is papers or row.psnr is None:
            return None
        scores = difference(row.scores[self.deciding], papers.scores[self.deciding])
        return scores, difference(row.psnr, papers.psnr)

    def row(self, name: str | None) -> Row | None:
        """The row of this name, if it was measured."""
        return next((row for row in self.measured if row.name == name), None)

    def frontier(self) -> list[Row]:
        """The rows that no other beats in the deciding score with as little arithmetic, the cheapest first."""
        best, chosen = -math.inf, []
        for row in sorted(self.measured, key=lambda row: (row.arithmetic, -self.score(row))):
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
        gates = {row.gate_step: row for row in self.measured if row.gate_step is not None}
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

    def as_dict(self) -> dict[str, Any]:
        rows = [self._row_as_dict(row) for row in self.rows]
        return {"rows": rows, "frontier": [row.name for row in self.frontier()], "gate_step": self.gate_step()}

    def _row_as_dict(self, row: Row) -> dict[str, Any]:
        of_row = {"name": row.name, "error": row.error}
        if row.error is not None:
            return of_row
        papers = self.to_papers(row)
        return of_row | {
            "arithmetic": row.arithmetic,
            "scores": {name: asdict(estimate(values)) for name, values in row.scores.items()},
            "psnr": None if row.psnr is None else asdict(estimate(row.psnr)),
            "ssim": None if row.ssim is None else asdict(estimate(row.ssim)),
            "to_stock": None if row.psnr is None else asdict(self.to_stock(row)),
            "to_papers": None if papers is None else asdict(papers[0]),
            "psnr_to_papers": None if papers is None else asdict(papers[1]),
            "frechet": row.frechet,
            "gate_step": row.gate_step,
            "gate_steps": list(row.gate_steps),
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}(sampler {self.sampler}, {len(self.rows)} ways)"

    def _parts(self) -> Iterator[str | Table]:
        has_frechet = ["Fréchet"] if any(row.frechet is not None for row in self.measured) else []
        heading = (f"sampler {self.sampler}", "arithmetic", f"{self.deciding}, %", "to stock, points")
        more = ("to the papers' gate", "PSNR, dB", "to the papers' gate", "SSIM", *has_frechet, "")
        on_frontier = self.frontier()
        lines = [
            (
                row.name,
                f"{row.speed_up:.2f}x less",
                estimate(row.scores[self.deciding]).shown(1, 100),
                "" if row.psnr is None else self.to_stock(row).shown(1, 100),
                *self._shown_to_papers(row),
                "" if row.ssim is None else f"{float(row.ssim.mean()):.3f}",
                *("" if row.frechet is None else f"{row.frechet:.2f}" for _ in has_frechet),
                "on the frontier" if row in on_frontier else "",
            )
            for row in self.measured
        ]
        yield Table([heading + more, *lines])
        yield from self._notes()

    def _shown_to_papers(self, row: Row) -> tuple[str, str, str]:
        psnr = "" if row.psnr is None else estimate(row.psnr).shown(1)
        papers = self.to_papers(row)
        return ("", psnr, "") if papers is None else (papers[0].shown(1, 100), psnr, papers[1].shown(1))

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


@dataclass(frozen=True)
class Together:
    """What one way costs over all samplers, prompt by prompt: the mean of what it costs under each.

    Args:
        name: The name of the way.
        arithmetic: The mean.
        scores: The mean of the deciding score under each sampler.
        together: Its mean over all.
        to_stock, to_papers: What it is more than that of the stock pipeline, and of the papers' gate.
        psnr_to_papers: PSNR more than that of the papers' gate, dB.
    """

    name: str
    arithmetic: float
    scores: Mapping[str, float]
    together: float
    to_stock: Estimate | None
    to_papers: Estimate | None
    psnr_to_papers: Estimate | None


@dataclass(frozen=True)
class Quality(Shown):
    """The reports of all samplers.

    Args:
        settings: How they were drawn.
        reports: One for each sampler, of the same prompts and ways.
    """

    settings: Mapping[str, Any]
    reports: Sequence[Report]

    def together(self) -> list[Together]:
        """Over all samplers, of the ways that failed under none. The pictures of one prompt are one observation."""
        names = [row.name for row in self.reports[0].rows]
        return [self._together(name) for name in names if self._is_measured(name)]

    def _is_measured(self, name: str) -> bool:
        return all(report.row(name) for report in self.reports)

    def _together(self, name: str) -> Together:
        stock, papers = self.reports[0].rows[0].name, self.reports[0].papers
        compared = papers if papers is not None and name not in (stock, papers) and self._is_measured(papers) else None
        scores = {report.sampler: report.score(row) for report, row in self._rows(name)}
        return Together(
            name,
            fmean(row.arithmetic for _, row in self._rows(name)),
            scores,
            fmean(scores.values()),
            None if name == stock else difference(self._scores(name), self._scores(stock)),
            None if compared is None else difference(self._scores(name), self._scores(compared)),
            None if compared is None else difference(self._psnr(name), self._psnr(compared)),
        )

    def _rows(self, name: str) -> list[tuple[Report, Row]]:
        return [(report, row) for report in self.reports if (row := report.row(name)) is not None]

    def _scores(self, name: str) -> Tensor:
        """The deciding scores, `(samplers, count)`."""
        return torch.stack([row.scores[report.deciding] for report, row in self._rows(name)])

    def _psnr(self, name: str) -> Tensor:
        return torch.stack([row.psnr for _, row in self._rows(name) if row.psnr is not None])

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "samplers": {report.sampler: report.as_dict() for report in self.reports},
            "together": [asdict(row) for row in self.together()],
        }

    def __repr__(self) -> str:
        samplers = ", ".join(report.sampler for report in self.reports)
        return f"{type(self).__name__}({len(self.reports[0].rows)} ways under {samplers})"

    def _parts(self) -> Iterator[str | Table]:
        yield format_settings(self.settings)
        for report in self.reports:
            yield ""
            yield from report._parts()
        if len(self.reports) > 1:
            yield ""
            yield self._table_of_all()

    def _table_of_all(self) -> Table:
        deciding = self.reports[0].deciding
        names = (report.sampler for report in self.reports)
        of_all = (f"{deciding}, %", "to stock, points", "to the papers' gate", "PSNR to the papers' gate, dB")
        heading = ("all samplers", "arithmetic", *names, *of_all)
        lines = [
            (
                row.name,
                f"{1 / row.arithmetic:.2f}x less",
                *(f"{score * 100:.1f}" for score in row.scores.values()),
                f"{row.together * 100:.1f}",
                *("" if one is None else one.shown(1, 100) for one in (row.to_stock, row.to_papers)),
                "" if row.psnr_to_papers is None else row.psnr_to_papers.shown(1),
            )
            for row in self.together()
        ]
        return Table([heading, *lines])


def plot_quality(quality: Quality, path: Path) -> None:
    """The deciding score against arithmetic under each sampler, as a picture that stands alone.

    Raises:
        MissingPackageError: `matplotlib` is not installed.
    """
    reports = quality.reports
    columns = min(2, len(reports))
    lines = math.ceil(len(reports) / columns)
    figure = new_figure(1 + 8 * columns, 1.2 + 6 * lines)
    panels = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flat)
    least = min(row.arithmetic for report in reports for row in report.measured)
    panels[0].set_xlim(100 * least - 3, 103)
    panels[0].set_ylim(*_limits(reports))
    for panel, report in zip(panels, reports, strict=False):
        _plot_report(report, panel)
    for panel in panels[len(reports) :]:
        panel.set_visible(False)
    kinds = {label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(kinds.values(), kinds, loc="outside lower center", ncols=2 * columns, frameon=False)
    figure.suptitle(f"What each way costs in its pictures: {format_settings(quality.settings)}", fontsize=10)
    figure.savefig(path, dpi=150)


def _limits(reports: Sequence[Report]) -> tuple[float, float]:
    """The ends of the score's axis, per cent: all intervals, but nothing under three quarters of the best score."""
    scores = [report.score(row) for report in reports for row in report.measured]
    estimates = [estimate(row.scores[report.deciding]) for report in reports for row in report.measured]
    ends = [end for one in estimates for end in (one.low, one.high) if math.isfinite(end)]
    lowest, highest = min([*scores, *ends]), max([*scores, *ends])
    return 100 * max(lowest, 0.75 * max(scores)) - 1, 100 * highest + 1


def _plot_report(report: Report, axes: Any) -> None:
    frontier = report.frontier()
    axes.step(
        [100 * row.arithmetic for row in frontier],
        [100 * report.score(row) for row in frontier],
        where="post",
        color=GREY,
        label="frontier",
    )
    bottom, _ = axes.get_ylim()
    seen = [row for row in report.measured if 100 * report.score(row) >= bottom]
    for prefix, (colour, marker, label) in KINDS.items():
        rows = [row for row in seen if _kind(row) == prefix]
        if rows:
            axes.errorbar(
                [100 * row.arithmetic for row in rows],
                [100 * report.score(row) for row in rows],
                yerr=[*zip(*(_reach(estimate(row.scores[report.deciding])) for row in rows), strict=True)],
                fmt=marker,
                color=colour,
                elinewidth=0.6,
                label=label,
            )
    _write_names(report, [row for row in seen if row in frontier or _kind(row) in NAMED_IN_PLOTS], axes)
    axis = f"sampler {report.sampler}: arithmetic of the denoiser, % of the stock pipeline's"
    unseen = ", ".join(f"{row.name} {report.score(row):.1%}" for row in report.measured if row not in seen)
    axes.set_xlabel("\n".join([axis, *textwrap.wrap(f"below what is shown: {unseen}" if unseen else "", 100)]))
    axes.set_ylabel(f"{report.deciding}, %, with 95% intervals")
    axes.spines[["top", "right"]].set_visible(False)


def _reach(one: Estimate) -> tuple[float, float]:
    """How far an interval goes below its mean and above it, per cent; one without an end is not drawn."""
    below, above = one.mean - one.low, one.high - one.mean
    return (100 * max(0, below), 100 * max(0, above)) if math.isfinite(below + above) else (0, 0)


def _write_names(report: Report, rows: Sequence[Row], axes: Any) -> None:
    """Names beside one another above the data, each with a line to its point."""
    left, right = axes.get_xlim()
    rows = sorted(rows, key=lambda row: row.arithmetic)
    places: list[float] = []
    for row in rows:
        place = (100 * row.arithmetic - left) / (right - left)
        places.append(max(place, places[-1] + NAME_WIDTH) if places else place)
    for row, place in zip(rows, places, strict=True):
        at = estimate(row.scores[report.deciding])
        axes.annotate(
            row.name,
            (100 * row.arithmetic, 100 * at.mean + _reach(at)[1]),
            (place, 1.02),
            textcoords="axes fraction",
            arrowprops={"arrowstyle": "-", "color": PALE, "linewidth": 0.6, "relpos": (0.5, 0), "shrinkA": 0},
            fontsize=8,
            rotation=90,
            horizontalalignment="center",
        )


KINDS = {  # by how a way's name begins: colour, marker, label
    "stock": ("#111111", "*", "stock"),
    "gate step": (BLUE, "o", "the gate, at each step"),
    "look": ("#1b8a5a", "D", "the gate, with looks"),
    "guidance dropped": ("#d9a441", "x", "control: guidance dropped, cross-attention computed"),
    "guidance from": ("#4bb3b3", "v", "a guidance interval"),
    "fewer steps": (RED, "s", "fewer steps"),
    "": ("#7d5ba6", "^", "others, and with them"),
}
NAMED_IN_PLOTS = ("stock", "look", "fewer steps", "")  # and whatever is on the frontier
NAME_WIDTH = 0.02  # of the axes, for a name that is written upwards


def _kind(row: Row) -> str:
    return next(prefix for prefix in KINDS if row.name.startswith(prefix))
