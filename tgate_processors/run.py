"""A run: one denoising loop from its first evaluation to its end, with everything that is kept for it."""

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
    """Another method's cache of a network, such as DeepCache's, which has to fit the gate."""

    def before(self, batch: int, mode: StepMode, call: int) -> None:
        """Clear what does not fit the next evaluation.

        Args:
            batch: Size of the evaluation's batch.
            mode: Mode of the evaluation.
            call: Number of the call for its timestep.
        """

    def left_out(self) -> None:
        """Note that a call was left out."""

    def was_shallow(self) -> bool:
        """Return whether the last evaluation skipped layers."""

    def forget(self, *, ended: bool) -> None:
        """Clear what does not fit another run, because this run is over.

        Args:
            ended: Whether the run reached its last evaluation.
        """


class Run:
    """State of one denoising loop. Each loop has a run of its own, which is never reset.

    Attributes:
        config: The gate's settings.
        clock: Conversion of the loop's evaluations to steps.
        position: Number of evaluations of the loop that are done.
        is_over: Whether the loop has ended. Nothing is stored then.
        closes_at: First step after the gate, if the run has decided it itself; else None.
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
        self.schedule()  # raise now if the run is too short

    @classmethod
    def of_nothing(cls, config: TGateConfig) -> "Run":
        """Return an empty run that is over, for a gate that has had no run."""
        run = Run(config, StepClock(LEAST_STEPS_FOR_AUTO))
        run.is_over = True
        return run

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}): {self.progress}"

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

    @property
    def cache_bytes(self) -> int:
        """Number of bytes of attention output that the run keeps now."""
        return sum(part.cache_bytes for part in self.parts.values())

    @property
    def dropped_guidance(self) -> bool:
        """Whether guidance was dropped in any evaluation, or was about to be."""
        return any(part.record.dropped_guidance for part in self.parts.values())

    def schedule(self, guidance: bool = True) -> Schedule:
        """Return the modes of the run's steps, for evaluations with or without guidance."""
        if guidance not in self._schedules:
            self._schedules[guidance] = Schedule(
                self.config, self.clock.num_steps, guidance=guidance, closes_at=self.closes_at
            )
        return self._schedules[guidance]

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
        self.is_over = True
        for part in self.parts.values():
            part.free()

    def _check_convergence(self) -> None:
        """Close the gate after the step that begins now if cross-attention has converged.

        A part with watched layers waits for the device.
        """
        converged = [part.has_converged() for part in self.parts.values()]
        if any(converged):
            self.closes_at = self.step + 1  # the step that begins now stores
            self._schedules.clear()
            for part in self.parts.values():
                part.end_watching()


