"""What a gated run did, as a record that prints."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from tgate_processors.cost import Cost, Evaluation, evaluation_costs, meta_copy, total
from tgate_processors.guidance import sample_of
from tgate_processors.network import GatedNetwork
from tgate_processors.schedule import LEAST_CHANGES_FOR_AUTO, Phase, Schedule, StepMode, TGateConfig


@dataclass(frozen=True)
class Summary:
    """What a gated run did.

    Args:
        schedule: The modes of its steps.
        evaluations: The calls of the denoiser that were computed, in order.
        side_evaluations: The calls of each ControlNet.
        cost: The arithmetic and the calls of attention layers of all of these.
        stock_macs: Multiply-accumulates of the stock pipeline's calls.
        cache_bytes: Bytes of attention output kept at the peak.
        changes: Where the run decided itself: of cross-attention in the steps from 1 on, by which it decided.
    """

    schedule: Schedule
    evaluations: tuple[Evaluation, ...]
    side_evaluations: tuple[tuple[Evaluation, ...], ...]
    cost: Cost
    stock_macs: int
    cache_bytes: int
    changes: tuple[float, ...] = ()

    @property
    def gate_closed_at(self) -> int | None:
        """The first step, 0-based, of the fidelity-improving phase; None where the gate never closed."""
        phases = [mode.phase for mode in self.schedule.modes]
        return phases.index(Phase.FIDELITY) if Phase.FIDELITY in phases else None

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch of every evaluation of the denoiser."""
        return tuple(evaluation.batch for evaluation in self.evaluations)

    @property
    def macs_saved(self) -> float:
        """The part of the stock pipeline's arithmetic that was not done, 0 to 1."""
        return 1 - self.cost.macs / self.stock_macs

    def __str__(self) -> str:
        cost = self.cost
        closed = "never closed" if self.gate_closed_at is None else f"closed before step {self.gate_closed_at}"
        return "\n".join(
            [
                f"steps             {len(self.schedule)}, gate {closed}",
                *self._reason(),
                f"evaluations       {_batches(self.evaluations)}",
                *(f"  of a ControlNet {_batches(evaluations)}" for evaluations in self.side_evaluations),
                f"cross-attention   {cost.cross_computed} calls computed, {cost.cross_reused} reused",
                f"self-attention    {cost.self_computed} calls computed, {cost.self_reused} reused",
                f"cache at peak     {self.cache_bytes / 2**20:.2f} MiB",
                f"arithmetic        {cost.macs / 1e9:.3f} of {self.stock_macs / 1e9:.3f} GMACs, "
                f"{self.macs_saved:.1%} saved",
            ]
        )

    def _reason(self) -> list[str]:
        if not self.changes:
            return []
        last = ", ".join(f"{change:.3f}" for change in self.changes[-LEAST_CHANGES_FOR_AUTO:])
        word = "not all under" if self.gate_closed_at is None else "under"
        return [f"  of itself       cross-attention changed by {last}: {word} {self.schedule.config.tolerance:g}"]


def _batches(evaluations: Sequence[Evaluation]) -> str:
    counts = Counter(evaluation.batch for evaluation in evaluations)
    batches = " + ".join(f"{count} x {batch}" for batch, count in counts.items())
    shallow = sum(evaluation.shallow for evaluation in evaluations)
    return f"{len(evaluations)}, batches {batches}" + (f", {shallow} of them shallow" if shallow else "")


def summarize(
    config: TGateConfig, num_steps: int, denoisers: Sequence[GatedNetwork], side_networks: Sequence[GatedNetwork]
) -> Summary:
    """The record of a run that these networks were evaluated in."""
    counted = [(network, *_counted(network, config)) for network in (*denoisers, *side_networks) if network.inputs]
    gate = denoisers[0].gate
    guided = any(network.guided or network.num_calls > len(network.evaluations) for network in denoisers)
    return Summary(
        schedule=Schedule(config, num_steps, guidance=guided, closes_at=gate.closes_at),
        evaluations=tuple(evaluation for denoiser in denoisers for evaluation in denoiser.evaluations),
        side_evaluations=tuple(tuple(network.evaluations) for network in side_networks),
        cost=sum((cost for _, cost, _ in counted), Cost()),
        stock_macs=sum(stock for _, _, stock in counted),
        changes=tuple(map(fmean, gate.watch.changes)),
        cache_bytes=sum(network.gate.peak_cache_bytes for network, _, _ in counted),
    )


def _counted(network: GatedNetwork, config: TGateConfig) -> tuple[Cost, int]:
    """What a network's evaluations cost, and the multiply-accumulates of the stock pipeline's."""
    assert network.inputs is not None
    stock = Evaluation(StepMode.PLANNING, sample_of(network.inputs).shape[0])
    done = network.evaluations
    costs, _ = evaluation_costs(meta_copy(network.module), config, network.inputs, [stock, *done], network.deepcache)
    return total(costs, done), costs[stock].macs * network.num_calls
