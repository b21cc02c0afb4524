"""Summary of what a gated run did."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from textwrap import shorten
from typing import Any

from tgate_processors._copying import meta_copy
from tgate_processors._cost import Cost, NetworkCost
from tgate_processors._layers import attention_layers
from tgate_processors._loop import Loop, PipelineRun
from tgate_processors._modes import Phase
from tgate_processors._record import Evaluation
from tgate_processors._tables import Shown, Table
from tgate_processors.run import Part
from tgate_processors.schedule import LEAST_CHANGES_FOR_AUTO, Schedule


@dataclass(frozen=True)
class _Counter:
    """Evaluations of a network, with the counter of their cost.

    Args:
        network: Counter of the cost.
        evaluations: Evaluations that were computed.
        given: Index of its inputs, for each call of the pipeline.
    """

    network: NetworkCost
    evaluations: tuple[Evaluation, ...]
    given: tuple[int, ...]


@dataclass(frozen=True)
class Summary(Shown):
    """What a gated run did. The arithmetic is counted when it is first asked for, which takes about a second.

    Args:
        settings: Settings of the gate in words, with the preset's name.
        schedule: Modes of the run's steps; None if there was no run.
        evaluations: Evaluations of the denoiser, in order.
        side_evaluations: Evaluations of each ControlNet.
        cache_bytes: Largest number of bytes of attention output that the run kept at a time.
        changes: Changes of cross-attention in the steps from 1 on, if the run watched it to decide its gate step.
        counters: Evaluations of each network, with the counters of their cost.
        known: Notes that do not depend on counting.
    """

    settings: str
    schedule: Schedule | None = None
    evaluations: tuple[Evaluation, ...] = ()
    side_evaluations: tuple[tuple[Evaluation, ...], ...] = ()
    cache_bytes: int = 0
    changes: tuple[float, ...] = ()
    counters: tuple[_Counter, ...] = field(default=(), repr=False, compare=False)
    known: tuple[str, ...] = ()

    @cached_property
    def _counted(self) -> tuple[Cost, int, tuple[str, ...]]:
        """The cost, the stock pipeline's multiply-accumulates, and a note if they could not be counted."""
        try:
            cost = sum((counter.network.of(counter.evaluations) for counter in self.counters), Cost())
            return cost, sum(counter.network.stock(counter.given).macs for counter in self.counters), ()
        except Exception as error:  # a network may fail to run on the meta device for any reason
            return Cost(), 0, (_not_counted(error),)

    @property
    def cost(self) -> Cost:
        """Arithmetic and calls of attention layers in all evaluations."""
        return self._counted[0]

    @property
    def stock_macs(self) -> int:
        """Multiply-accumulates of the stock pipeline's calls; 0 if they could not be counted."""
        return self._counted[1]

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the run and its counting, such as what could not be counted and why."""
        return tuple(dict.fromkeys([*self.known, *self._counted[2]]))

    @property
    def gate_closed_at(self) -> int | None:
        """First step of the fidelity-improving phase, 0-based; None if the gate never closed."""
        has_closed = any(evaluation.mode.phase is Phase.FIDELITY for evaluation in self.evaluations)
        return self.schedule.gate_step if has_closed and self.schedule is not None else None

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch size of each evaluation of the denoiser."""
        return tuple(evaluation.batch for evaluation in self.evaluations)

    @property
    def macs_saved(self) -> float:
        """Share of the stock pipeline's arithmetic that the run saved, 0 to 1; NaN if it could not be counted."""
        return 1 - self.cost.macs / self.stock_macs if self.stock_macs else math.nan

    def __repr__(self) -> str:
        return f"{type(self).__name__}({'no run yet' if self.schedule is None else self._in_short(self.schedule)})"

    def _in_short(self, schedule: Schedule) -> str:
        saved = f"{self.macs_saved:.1%} of the arithmetic saved" if self.stock_macs else "arithmetic not counted"
        return f"{len(schedule)} steps, gate {self._closed}, {saved}"

    @property
    def _closed(self) -> str:
        return "never closed" if self.gate_closed_at is None else f"closed before step {self.gate_closed_at}"

    def _parts(self) -> Iterator[str | Table]:
        rows = [("settings", self.settings)]
        if self.schedule is None:
            rows.append(("run", "none yet: run the pipeline, then ask"))
        else:
            rows += [
                ("steps", f"{len(self.schedule)}, gate {self._closed}"),
                *self._reason(self.schedule),
                ("evaluations", _batches(self.evaluations)),
                *(("  of a ControlNet", _batches(evaluations)) for evaluations in self.side_evaluations),
                *self._arithmetic(),
                ("cache at peak", f"{self.cache_bytes / 2**20:.2f} MiB"),
            ]
        yield Table([*rows, *(("note", note) for note in self.notes)], has_heading=False)

    def _arithmetic(self) -> list[tuple[str, str]]:
        cost = self.cost
        if not self.stock_macs:
            return [("arithmetic", "not counted")]
        if cost.cross_computed + cost.cross_reused:
            cross_attention = f"{cost.cross_computed} calls computed, {cost.cross_reused} reused"
        else:
            cross_attention = "none of its own: guidance alone is left out"
        arithmetic = f"{cost.macs / 1e9:.3f} of {self.stock_macs / 1e9:.3f} GMACs, {self.macs_saved:.1%} saved"
        return [
            ("cross-attention", cross_attention),
            ("self-attention", f"{cost.self_computed} calls computed, {cost.self_reused} reused"),
            ("arithmetic", arithmetic),
        ]

    def _reason(self, schedule: Schedule) -> list[tuple[str, str]]:
        if not self.changes:
            return []
        last = ", ".join(f"{change:.3f}" for change in self.changes[-LEAST_CHANGES_FOR_AUTO:])
        word = "under" if schedule.gate_step < len(schedule) else "not all under"
        return [("  decided by", f"cross-attention changed by {last}: {word} {schedule.config.tolerance:g}")]


