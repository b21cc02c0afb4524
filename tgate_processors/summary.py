"""What a gated run did, as a record that prints."""

from dataclasses import dataclass
from itertools import groupby

from tgate_processors.cost import Cost, Evaluation
from tgate_processors.schedule import Phase, Schedule


@dataclass(frozen=True)
class Summary:
    """What a gated run did.

    Args:
        schedule: The modes of its steps.
        evaluations: The calls of the denoiser, in order.
        cost: Their arithmetic and their calls of attention layers.
        stock_macs: Multiply-accumulates of as many evaluations of the stock pipeline.
        cache_bytes: Bytes of attention output kept at the peak.
    """

    schedule: Schedule
    evaluations: tuple[Evaluation, ...]
    cost: Cost
    stock_macs: int
    cache_bytes: int

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
        batches = " + ".join(f"{len(list(run))} x {batch}" for batch, run in groupby(self.batches))
        shallow = sum(evaluation.shallow for evaluation in self.evaluations)
        return "\n".join(
            [
                f"steps             {len(self.schedule)}, gate {closed}",
                f"evaluations       {len(self.evaluations)}, batches {batches}"
                + (f", {shallow} of them shallow" if shallow else ""),
                f"cross-attention   {cost.cross_computed} calls computed, {cost.cross_reused} reused",
                f"self-attention    {cost.self_computed} calls computed, {cost.self_reused} reused",
                f"cache at peak     {self.cache_bytes / 2**20:.2f} MiB",
                f"arithmetic        {cost.macs / 1e9:.3f} of {self.stock_macs / 1e9:.3f} GMACs, "
                f"{self.macs_saved:.1%} saved",
            ]
        )
