"""The rows of the benchmark table (published, counted, timed, drawn), as text, as JSON and as a picture."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tgate_processors._tables import Shown, format_settings
from tgate_processors._tables import Table as TextTable
from tgate_processors.measure.bench import Spread
from tgate_processors.measure.intervals import Estimate
from tgate_processors.measure.plotting import BLUE, GREY, ORANGE, PALE, new_figure
from tgate_processors.measure.published import Counted, PublishedRow, base_of


NOTES = """\
Published: READMEs of tgate 0.1.2 and, for the last four rows, of 1.0.0, which measured FID with other captions.
Speed-ups, points and PSNR compare a row with the row without T-GATE; DeepCache (SD-XL) is compared with SD-XL.
Accuracy is the share of pictures that show all that their prompts say.
The DeepCache rows were published for DeepCache's own SDXL pipeline, with guidance through step 12. Its shallow steps
cost more than those of DeepCache's helper for stock pipelines (127.9 against 49.0 GMACs). The table counts the helper,
with the gate at step 10."""


@dataclass(frozen=True)
class Pictures:
    """Scores of the pictures that an embedded model drew with the settings of a row.

    Args:
        accuracy: Share of pictures that show all that their prompts say.
        to_base: Accuracy minus that of the row that this one is compared with, paired by prompt. None if it has none.
        psnr: Likeness to the pictures of the row that this one is compared with, in dB. None if it has none.
    """

    accuracy: Estimate
    to_base: Estimate | None
    psnr: Estimate | None


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        published: Published figures.
        embedded: Name of the embedded model of this kind.
        counted: Arithmetic and parameters at full size.
        speed_up: Speed-up at reduced size over the row that this one is compared with. None if it was not measured.
        pictures: Scores of the embedded model's pictures. None if none were drawn.
        error: Reason why something is missing. None if nothing failed.
    """

    published: PublishedRow
    embedded: str
    counted: Counted
    speed_up: Spread | None = None
    pictures: Pictures | None = None
    error: str | None = None

    @property
    def difference(self) -> float:
        """Counted arithmetic minus the published, as a share of the published."""
        return self.counted.tmacs / self.published.tmacs - 1

    @property
    def published_speed_up(self) -> float:
        """Published speed-up over the row that this one is compared with."""
        return base_of(self.published).seconds / self.published.seconds

    def as_dict(self) -> dict[str, Any]:
        published = asdict(self.published)
        published["gate"] = None if self.published.gate is None else str(self.published.gate)
        return {
            "name": self.published.name,
            "published": published | {"speed_up": self.published_speed_up},
            "counted": asdict(self.counted) | {"difference": self.difference},
            "speed_up": None if self.speed_up is None else asdict(self.speed_up),
            "embedded": self.embedded,
            "pictures": None if self.pictures is None else asdict(self.pictures),
            "error": self.error,
        }


@dataclass(frozen=True)
class Table(Shown):
    """All rows of the table, and the settings of their measurement."""

    settings: Mapping[str, Any]
    rows: Sequence[Row]

    def as_dict(self) -> dict[str, Any]:
        return {"settings": dict(self.settings), "rows": [row.as_dict() for row in self.rows]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.rows)} rows)"

    def _parts(self) -> Iterator[str | TextTable]:
        yield format_settings(self.settings)
        for part in (self._at_full_size(), self._measured(), NOTES):
            yield ""
            yield part
        for row in self.rows:
            if row.error:
                yield ""
                yield f"{row.published.name}: {row.error}"

    def _at_full_size(self) -> TextTable:
        heading = ("at full size", "TMACs, published", "counted", "difference", "with attention's products")
        lines = [
            (
                row.published.name,
                f"{row.published.tmacs:.3f}",
                f"{row.counted.tmacs:.3f}",
                f"{row.difference:+.3%}",
                f"{row.counted.tmacs_with_attention:.3f}",
                "" if row.published.parameters is None else f"{row.published.parameters:.1f}",
                f"{row.counted.parameters:.1f}",
            )
            for row in self.rows
        ]
        return TextTable([(*heading, "parameters, M, published", "counted"), *lines])

    def _measured(self) -> TextTable:
        heading = (
            "measured",
            "settings",
            "speed-up, published",
            "at reduced size",
            "FID, published",
            "embedded model",
        )
        lines = [
            (
                row.published.name,
                _settings(row.published),
                f"{row.published_speed_up:.3f}",
                "" if row.speed_up is None else str(row.speed_up),
                f"{row.published.fid:.3f}",
                row.embedded,
                *_cells(row.pictures),
            )
            for row in self.rows
        ]
        return TextTable([(*heading, "accuracy, %", "points more", "PSNR, dB"), *lines])


