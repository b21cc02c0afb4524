"""Plot of what each method costs in pictures."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tgate_processors._tables import format_settings
from tgate_processors.measure.intervals import Estimate, estimate
from tgate_processors.measure.plotting import BLUE, GREY, PALE, RED, new_figure
from tgate_processors.measure.quality_report import Quality, Report, Row


KINDS = {  # beginning of a method's name: colour, marker, label
    "stock": ("#111111", "*", "stock"),
    "gate step": (BLUE, "o", "the gate, at each step"),
    "look": ("#1b8a5a", "D", "the gate, with looks"),
    "guidance dropped": ("#d9a441", "x", "control: guidance dropped, cross-attention computed"),
    "guidance from": ("#4bb3b3", "v", "a guidance interval"),
    "fewer steps": (RED, "s", "fewer steps"),
    "": ("#7d5ba6", "^", "other methods, alone or with the gate"),
}
NAMED_IN_PLOTS = ("stock", "look", "fewer steps", "")  # kinds whose rows are all named
NAME_WIDTH = 0.02  # share of the axes' width for a name, which is written upwards


def plot_quality(quality: Quality, path: Path) -> None:
    """Plot the deciding score against arithmetic under each sampler, to a file.

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
    figure.suptitle(f"What each method costs in its pictures: {format_settings(quality.settings)}", fontsize=10)
    figure.savefig(path, dpi=150)


def _limits(reports: Sequence[Report]) -> tuple[float, float]:
    """Return the ends of the score's axis in percent.

    The axis holds all intervals, but nothing below three quarters of the best score.
    """
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
    of_interest = [report.row(report.papers), *(row for row in seen if row.gate_steps), *frontier]
    _write_names(report, [row for row in seen if row in of_interest or _kind(row) in NAMED_IN_PLOTS], axes)
    axis = f"sampler {report.sampler}: arithmetic of the denoiser, % of the stock pipeline's"
    unseen = ", ".join(f"{row.name} {report.score(row):.1%}" for row in report.measured if row not in seen)
    axes.set_xlabel("\n".join([axis, *textwrap.wrap(f"below what is shown: {unseen}" if unseen else "", 100)]))
    axes.set_ylabel(f"{report.deciding}, %, with 95% intervals")
    axes.spines[["top", "right"]].set_visible(False)


def _reach(one: Estimate) -> tuple[float, float]:
    """Return how far an interval reaches below and above its mean, in percent. An infinite one gives zeros."""
    below, above = one.mean - one.low, one.high - one.mean
    return (100 * max(0, below), 100 * max(0, above)) if math.isfinite(below + above) else (0, 0)


def _write_names(report: Report, rows: Sequence[Row], axes: Any) -> None:
    """Write the rows' names next to each other above the data, each with a line to its point."""
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


def _kind(row: Row) -> str:
    return next(prefix for prefix in KINDS if row.name.startswith(prefix))
