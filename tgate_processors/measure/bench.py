"""Time the contestants in turns and report their ratios, because times on a machine vary."""

import platform
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tgate_processors._tables import Shown, Table, format_settings
from tgate_processors._validation import require_whole
from tgate_processors.measure.contestants import Contestant, Run, contestants
from tgate_processors.measure.interruption import keeping
from tgate_processors.measure.plotting import BLUE, PALE, RED, new_figure
from tgate_processors.measure.rig import Rig
from tgate_processors.measure.run_cost import run_cost
from tgate_processors.measure.ways import named, said_of


@dataclass(frozen=True)
class Spread:
    """Median and range of paired measurements."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.most:.3f})"


@dataclass(frozen=True)
class Row:
    """Measurements of a contestant. Times are in seconds.

    Args:
        name: Name of the contestant.
        error: Reason why the measurements are missing. None if nothing failed.
        run: Time of a whole run, median over the rounds.
        runs: Time of the whole run in each round.
        planning_step, fidelity_step: Shortest step of a round before and after the gate, median over the rounds.
        speed_up: Time of the stock pipeline's run over that of this one, in each round.
        planning_to_stock: Planning step over the stock pipeline's, in each round.
        fidelity_to_limit: Fidelity step over the surgical limit's, in each round.
        of_arithmetic: Speed-up over the speed-up in multiply-accumulates, which include attention's products. None if
            the contestant does another arithmetic than the gated run.
        peak_bytes: Peak of the device's memory, minus what was allocated before the run. None on a CPU.
    """

    name: str
    error: str | None = None
    run: float | None = None
    runs: tuple[float, ...] = ()
    planning_step: float | None = None
    fidelity_step: float | None = None
    speed_up: Spread | None = None
    planning_to_stock: Spread | None = None
    fidelity_to_limit: Spread | None = None
    of_arithmetic: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Report(Shown):
    """All rows, with the settings and the machine of the measurement.

    Args:
        settings: Settings of the measurement.
        machine: Processor, and versions of the packages.
        mac_speed_up: Speed-up of the gated run in multiply-accumulates, which include attention's products.
        cache_bytes: Size of the stored outputs of the gated run.
        rows: Rows of the contestants, with the stock pipeline's first.
    """

    settings: dict[str, Any]
    machine: dict[str, Any]
    mac_speed_up: float
    cache_bytes: int
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.rows)} contestants, arithmetic {self.mac_speed_up:.3f}x less when gated)"
        )

    def _parts(self) -> Iterable[str | Table]:
        heading = ("contestant", "run, s", "speed-up", "planning step, s", "to stock", "fidelity step, s", "to limit")
        lines = [heading, *map(_cells, self.rows)]
        pairs = list(map(format_settings, (self.settings, self.machine)))
        of_arithmetic = [f"{row.name} {row.of_arithmetic:.3f}" for row in self.rows if row.of_arithmetic]
        peaks = [f"{row.name} {row.peak_bytes / 2**20:.0f} MiB" for row in self.rows if row.peak_bytes is not None]
        failures = [f"{row.name}: {row.error}" for row in self.rows if row.error]
        return [
            *pairs,
            "",
            Table(lines),
            "",
            f"speed-up of the gated run in arithmetic, with attention's products: {self.mac_speed_up:.3f}",
            f"speed-up in time over speed-up in arithmetic: {', '.join(of_arithmetic)}",
            f"stored outputs of the gated run: {self.cache_bytes / 2**20:.1f} MiB",
            *([f"peak memory of a run: {', '.join(peaks)}"] if peaks else []),
            *failures,
        ]


def _cells(row: Row) -> tuple[str, ...]:
    if row.error is not None:
        return (row.name, "failed", "", "", "", "", "")
    values = (
        f"{row.run:.3f}",
        row.speed_up,
        "" if row.planning_step is None else f"{row.planning_step:.4f}",
        row.planning_to_stock,
        "" if row.fidelity_step is None else f"{row.fidelity_step:.4f}",
        row.fidelity_to_limit,
    )
    return (row.name, *("" if value is None else str(value) for value in values))


@dataclass
class Laps:
    """Times of one contestant, in seconds.

    Attributes:
        contestant: The contestant.
        run: Prepared run. None before the first turn.
        error: Reason why the contestant failed. None if it did not.
        steps: Times of the steps, in each round.
        whole: Time of the whole run, in each round.
        peak_bytes: Peak of the device's memory over all runs, minus what was allocated before.
    """

    contestant: Contestant
    run: Run | None = None
    error: str | None = None
    steps: list[list[float]] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    peak_bytes: int = 0


class _Clock:
    """Clock that records marks. On a GPU a mark is an event, which is read after the run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.device.startswith("cuda"):
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # untyped in torch
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def laps(self) -> list[float]:
        """Return the seconds between the marks."""
        pairs = zip(self.marks, self.marks[1:], strict=False)
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
            return [first.elapsed_time(second) / 1000 for first, second in pairs]
        return [second - first for first, second in pairs]