def _settings(row: PublishedRow) -> str:
    """Return the settings of a row's gate and cache. The stock pipeline has none."""
    gate = [] if row.gate is None else [str(row.gate)]
    return ", ".join([*gate, *([] if row.cache_interval is None else [f"cache_interval={row.cache_interval}"])])


def _cells(pictures: Pictures | None) -> tuple[str, str, str]:
    if pictures is None:
        return "", "", ""
    more, psnr = pictures.to_base, pictures.psnr
    return (
        pictures.accuracy.shown(1, 100),
        "" if more is None else more.shown(1, 100),
        "" if psnr is None else psnr.shown(1),
    )


def plot_table(table: Table, path: Path) -> None:
    """Plot arithmetic, speed-up and accuracy of every row, side by side, to a file.

    Raises:
        MissingPackageError: `matplotlib` is not installed.
    """
    rows = table.rows
    figure = new_figure(15, 2 + 0.36 * len(rows))
    arithmetic, speed, pictures = figure.subplots(1, 3, sharey=True)
    places = range(len(rows))
    colours = [PALE if row.published.gate is None else BLUE for row in rows]
    arithmetic.barh(places, [row.counted.tmacs for row in rows], color=colours)
    published: dict[str, Any] = {"color": ORANGE, "markersize": 14, "markeredgewidth": 2.5, "label": "published"}
    arithmetic.plot([row.published.tmacs for row in rows], places, "|", **published)
    arithmetic.set_xlabel("TMACs of a run at full size, counted")
    arithmetic.set_yticks(places, [row.published.name for row in rows])
    arithmetic.invert_yaxis()
    for place, row in zip(places, rows, strict=True):
        _plot_speed_up(row.speed_up, place, colours[place], speed)
        _plot_pictures(row.pictures, place, colours[place], pictures)
    speed.plot([row.published_speed_up for row in rows], places, "|", **published)
    speed.axvline(1, color=GREY, linewidth=0.8)
    speed.set_xlabel(
        "speed-up at reduced size over the row without T-GATE\n(DeepCache's over SD-XL): median and range"
    )
    pictures.set_xlabel("accuracy of the embedded model, %,\nwith 95% intervals")
    for axes in (arithmetic, speed, pictures):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*arithmetic.get_legend_handles_labels(), frameon=False, loc="outside lower left")
    figure.suptitle(f"The benchmark table of T-GATE, measured here: {format_settings(table.settings)}", fontsize=9)
    figure.savefig(path, dpi=150)


def _plot_speed_up(speed_up: Spread | None, place: int, colour: str, axes: Any) -> None:
    if speed_up is None:
        return
    median = speed_up.median
    reach = [[median - speed_up.least], [speed_up.most - median]]
    axes.barh(place, median, xerr=reach, color=colour, ecolor="#333333", capsize=3)


def _plot_pictures(pictures: Pictures | None, place: int, colour: str, axes: Any) -> None:
    if pictures is None:
        return
    share = pictures.accuracy
    reach = [[100 * max(0, share.mean - share.low)], [100 * max(0, share.high - share.mean)]]
    axes.errorbar(100 * share.mean, place, xerr=reach, fmt="o", color=colour, ecolor="#333333", capsize=3)
