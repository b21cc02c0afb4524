"""What a gated run did, as a record that prints."""

from dataclasses import dataclass
from itertools import groupby

from tgate_processors.cost import Evaluation, RunMacs
from tgate_processors.schedule import AttentionMode, Phase, Schedule


@dataclass(frozen=True)
class Summary:
    """What a gated run did.

    Args:
        schedule: The modes of its steps.
        evaluations: The calls of the denoiser, in order.
        cross_layers: Cross-attention layers of the denoiser.
        self_layers: Self-attention layers of the denoiser.
        cache_bytes: Bytes of attention output kept at the peak.
        macs: The run's multiply-accumulates.
    """

    schedule: Schedule
    evaluations: tuple[Evaluation, ...]
    cross_layers: int
    self_layers: int
    cache_bytes: int
    macs: RunMacs

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
    def cross_attention_computed(self) -> int:
        """Calls of cross-attention layers that computed; the rest of `evaluations * cross_layers` reused."""
        computed = [e.mode.cross_attention is not AttentionMode.REUSE for e in self.evaluations]
        return self.cross_layers * sum(computed)

    @property
    def self_attention_computed(self) -> int:
        """Calls of self-attention layers that computed; the rest of `evaluations * self_layers` reused."""
        computed = [e.mode.self_attention is not AttentionMode.REUSE for e in self.evaluations]
        return self.self_layers * sum(computed)

    def __str__(self) -> str:
        calls = len(self.evaluations)
        closed = "never closed" if self.gate_closed_at is None else f"closed before step {self.gate_closed_at}"
        batches = " + ".join(f"{len(list(run))} x {batch}" for batch, run in groupby(self.batches))
        return "\n".join(
            [
                f"steps             {len(self.schedule)}, gate {closed}",
                f"evaluations       {calls}, batches {batches}",
                f"cross-attention   {_calls(self.cross_attention_computed, calls * self.cross_layers)}",
                f"self-attention    {_calls(self.self_attention_computed, calls * self.self_layers)}",
                f"cache at peak     {self.cache_bytes / 2**20:.2f} MiB",
                f"arithmetic        {self.macs.gated / 1e9:.3f} of {self.macs.stock / 1e9:.3f} GMACs, "
                f"{self.macs.saved:.1%} saved",
            ]
        )


def _calls(computed: int, total: int) -> str:
    return f"{computed} calls computed, {total - computed} reused"