def bench(rig: Rig, *, rounds: int = 5, compiles: bool = False, only: Sequence[str] = ()) -> Report:
    """Time the contestants in turns, after one run of each that is not timed, with a progress bar.

    After Ctrl-C the report covers the rounds that are done.

    Args:
        rig: Rig that the contestants run.
        rounds: Number of timed runs of each contestant.
        compiles: Whether to compile each denoiser.
        only: Parts of the names of the contestants to run. If empty, all run. The stock pipeline always runs.

    Raises:
        ConfigError: `only` has a part that is in no name, or `rounds` is less than 1.
    """
    require_whole("rounds", rounds, least=1)
    cost = run_cost(rig.known, rig.config)
    mac_speed_up = cost.stock_macs / cost.gated_macs
    known = contestants(rig, max(1, round(rig.known.steps / mac_speed_up)))
    chosen = named(known, only)
    all_laps = [Laps(contestant) for contestant in chosen]
    settings: dict[str, Any] = {
        "model": rig.name,
        "denoiser": f"{rig.known.denoiser} of {cost.parameters / 1e6:.0f} M parameters",
        "pixels": f"{rig.known.height} x {rig.known.width}",
        "batch": rig.batch,
        "steps": rig.known.steps,
        "gate step": rig.gate_step,
        "dtype": str(rig.dtype).removeprefix("torch."),
        "compiled": compiles,
    }
    done: list[int] = []
    with (
        tqdm(total=len(chosen) * (rounds + 1), desc="timing", unit="run", leave=False, disable=None) as bar,
        keeping(done, settings),
    ):
        for turn in take_rounds(all_laps, rig, rounds, bar, compiles=compiles):
            done.append(turn)
    settings["rounds"] = len(done)
    for laps in all_laps:  # after an interrupted round some have one lap more
        del laps.steps[len(done) :], laps.whole[len(done) :]
    rows = [_row(laps, all_laps, rig, mac_speed_up) for laps in all_laps]
    return Report(settings, machine(rig.device), mac_speed_up, cost.cache_bytes * rig.batch, tuple(rows))


def take_rounds(all_laps: Sequence[Laps], rig: Rig, rounds: int, bar: Any, *, compiles: bool = False) -> Iterator[int]:
    """Time the contestants in turns, after a round that is not timed. Yield the number of each timed round at its end.

    Args:
        all_laps: Times of each contestant, which this fills.
        rig: Rig that the contestants run.
        rounds: Number of timed rounds.
        bar: Progress bar that counts runs.
        compiles: Whether to compile each denoiser.
    """
    for turn in range(rounds + 1):
        for laps in all_laps:
            bar.set_postfix_str(laps.contestant.name)
            _take_turn(laps, rig, compiles, timed=turn > 0)
            bar.update()
        if turn > 0:
            yield turn


def _take_turn(laps: Laps, rig: Rig, compiles: bool, *, timed: bool) -> None:
    """Run a contestant once. A contestant that fails records its error and runs no more."""
    if laps.error is not None:
        return
    try:
        if laps.run is None:
            laps.run = laps.contestant.prepare(rig, compiles)
        clock = _Clock(rig.device)
        before = _allocated(rig.device)
        clock.mark()
        laps.run(clock.mark)
        clock.mark()
        seconds = clock.laps()
    except Exception as error:  # a peer may fail with any error; the other contestants still run
        laps.error = said_of(error)
    else:
        if timed:
            laps.steps.append(seconds[:-1])
            laps.whole.append(sum(seconds))
            laps.peak_bytes = max(laps.peak_bytes, _peak(rig.device) - before)