def _batches(evaluations: Sequence[Evaluation]) -> str:
    counts = Counter(evaluation.batch for evaluation in evaluations)
    batches = " + ".join(f"{count} x {batch}" for batch, count in counts.items())
    shallow = sum(evaluation.shallow for evaluation in evaluations)
    return f"{len(evaluations)}, batches {batches}" + (f", {shallow} of them shallow" if shallow else "")


def _not_counted(error: Exception) -> str:
    why = shorten(f"{type(error).__name__}: {error}".splitlines()[0], width=100, placeholder=" ...")
    return f"the arithmetic could not be counted: {why}"


def summarize(loop: Loop, settings: str) -> Summary:
    """Return the summary of the loop's last run. It raises no error, but notes what it cannot tell.

    Args:
        loop: The loop.
        settings: Settings of the gate, in words.
    """
    run = loop.run
    notes = [
        f"the gate is on a {type(module).__name__} that the pipeline no longer has: apply it again"
        for module in loop.replaced_networks()
    ]
    if run is None or not any(part.record.evaluations for part in run.parts.values()):
        return Summary(settings, known=tuple(notes))
    counters: list[_Counter] = []
    try:
        for network in loop.networks:
            part = run.parts.get(network.layers)
            if part is not None:
                deepcache = loop.deepcache if network in loop.denoisers else None
                counter = _network_cost(network.module, part, deepcache, notes)
                counters.append(_Counter(counter, tuple(part.record.evaluations), tuple(part.record.given)))
    except Exception as error:  # a network may fail to be copied for any reason
        counters.clear()
        notes.append(_not_counted(error))
    begun = any(part.calls for part in run.parts.values())
    if run.position + begun < run.clock.num_evaluations:  # the run is not over, or it failed or was cancelled
        notes.append(f"{run.step} of {run.clock.num_steps} steps are done")
    return Summary(
        settings,
        schedule=Schedule(run.config, run.clock.num_steps, guidance=run.dropped_guidance, closes_at=run.closes_at),
        evaluations=sum((_evaluations(run, network) for network in loop.denoisers), ()),
        side_evaluations=tuple(_evaluations(run, network) for network in loop.side_networks),
        cache_bytes=sum(part.peak_cache_bytes for part in run.parts.values()),
        changes=tuple(map(fmean, loop.changes)),
        counters=tuple(counters),
        known=tuple(notes),
    )


def _evaluations(run: PipelineRun, network: Any) -> tuple[Evaluation, ...]:
    part = run.parts.get(network.layers)
    return () if part is None else tuple(part.record.evaluations)


def _network_cost(module: Any, part: Part, deepcache: Any, notes: list[str]) -> NetworkCost:
    """Return the counter of a network's cost, and add notes on what it counts differently from the run."""
    processors = part.processors
    model = meta_copy(module, processors)
    pairs = {(_name(processors.get(name)), _name(layer.processor)) for name, layer in attention_layers(model).items()}
    notes.extend(f"layers with {was} are counted as {is_now}" for was, is_now in sorted(pairs) if was != is_now)
    if any(_has_silent_adapter(processor) for processor in processors.values()):
        notes.append("the scale of an IP-Adapter is 0 now: the whole run is counted without it")
    return NetworkCost(model, part.record.inputs, deepcache)


def _name(processor: Any) -> str:
    return processor if isinstance(processor, str) else type(processor).__name__


def _has_silent_adapter(processor: Any) -> bool:
    scales = getattr(processor, "scale", None)
    return isinstance(scales, list) and 0 in scales
