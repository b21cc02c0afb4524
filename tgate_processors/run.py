"""A run: one denoising loop from its first evaluation to its end, with everything that is kept for it."""

from tgate_processors._clock import StepClock
from tgate_processors._gated_layers import GatedLayers
from tgate_processors._part import Part
from tgate_processors._run_state import RunState
from tgate_processors.schedule import LEAST_STEPS_FOR_AUTO, TGateConfig


class Run(RunState):
    """State of one denoising loop. Each loop has a run of its own, which is never reset.

    Attributes:
        config: The gate's settings.
        is_over: Whether the loop has ended. Nothing is stored then.
        parts: What the run keeps of each network that was evaluated.
    """

    def __init__(self, config: TGateConfig, clock: StepClock) -> None:
        super().__init__(config, clock)
        self.parts: dict[GatedLayers, Part] = {}

    @classmethod
    def of_nothing(cls, config: TGateConfig) -> "Run":
        """Return an empty run that is over, for a gate that has had no run."""
        run = Run(config, StepClock(LEAST_STEPS_FOR_AUTO))
        run.is_over = True
        return run

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}): {self.progress}"

    @property
    def cache_bytes(self) -> int:
        """Number of bytes of attention output that the run keeps now."""
        return sum(part.cache_bytes for part in self.parts.values())

    @property
    def dropped_guidance(self) -> bool:
        """Whether guidance was dropped in any evaluation, or was about to be."""
        return any(part.record.dropped_guidance for part in self.parts.values())

    def move_to(self, position: int) -> None:
        """Go to the loop's evaluation number `position`, 0-based. Past the last one the run is over."""
        if position == self.position or self.is_over:
            return
        step = self.step
        self.position = position
        over = position >= self.clock.num_evaluations
        if over or self.step != step:
            self._check_convergence()
        for part in self.parts.values():
            part.begin_position()
        if over:
            self.stop()

    def stop(self) -> None:
        """End the run, and free everything that it has stored."""
        super().stop()
        for part in self.parts.values():
            part.free()

    def _check_convergence(self) -> None:
        """Close the gate after the step that begins now if cross-attention has converged.

        A part with watched layers waits for the device.
        """
        converged = [part.has_converged() for part in self.parts.values()]
        if any(converged):
            self.close_at(self.step + 1)  # the step that begins now stores
            for part in self.parts.values():
                part.end_watching()
