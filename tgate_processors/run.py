"""A run: one denoising loop from its first evaluation to its end, and all that is kept for it."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from tgate_processors._clock import StepClock
from tgate_processors._folding import Inputs, batch_of, rows_of, sample_of
from tgate_processors._gated_layers import GatedLayers, Taken
from tgate_processors._guidance import Whole
from tgate_processors._modes import AttentionMode, Phase, StepMode
from tgate_processors._record import Evaluation, Record
from tgate_processors._store import Store, own
from tgate_processors._watch import Watch, has_converged
from tgate_processors.errors import StateError
from tgate_processors.schedule import LEAST_STEPS_FOR_AUTO, Schedule, TGateConfig


class OtherCache(Protocol):
    """Another method that keeps something of a network from one evaluation to the next, and must know of the gate."""

    def before(self, batch: int, mode: StepMode, call: int) -> None:
        """Forget what does not fit an evaluation of this batch in this mode, call number `call` for its timestep."""

    def left_out(self) -> None:
        """Take note that a call was left out."""

    def was_shallow(self) -> bool:
        """Whether the last evaluation left layers out."""

    def forget(self, *, ended: bool) -> None:
        """Forget what does not fit another run: this one is over, at its last evaluation (`ended`) or before it."""


class Run:
    """One denoising loop. It is made when the loop begins and let go when it ends, and never reset.

    Attributes:
        config: The gate's settings.
        clock: The loop's length, and which step an evaluation is in.
        position: How many evaluations of the loop are behind it.
        is_over: Whether the loop has ended. Nothing is stored then.
        closes_at: The first step after the gate, where the run has decided it itself.
        parts: What the run keeps of each network that was evaluated.
    """

    def __init__(self, config: TGateConfig, clock: StepClock) -> None:
        self.config = config
        self.clock = clock
        self.position = 0
        self.is_over = False
        self.closes_at: int | None = None
        self.parts: dict[GatedLayers, Part] = {}
        self._schedules: dict[bool, Schedule] = {}
        self.schedule()  # says now if the run is too short

    @classmethod
    def of_nothing(cls, config: TGateConfig) -> "Run":
        """What stands for a run where there was none: over, with nothing in it."""
        run = Run(config, StepClock(LEAST_STEPS_FOR_AUTO))
        run.is_over = True
        return run

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}): {self.progress}"

    @property
    def progress(self) -> str:
        """How far it is, in words."""
        if self.is_over:
            return f"over, {self.clock.num_steps} steps"
        return f"step {self.step} of {self.clock.num_steps}, {self.schedule()[self.step].phase.value}"

    @property
    def step(self) -> int:
        """The step that it is in, 0-based."""
        return self.clock.step(min(self.position, self.clock.num_evaluations - 1))

    @property
    def closed(self) -> bool:
        """Whether it is in its fidelity-improving phase."""
        return not self.is_over and self.schedule()[self.step].phase is Phase.FIDELITY

    @property
    def gate_step(self) -> int:
        """The first step after the gate, as far as it is known; past the run's end where it does not close."""
        return self.schedule().gate_step

    @property
    def cache_bytes(self) -> int:
        """Bytes of attention output kept now."""
        return sum(part.cache_bytes for part in self.parts.values())

    @property
    def dropped_guidance(self) -> bool:
        """Whether anything of guidance was left out, or was about to be."""
        return any(part.record.dropped_guidance for part in self.parts.values())

    def schedule(self, guidance: bool = True) -> Schedule:
        """The modes of its steps, for evaluations with guidance or without."""
        if guidance not in self._schedules:
            self._schedules[guidance] = Schedule(
                self.config, self.clock.num_steps, guidance=guidance, closes_at=self.closes_at
            )
        return self._schedules[guidance]

    def move_to(self, position: int) -> None:
        """Go to the loop's evaluation number `position`, 0-based; past the last one the run is over."""
        if position == self.position or self.is_over:
            return
        step = self.step
        self.position = position
        over = position >= self.clock.num_evaluations
        if over or self.step != step:
            self._look()
        for part in self.parts.values():
            part.begin_position()
        if over:
            self.stop()

    def stop(self) -> None:
        """End the run: all that it has stored is let go."""
        self.is_over = True
        for part in self.parts.values():
            part.let_go()

    def _look(self) -> None:
        """See whether cross-attention has converged, at the end of a step. Waits for the device where it does."""
        converged = [part.has_converged() for part in self.parts.values()]
        if any(converged):
            self.closes_at = self.step + 1  # the step that begins stores
            self._schedules.clear()
            for part in self.parts.values():
                part.end_watching()


