"""How far a denoising loop is: its step, its phase, and the modes of its steps."""

from tgate_processors._clock import StepClock
from tgate_processors._modes import Phase
from tgate_processors.schedule import Schedule, TGateConfig


class RunState:
    """How far a denoising loop is.

    Attributes:
        config: The gate's settings.
        clock: Conversion of the loop's evaluations to steps.
        position: Number of evaluations of the loop that are done.
        is_over: Whether the loop has ended.
        closes_at: First step after the gate, if the run has decided it itself; else None.
    """

    def __init__(self, config: TGateConfig, clock: StepClock) -> None:
        self.config = config
        self.clock = clock
        self.position = 0
        self.is_over = False
        self.closes_at: int | None = None
        self._schedules: dict[bool, Schedule] = {}
        self.schedule()  # raise now if the run is too short

    @property
    def progress(self) -> str:
        """How far the run is, in words."""
        if self.is_over:
            return f"over, {self.clock.num_steps} steps"
        return f"step {self.step} of {self.clock.num_steps}, {self.schedule()[self.step].phase.value}"

    @property
    def step(self) -> int:
        """Current step, 0-based."""
        return self.clock.step(min(self.position, self.clock.num_evaluations - 1))

    @property
    def closed(self) -> bool:
        """Whether the run is in its fidelity-improving phase."""
        return not self.is_over and self.schedule()[self.step].phase is Phase.FIDELITY

    @property
    def gate_step(self) -> int:
        """First step after the gate, as far as it is known. It is past the last step if the gate does not close."""
        return self.schedule().gate_step

    def schedule(self, guidance: bool = True) -> Schedule:
        """Return the modes of the run's steps, for evaluations with or without guidance."""
        if guidance not in self._schedules:
            self._schedules[guidance] = Schedule(
                self.config, self.clock.num_steps, guidance=guidance, closes_at=self.closes_at
            )
        return self._schedules[guidance]

    def stop(self) -> None:
        """End the run."""
        self.is_over = True

    def close_at(self, step: int) -> None:
        """Let `step` be the first one after the gate."""
        self.closes_at = step
        self._schedules.clear()