def _allocated(device: str) -> int:
    if not device.startswith("cuda"):
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: str) -> int:
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else 0


def _row(laps: Laps, all_laps: Sequence[Laps], rig: Rig, mac_speed_up: float) -> Row:
    name = laps.contestant.name
    if laps.error is not None:
        return Row(name, laps.error)
    by_name = {other.contestant.name: other for other in all_laps if other.error is None}
    stock, limit = by_name["stock"], by_name.get("surgical limit")
    speed_up = paired(stock.whole, laps.whole)
    row = Row(
        name,
        run=statistics.median(laps.whole),
        runs=tuple(laps.whole),
        speed_up=speed_up,
        of_arithmetic=speed_up.median / mac_speed_up if name in ("tgate_processors", "surgical limit") else None,
        peak_bytes=laps.peak_bytes if rig.device.startswith("cuda") else None,
    )
    if not laps.contestant.phases:
        return row
    planning, fidelity = _phases(laps, rig)
    row = replace(
        row,
        planning_step=statistics.median(planning),
        planning_to_stock=paired(planning, _phases(stock, rig)[0]),
    )
    if not laps.contestant.closes:
        return row
    return replace(
        row,
        fidelity_step=statistics.median(fidelity),
        fidelity_to_limit=None if limit is None else paired(fidelity, _phases(limit, rig)[1]),
    )


def _phases(laps: Laps, rig: Rig) -> tuple[list[float], list[float]]:
    """Return the shortest step of each round, before the gate and after it.

    The first step includes the start of the call, so it counts only if no other step is before the gate.
    """
    gate = rig.gate_step
    planning = [min(steps[min(1, gate - 1) : gate]) for steps in laps.steps]
    fidelity = [min(steps[gate:]) for steps in laps.steps]
    return planning, fidelity


def paired(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Return the median and the range of the ratios, each of one round."""
    ratios = sorted(one / other for one, other in zip(numerators, denominators, strict=True))
    return Spread(statistics.median(ratios), ratios[0], ratios[-1])


def machine(device: str) -> dict[str, Any]:
    """Return the processor, and the versions of Python, torch and diffusers."""
    if device.startswith("cuda"):
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    versions = {name: metadata.version(name) for name in ("torch", "diffusers")}
    return {"on": processor, **versions, "python": platform.python_version()}


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def plot_speed_ups(report: Report, path: Path) -> None:
    """Plot the speed-ups with their ranges, and the speed-up in arithmetic, to a file.

    Raises:
        MissingPackageError: `matplotlib` is not installed.
    """
    rows = [row for row in report.rows if row.speed_up is not None][::-1]
    figure = new_figure(9, 1.8 + 0.42 * len(rows))
    axes = figure.subplots()
    medians = [row.speed_up.median for row in rows if row.speed_up]
    below = [row.speed_up.median - row.speed_up.least for row in rows if row.speed_up]
    above = [row.speed_up.most - row.speed_up.median for row in rows if row.speed_up]
    colours = [BLUE if row.name == "tgate_processors" else PALE for row in rows]
    axes.barh([row.name for row in rows], medians, xerr=[below, above], color=colours, ecolor="#333333", capsize=3)
    axes.axvline(report.mac_speed_up, color=RED, linestyle="--", label="arithmetic of the gated run")
    for place, (median, colour) in enumerate(zip(medians, colours, strict=True)):
        axes.text(0.02, place, f"{median:.2f}x", va="center", color="white" if colour == BLUE else "#111111")
    failed = [row.name for row in report.rows if row.error is not None]
    axes.set_xlabel(
        "speed-up over the stock pipeline: median and range of the rounds"
        + (f"\nfailed: {', '.join(failed)}" if failed else "")
    )
    wanted = ("model", "denoiser", "pixels", "batch", "steps", "gate step", "dtype", "compiled")
    figure.suptitle(
        ", ".join(f"{key} {report.settings[key]}" for key in wanted[:4])
        + "\n"
        + ", ".join(f"{key} {report.settings[key]}" for key in wanted[4:])
        + f"; {report.machine['on']}",
        fontsize=9,
    )
    figure.legend(loc="outside lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