class Call:
    """One evaluation of a network, from before it to after it.

    Args:
        number: Which call for its timestep it is.
        batch: The batch that it was given.

    Attributes:
        inputs: What the network is called with.
        given: Which of the record's inputs it was given.
        answer: What the caller gets where the call is left out; None where it is not.
        has_halves: Whether its batch is two halves; None where nobody can say yet.
        mode: What attention does.
        folded: Whether one half of what was given is computed.
        batch: The batch that is computed.
    """

    def __init__(self, number: int, batch: int) -> None:
        self.number = number
        self.batch = batch
        self.inputs: Inputs = ((), {})
        self.given = 0
        self.answer: Any = None
        self.has_halves: bool | None = False
        self.mode = StepMode.PLANNING
        self.folded = False


class Part:
    """What a run keeps of one network: stored outputs, kept guidance, the record.

    Args:
        run: The run.
        layers: The gated layers of the network.
        strategy: How guidance is done there, made for this run.
        watched: Cross-attention layers whose convergence closes the gate; none where others decide.
        decides: Whether the gate closes when they have converged.
        is_denoiser: Whether it answers with a row for each that it is given, as a ControlNet of videos does not.
        other_cache: What else keeps something of this network between evaluations.
        processors: The processors of its attention layers in this run, without the gate.
    """

    def __init__(
        self,
        run: Run,
        layers: GatedLayers,
        strategy: Whole,
        *,
        watched: tuple[str, ...] = (),
        decides: bool = True,
        is_denoiser: bool = True,
        other_cache: OtherCache | None = None,
        processors: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = run
        self.layers = layers
        self.strategy = strategy
        self.record = Record()
        self.processors: Mapping[str, Any] = processors or {}
        self.calls = 0  # for the timestep at hand
        self.most_calls = 0
        self.peak_cache_bytes = 0
        self.watch = Watch(run.clock.num_steps)
        self._watched = watched
        self._decides = decides
        self._is_denoiser = is_denoiser
        self._seen: dict[str, Tensor] = {}  # what the watched layers put out last
        self._other_cache = other_cache
        self._store = Store()
        self.closes_late = False
        self._answer: Any = None  # of a timestep's first call, for those that are left out

    @property
    def cache_bytes(self) -> int:
        """Bytes of attention output kept now."""
        return sum({id(tensor): tensor.nbytes for tensor in (*self._store.tensors, *self._seen.values())}.values())

    @property
    def saved(self) -> bool:
        """Whether anything was reused or left out."""
        record = self.record
        return bool(record.left_out) or any(
            evaluation.batch < record.batch_of(evaluation.given)
            or self.layers.number_in(AttentionMode.REUSE, evaluation.mode) > len(evaluation.missed)
            for evaluation in record.evaluations
        )

    def before(self, inputs: Inputs, does_guidance: Callable[[], bool | None]) -> Call:
        """Begin an evaluation: what it is called with, or what is answered for it.

        Args:
            inputs: What the network is called with.
            does_guidance: Says whether the pipeline does guidance now, or None.
        """
        run = self.run
        call = Call(self.calls, batch_of(inputs))
        call.given = self.record.note_given(inputs)
        self.calls += 1
        self.most_calls = max(self.most_calls, self.calls)
        if call.number and self._answer is not None and self.strategy.leaves_out(call.number):
            call.answer = self.strategy.answer(call.number, self._answer, run.step)
            self.record.left_out.append(call.given)
            if self._other_cache is not None:
                self._other_cache.left_out()
            return call
        if run.schedule().depends_on_guidance(run.step):
            call.has_halves = self.strategy.has_halves(
                inputs, does_guidance(), step=run.step, call=call.number, most_calls=self.most_calls
            )
        self.plan(call)
        call.inputs = self.strategy.fold(inputs, call.mode.phase) if call.folded else inputs
        if self._other_cache is not None:
            self._other_cache.before(call.batch, call.mode, call.number)
        return call

    def plan(self, call: Call) -> None:
        """Decide what attention does in a call, and make what is stored fit it."""
        run = self.run
        if call.number == 0:
            # A network that was not evaluated in the step that closes the gate closes in the first that it is.
            self.closes_late = run.closed and bool(self.layers.cross_attention) and not self._store.has_cross_attention
        schedule = run.schedule(bool(call.has_halves))
        call.mode = schedule[schedule.gate_step - 1 if self.closes_late else run.step]
        if run.step < schedule.guidance_start and self.strategy.leaves_out(1):
            call.mode = StepMode.UNGUIDED  # its branches are calls, so that no batch has halves
        if call.mode.phase.has_one_branch:
            call.folded = bool(call.has_halves)
            call.batch //= 1 + call.folded
        if call.mode.phase is Phase.FIDELITY:
            self._store.fit(call.number, call.batch, self.strategy, is_folded=call.folded)
        self._store.drop(call.number, call.mode, keeps_skipped=self._other_cache is not None)

    def settings(self, call: Call) -> dict[str, Any]:
        """What `GatedLayers.put_in` is called with for a call."""
        return {
            "mode": call.mode,
            "stored": self._store.offer(call.number, call.mode),
            "keeps_first_half": self.strategy.keeps_first_half,
            "offloads": self.run.config.offload_cache,
            "watched": self._watched,
        }

    def after(self, call: Call, taken: Taken, output: Any) -> Any:
        """End an evaluation: what the caller gets.

        Args:
            call: From `before`.
            taken: What was taken out of the layers.
            output: What the network put out.

        Raises:
            StateError: It has not as many rows as the network was given.
        """
        if self._is_denoiser:
            _check_rows(call, output)
        self.keep(call, taken)
        shallow = self._other_cache is not None and self._other_cache.was_shallow()
        missed = frozenset(taken.missed)
        self.record.evaluations.append(Evaluation(call.mode, call.batch, shallow, call.given, missed))
        if call.mode.phase.has_one_branch and self.strategy.leaves_out(call.number + 1):
            self._answer = output
        sample = sample_of(call.inputs)
        channels = sample.shape[1] if isinstance(sample, Tensor) and sample.ndim > 1 else None
        return self.guided_output(call, output, channels)

    def guided_output(self, call: Call, output: Any, channels: int | None = None) -> Any:
        """The output of all that was given, of what was computed; its guidance is noted where all was.

        Args:
            call: From `before`.
            output: What the network put out.
            channels: Number of channels in its sample, if known.
        """
        if call.folded:
            return self.strategy.unfold(output, self.run.step)
        if not call.mode.phase.has_one_branch and (call.has_halves is not False or self.strategy.leaves_out(1)):
            self.strategy.note(call.number, output, self.run.step, channels)
        return output

    def keep(self, call: Call, taken: Taken) -> None:
        """Keep what the layers have stored, or were watched to put out."""
        if self.run.is_over or not taken.new:
            return
        if call.mode.cross_attention is AttentionMode.COMPUTE and not call.mode.phase.has_one_branch:
            self._seen |= {name: own(new[-1][1]) for name, new in taken.new.items() if name in self._watched}
        self._store.keep(call.number, call.mode, call.batch, taken)
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes)

    def begin_position(self) -> None:
        """Begin the calls for another timestep."""
        self.calls = 0
        self._answer = None

    def has_converged(self) -> bool:
        """Compare what the watched layers put out in a step with the step before; whether the gate shall close."""
        if not self._seen:
            return False
        rows = next(iter(self._seen.values())).shape[0]  # in a loop of one's own there is no record
        batch = self.record.evaluations[-1].batch if self.record.evaluations else rows
        self.watch.look([self._seen.get(name) for name in self._watched], batch)
        config, num_steps = self.run.config, self.run.clock.num_steps
        return self._decides and has_converged(self.watch.changes, num_steps, config.tolerance)

    def end_watching(self) -> None:
        """Watch no layer any more."""
        self._watched = ()
        self._seen.clear()
        self.watch.before.clear()

    def let_go(self) -> None:
        """Let all go that is kept for later evaluations, guidance with its strategy."""
        self.end_watching()
        self._store.clear()
        self._answer = None
        self.strategy = Whole()
        if self._other_cache is not None:
            self._other_cache.forget(ended=self.run.position >= self.run.clock.num_evaluations - 1)


def _check_rows(call: Call, output: Any) -> None:
    rows = rows_of(output, call.inputs)
    if rows != call.batch:
        raise StateError(
            f"`pipe` must have a denoiser that answers with a row for each that it is given, got {rows} for "
            f"{call.batch}: something on it keeps what it put out for another batch. Disable that, a cache for "
            "example, or run without T-GATE."
        )
