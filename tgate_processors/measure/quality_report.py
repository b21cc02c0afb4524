"""Report of what each method costs in pictures under each sampler, as text and as JSON."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from statistics import fmean, median_low
from typing import Any

import torch
from torch import Tensor

from tgate_processors._tables import Shown, Table, format_settings
from tgate_processors.measure.intervals import Estimate, difference, estimate


@dataclass(frozen=True, eq=False)  # `==` of tensors gives no single truth value
class Row:
    """Measurements of the pictures that one method drew.

    Args:
        name: Name of the method.
        error: Reason why the measurements are missing. None if nothing failed.
        arithmetic: Multiply-accumulates of the denoiser, with attention's products, over the stock run's.
        scores: Scores by name, `(count,)` each, with a boolean or a number for every picture.
        psnr, ssim: Likeness to the stock pictures of the same seeds, `(count,)`. None for the stock pictures.
        frechet: Distance to real pictures. None if there are no real ones.
        gate_step: Gate step, if the method is the plain gate of the papers. None for any other method.
        gate_steps: Steps at which the gate closed for each picture, with `gate_step="auto"`.
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
        """Arithmetic of the stock run over that of this method."""
        return 1 / self.arithmetic


@dataclass(frozen=True)
class Report(Shown):
    """All rows under one sampler.

    Args:
        sampler: Name of the sampler.
        deciding: Name of the score that decides the frontier.
        rows: Rows of the methods, with the stock pipeline's first.
        papers: Name of the method that is the papers' gate, with which others are compared too.
    """

    sampler: str
    deciding: str
    rows: tuple[Row, ...]
    papers: str | None = None

    @cached_property
    def measured(self) -> list[Row]:
        """Rows of the methods that did not fail."""
        return [row for row in self.rows if row.error is None]

    def score(self, row: Row) -> float:
        """Return the mean of the deciding score of a row."""
        return float(row.scores[self.deciding].double().mean())

    def to_stock(self, row: Row) -> Estimate:
        """Return the deciding score of a row minus the stock pipeline's, paired by picture."""
        return difference(row.scores[self.deciding], self.rows[0].scores[self.deciding])

    def to_papers(self, row: Row) -> tuple[Estimate, Estimate] | None:
        """Return the deciding score and the PSNR of a row minus those of the papers' gate, paired by picture.

        None if either row has no PSNR, or if the row is the papers' gate itself.
        """
        papers = self.row(self.papers)
        if papers is None or papers.psnr is None or row is papers or row.psnr is None:
            return None
        scores = difference(row.scores[self.deciding], papers.scores[self.deciding])
        return scores, difference(row.psnr, papers.psnr)

    def row(self, name: str | None) -> Row | None:
        """Return the row of this name. None if it was not measured."""
        return next((row for row in self.measured if row.name == name), None)

    def frontier(self) -> list[Row]:
        """Return the rows that no other beats in the deciding score with as little arithmetic, the cheapest first."""
        best, chosen = -math.inf, []
        for row in sorted(self.measured, key=lambda row: (row.arithmetic, -self.score(row))):
            if self.score(row) > best:
                best = self.score(row)
                chosen.append(row)
        return chosen

    def gate_step(self) -> int | None:
        """Return the gate step with the largest score minus half of the arithmetic.

        So one percent of the stock pipeline's arithmetic must gain half a point of the score. Single scores are noisy,
        so the loss of a gate is taken from a curve that falls exponentially with the gate step and is fitted to all
        gates by least squares. None if fewer than three gates were drawn.
        """
        gates = {row.gate_step: row for row in self.measured if row.gate_step is not None}
        if len(gates) < 3:
            return None
        losses = {step: self.score(self.rows[0]) - self.score(row) for step, row in gates.items()}

        def fit(rate: float) -> tuple[float, float]:
            """Return the remaining sum of squares, and the loss at step 0."""
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
        return f"{type(self).__name__}(sampler {self.sampler}, {len(self.rows)} methods)"

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
            yield f"gate step {suggested} has the largest fitted score minus half of the arithmetic"
        for row in self.rows:
            if row.gate_steps:
                yield (
                    f"{row.name}: the gate closed at step {median_low(row.gate_steps)} in the median run, "
                    f"{min(row.gate_steps)} to {max(row.gate_steps)} in all"
                )
            if row.error is not None:
                yield f"{row.name}: {row.error}"


@dataclass(frozen=True)
class Together:
    """Results of one method over all samplers.

    Args:
        name: Name of the method.
        arithmetic: Mean arithmetic, over the stock run's.
        scores: Mean of the deciding score under each sampler.
        together: Mean of the deciding score over all samplers.
        to_stock, to_papers: Deciding score minus that of the stock pipeline and of the papers' gate, paired by prompt.
        psnr_to_papers: PSNR minus that of the papers' gate in dB, paired by prompt.
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
        settings: Settings of the measurement.
        reports: Report of each sampler, all with the same prompts and methods.
    """

    settings: Mapping[str, Any]
    reports: Sequence[Report]

    def together(self) -> list[Together]:
        """Return the results over all samplers, of the methods that failed under none.

        The pictures of one prompt under all samplers are one observation.
        """
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
        """Return the deciding scores of a method, `(samplers, count)`."""
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
        return f"{type(self).__name__}({len(self.reports[0].rows)} methods under {samplers})"

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