class Call:
    """One call of a network: what was decided before its evaluation, for use after it.

    Args:
        number: Number of the call for its timestep, from 0.
        batch: Size of the batch that the caller gave.

    Attributes:
        inputs: Inputs that the network computes.
        given: Index of the caller's inputs in the record's `inputs`.
        answer: Answer to the caller if the call is left out; else None.
        has_halves: Whether the batch has two halves; None if this is not known yet.
        mode: Mode of the attention layers.
        folded: Whether the network computes one half of the batch.
        batch: Size of the batch that the network computes.
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
    """What a run keeps of one network: stored outputs, kept guidance, and the record.

    Args:
        run: The run.
        layers: Gated layers of the network.
        strategy: Strategy of guidance for the network, made for this run.
        watched: Names of the cross-attention layers that are watched for convergence, if any.
        decides: Whether the gate closes when the watched layers have converged.
        is_denoiser: Whether the network is a denoiser, whose output has a row for each input row. A ControlNet of
            videos has other outputs.
        other_cache: Another method's cache of the network, if any.
        processors: Processors of the attention layers in this run, without the gate.
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
        self.calls = 0  # number of calls for the current timestep
        self.most_calls = 0
        self.peak_cache_bytes = 0
        self.watch = Watch(run.clock.num_steps)
        self._watched = watched
        self._decides = decides
        self._is_denoiser = is_denoiser
        self._seen: dict[str, Tensor] = {}  # last outputs of the watched layers
        self._other_cache = other_cache
        self._store = Store()
        self.closes_late = False
        self._answer: Any = None  # output of the timestep's first call, for the calls that are left out

    @property
    def cache_bytes(self) -> int:
        """Number of bytes of attention output that the part keeps now."""
        return sum({id(tensor): tensor.nbytes for tensor in (*self._store.tensors, *self._seen.values())}.values())

    @property
    def saved(self) -> bool:
        """Whether any attention was reused, or any branch left out."""
        record = self.record
        return bool(record.left_out) or any(
            evaluation.batch < record.batch_of(evaluation.given)
            or self.layers.number_in(AttentionMode.REUSE, evaluation.mode) > len(evaluation.missed)
            for evaluation in record.evaluations
        )

    def before(self, inputs: Inputs, does_guidance: Callable[[], bool | None]) -> Call:
        """Begin a call: decide which inputs the network computes, or what answers the call in its place.

        Args:
            inputs: Inputs that the caller gave.
            does_guidance: Returns whether the pipeline does guidance now, or None if it does not say.
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
        """Decide the mode of the attention layers in a call, and make the stored outputs fit it."""
        run = self.run
        if call.number == 0:
            # A network that was not evaluated in the step that closes the gate stores in its own first step.
            self.closes_late = run.closed and bool(self.layers.cross_attention) and not self._store.has_cross_attention
        schedule = run.schedule(bool(call.has_halves))
        call.mode = schedule[schedule.gate_step - 1 if self.closes_late else run.step]
        if run.step < schedule.guidance_start and self.strategy.leaves_out(1):
            call.mode = StepMode.UNGUIDED  # each branch is a call of its own, so `has_halves` was False
        if call.mode.phase.has_one_branch:
            call.folded = bool(call.has_halves)
            call.batch //= 1 + call.folded
        if call.mode.phase is Phase.FIDELITY:
            self._store.fit(call.number, call.batch, self.strategy, is_folded=call.folded)
        self._store.drop(call.number, call.mode, keeps_skipped=self._other_cache is not None)

    def settings(self, call: Call) -> dict[str, Any]:
        """Return the arguments of `GatedLayers.begin` for a call."""
        return {
            "mode": call.mode,
            "stored": self._store.offer(call.number, call.mode),
            "keeps_first_half": self.strategy.keeps_first_half,
            "offloads": self.run.config.offload_cache,
            "watched": self._watched,
        }

    def after(self, call: Call, taken: Taken, output: Any) -> Any:
        """End an evaluation, and return what the caller gets.

        Args:
            call: The call, from `before`.
            taken: Outputs that were taken out of the layers.
            output: Output of the network.

        Raises:
            StateError: The output of a denoiser has another number of rows than its input.
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
        """Return the output for the whole batch, and note the guidance in it if both branches were computed.

        Args:
            call: The call, from `before`.
            output: Output of the network for what it computed.
            channels: Number of channels in the network's sample, if known.
        """
        if call.folded:
            return self.strategy.unfold(output, self.run.step)
        if not call.mode.phase.has_one_branch and (call.has_halves is not False or self.strategy.leaves_out(1)):
            self.strategy.note(call.number, output, self.run.step, channels)
        return output

    def keep(self, call: Call, taken: Taken) -> None:
        """Keep the outputs that the layers have stored, and those of watched layers."""
        if self.run.is_over or not taken.new:
            return
        if call.mode.cross_attention is AttentionMode.COMPUTE and not call.mode.phase.has_one_branch:
            self._seen |= {name: own(new[-1][1]) for name, new in taken.new.items() if name in self._watched}
        self._store.keep(call.number, call.mode, call.batch, taken)
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes)

    def begin_position(self) -> None:
        """Begin the calls for the next timestep."""
        self.calls = 0
        self._answer = None

    def has_converged(self) -> bool:
        """Compare the outputs of the watched layers with those of the step before.

        Returns:
            Whether they have converged, so that the gate closes.
        """
        if not self._seen:
            return False
        rows = next(iter(self._seen.values())).shape[0]  # without a pipeline there is no record
        batch = self.record.evaluations[-1].batch if self.record.evaluations else rows
        self.watch.compare([self._seen.get(name) for name in self._watched], batch)
        config, num_steps = self.run.config, self.run.clock.num_steps
        return self._decides and has_converged(self.watch.changes, num_steps, config.tolerance)

    def end_watching(self) -> None:
        """Stop watching layers."""
        self._watched = ()
        self._seen.clear()
        self.watch.before.clear()

    def free(self) -> None:
        """Free everything that is kept for later evaluations. The kept guidance goes with its strategy."""
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
            f"`pipe` must have a denoiser that returns one row for each input row, got {rows} for {call.batch}: "
            "something on it, such as a cache, returns its output for another batch. Disable it, or run without "
            "T-GATE."
        )
