"""A pipeline's denoising loop. It finds out which calls of a network belong to its run, and in which step each is.

The place of a call's timestep in the memory of `scheduler.timesteps` tells both, without waiting for the device. Some
pipelines convert the timestep before it reaches the network, and more do so in half precision. There the loop's own
variable `t` or `timestep` tells them; failing that, the callback or the count of evaluations.
"""

import threading
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from tgate_processors import _pipelines as pipelines
from tgate_processors._advice import Advice, advice_after_run
from tgate_processors._caches import caches_of, check_drops_no_guidance
from tgate_processors._callers import local_of
from tgate_processors._deepcache import DeepFeatures
from tgate_processors._families import Guidance
from tgate_processors._guidance import Calls, Halves, Lists, Whole
from tgate_processors._layers import cross_attention_layers
from tgate_processors._network import GatedNetwork
from tgate_processors._part import OtherCache, Part
from tgate_processors._watch import watched_layers
from tgate_processors.errors import StateError, UnsupportedPipelineError
from tgate_processors.run import Run
from tgate_processors.schedule import TGateConfig


LEAST_CALLS_WITHOUT_CALLBACK = 4  # a step may have several calls, so fewer without the callback are no error


class PipelineRun(Run):
    """A run of a pipeline.

    Attributes:
        timesteps: The scheduler's timesteps when the run began.
        first: Index in `timesteps` at which the run began.
        thread: Identifier of the thread that the run is in.
        is_seen: Whether the network's timesteps are views of the scheduler's, so that they tell the step.
        last_callback: Last step that the callback was called with.
    """

    def __init__(self, pipe: Any, config: TGateConfig, first: int | None) -> None:
        super().__init__(config, pipelines.step_clock(pipe, first))
        self.timesteps = pipe.scheduler.timesteps
        self.is_seen = first is not None
        self.first = first or 0
        self.thread = threading.get_ident()
        self.last_callback = -1


class Loop:
    """The denoising loop of one pipeline.

    Args:
        pipe: The pipeline.
        config: The gate's settings.
        deepcache: The `DeepCacheSDHelper` that is enabled on the denoiser, if any.
        watches_all: Whether a run watches all cross-attention throughout in order to measure it, and never closes its
            gate.

    Attributes:
        run: The current run, or the last one.
        denoisers, side_networks: The networks that the loop evaluates.
        reuses_self_attention: Whether a run may reuse self-attention.
        drops_guidance_alone: Whether the gate drops only guidance, because no denoiser has cross-attention of its own.
        deepcache: The enabled `DeepCacheSDHelper`, if any.
    """

    def __init__(self, pipe: Any, config: TGateConfig, *, deepcache: Any = None, watches_all: bool = False) -> None:
        self.pipe = pipe
        self.config = config
        self.run: PipelineRun | None = None
        # Each network once, because one module may be two components.
        self.denoisers = list({id(m): GatedNetwork.of(m) for m in pipelines.denoisers_of(pipe)}.values())
        self.side_networks = list({id(m): GatedNetwork.of(m) for m in pipelines.side_networks_of(pipe)}.values())
        self.reuses_self_attention = config.reuses_self_attention
        self.drops_guidance_alone = not any(cross_attention_layers(network.module) for network in self.denoisers)
        self._family = pipelines.family_of(pipe)
        self._is_tried = pipelines.is_listed(pipe)
        self._takes_callback = pipelines.takes_callback(pipe)
        self.deepcache = deepcache
        self._watches_all = watches_all
        self._warned: set[str] = set()  # kinds of advice that were given
        self._overtaken: dict[int, Any] = {}  # by thread: timesteps of its run that another thread's run has ended

    @property
    def networks(self) -> list[GatedNetwork]:
        """All networks that the loop evaluates."""
        return [*self.denoisers, *self.side_networks]

    @property
    def changes(self) -> list[list[float]]:
        """Changes of the denoiser's watched layers in the last run, as in `Watch`."""
        part = None if self.run is None else self.run.parts.get(self.denoisers[0].layers)
        return [] if part is None else part.watch.changes

    def replaced_networks(self) -> list[torch.nn.Module]:
        """Return the gated networks that the pipeline no longer has."""
        try:
            has = [*pipelines.denoisers_of(self.pipe), *pipelines.side_networks_of(self.pipe)]
        except UnsupportedPipelineError:  # the pipeline has no denoiser at all
            has = []
        still = {id(module) for one in has for module in (one, getattr(one, "_orig_mod", one))}
        return [network.module for network in self.networks if id(network.module) not in still]

    def _is_whole(self) -> bool:
        """Return whether the pipeline still has all networks that were gated for it, and they are still gated."""
        return all(self in network.loops for network in self.networks) and not self.replaced_networks()

    def does_guidance(self) -> bool | None:
        """Return whether the pipeline does guidance now; None if it does not say."""
        return pipelines.does_guidance(self.pipe, self._family.guidance)

    # Which calls belong to a run

    def claim(self, network: GatedNetwork, timestep: Any) -> Part | None:
        """Return the run's part for a network, if a call of the pipeline is the run's next or begins a run.

        Otherwise the call belongs to no run, and this returns None.

        Args:
            network: The network that is called.
            timestep: Timestep of the call.

        Raises:
            StateError: Another thread has begun a run meanwhile, or the callback is needed and was not passed.
        """
        run, now = self.run, self.pipe.scheduler.timesteps
        if position_in(timestep, now) is None:
            # the timestep before its conversion, in a variable of the loop with one of diffusers' two names
            variables = (local_of(self.pipe, name) for name in ("t", "timestep"))
            timestep = next((value for value in variables if value is not None), None)
        self._check_is_not_overtaken(timestep)
        if run is not None and not run.is_over:
            position = position_in(timestep, run.timesteps)
            if position is not None and self._is_next(run, network, position - run.first):
                return self._part(run, network)
        position = position_in(timestep, now)
        if run is None or run.timesteps is not now or self._belongs_to_another_run(run, position):
            run = self._begin(position)
        elif run.is_seen:
            if position != run.first:
                return None
            run = self._begin(position)
        elif not self._counts(run, network):
            return None
        return self._part(run, network)

    def _belongs_to_another_run(self, run: PipelineRun, position: int | None) -> bool:
        """Return whether a call belongs to another run than this one, if no timestep assigns the call to a run.

        That is so if this run is over, or is in another thread.
        """
        is_assigned = run.is_seen and position is not None
        return not is_assigned and (run.is_over or run.thread != threading.get_ident())

    def leaves(self, stack: Sequence[Any]) -> None:
        """Stop the run if its pipeline is no longer running in this thread, because it failed or was cancelled.

        Args:
            stack: Callers in this thread.
        """
        run = self.run
        if run is not None and not run.is_over and run.thread == threading.get_ident() and self.pipe not in stack:
            run.stop()

    def _is_next(self, run: PipelineRun, network: GatedNetwork, position: int) -> bool:
        if position == run.position:
            part = run.parts.get(network.layers)
            most = self._most_calls(run, part)
            return part is None or most is None or part.calls < most
        if position == run.position + 1 and any(part.calls for part in run.parts.values()):
            run.move_to(position)
            return True
        return False

    def _most_calls(self, run: PipelineRun, part: Part | None) -> int | None:
        """Return the largest number of calls of a network that one timestep may have; None if it is unknown."""
        if self._family.guidance is Guidance.CALLS:
            return 2 if part is None or part.closes_late or not run.closed else max(1, part.most_calls)
        return 1 if self._is_tried and self._family.guidance is not Guidance.HALVES_THEN_CALLS else None

    def _counts(self, run: PipelineRun, network: GatedNetwork) -> bool:
        """Return whether a call is the next of a run in which the callback or the count of evaluations tells the step.

        Raises:
            StateError: The callback was not passed.
        """
        part = run.parts.get(network.layers)
        most = self._most_calls(run, part)
        calls = 0 if part is None else part.calls
        if most is None:
            most = max(run.clock.num_evaluations, LEAST_CALLS_WITHOUT_CALLBACK) - 1
        if calls < most:
            return True
        if self._takes_callback and run.last_callback < 0 and network in self.denoisers:
            run.stop()
            raise StateError(
                "`callback_on_step_end` must be the handle that `apply_tgate` returned, but it was not called after "
                f"{calls} evaluations. Pass it to the pipeline: "
                "`pipe(..., callback_on_step_end=tgate)`; give a callback of your own to `apply_tgate`."
            )
        return False

    # From step to step

    def was_evaluated(self, network: GatedNetwork) -> None:
        """Note an evaluation, and move the run on if neither the timestep nor the callback does."""
        run = self.run
        if run is None or run.is_over or network not in self.denoisers:
            return
        part = run.parts[network.layers]
        # A network whose first call is in the last step gets as many calls there as the other networks had.
        most = max(one.most_calls for one in run.parts.values())
        is_known = run.position > 0 or self._most_calls(run, part) == 1
        is_last = is_known and run.position == run.clock.num_evaluations - 1 and part.calls == most
        is_ended = is_last and run.last_callback < 0  # otherwise the callback ends the run
        if is_ended or not (run.is_seen or self._takes_callback):
            self._move(run, run.position + 1)

    def _move(self, run: PipelineRun, position: int) -> None:
        """Go to an evaluation of the run. Past the last one, warn if the run saved little or nothing."""
        if not run.is_over:
            run.move_to(position)
            if run.is_over and not self._watches_all:
                advice = advice_after_run(run, self.pipe, self.changes, drops_guidance_alone=self.drops_guidance_alone)
                self._warn_of(advice)

    def end_step(self, step_index: int, timestep: Any) -> None:
        """Note the pipeline's callback after a step, and move the run on.

        Args:
            step_index: Step that the callback was called with.
            timestep: Timestep that the callback was called with.

        Raises:
            StateError: The denoiser was not evaluated in the step, or another thread has begun a run.
        """
        self._check_is_not_overtaken(timestep)
        run = self.run
        if run is not None and run.thread != threading.get_ident() and self._is_whole():
            raise self._two_at_once()
        if run is None or step_index <= run.last_callback or not self._is_of(run, timestep):
            raise StateError(
                "`callback_on_step_end` was called after a step in which the gated "
                f"{type(self.denoisers[0].module).__name__} was not evaluated. If the gate was removed, or the "
                "pipeline has another denoiser now, call `apply_tgate` again."
            )
        run.last_callback = step_index
        if self._takes_callback:
            self._move(run, step_index + 1)

    def stop(self) -> None:
        """End the current run, if any."""
        if self.run is not None:
            self.run.stop()

    def _is_of(self, run: PipelineRun, timestep: Any) -> bool:
        now = self.pipe.scheduler.timesteps
        return run.timesteps is now or position_in(timestep, now) is None

    # Runs

    def _begin(self, first: int | None) -> PipelineRun:
        last = self.run
        thread = threading.get_ident()
        self._overtaken.pop(thread, None)
        if last is not None and not last.is_over:
            last.stop()
            if last.thread != thread:
                self._overtaken[last.thread] = last.timesteps
        self._check_can_begin(first)
        run = PipelineRun(self.pipe, self.config, first)
        for network in self.networks:
            network.install(self)
        self.run = run
        return run

    def _check_can_begin(self, first: int | None) -> None:
        name = type(self.pipe).__name__
        for module in self.replaced_networks():
            raise StateError(
                f"`pipe` must have the networks that were gated, got a {name} without the gated "
                f"{type(module).__name__}. Call `remove()` on the handle, then `apply_tgate` again."
            )
        for network in self.denoisers:
            check_drops_no_guidance(network.module)
        if first is None and not self._takes_callback and not pipelines.is_known(self.pipe):
            raise UnsupportedPipelineError(
                f"`pipe` must say which step it is in, got a {name}, which calls no `callback_on_step_end` and "
                "converts its timesteps before they reach the denoiser. Run it without T-GATE."
            )

    def _warn_of(self, advice: Iterator[Advice]) -> None:
        """Warn, at most once for each kind of advice."""
        for kind, message in advice:
            if kind not in self._warned:
                self._warned.add(kind)
                warnings.warn(message, stacklevel=2)

    def _part(self, run: PipelineRun, network: GatedNetwork) -> Part:
        part = run.parts.get(network.layers)
        if part is None:
            is_denoiser = network in self.denoisers
            part = run.parts[network.layers] = Part(
                run,
                network.layers,
                self._strategy(is_denoiser),
                watched=self._watched(network) if is_denoiser else (),
                decides=not self._watches_all,
                is_denoiser=is_denoiser,
                other_cache=self._other_cache(network, is_denoiser),
                processors=network.processors,
            )
        return part

    def _other_cache(self, network: GatedNetwork, is_denoiser: bool) -> OtherCache | None:
        if self.deepcache is not None and is_denoiser:
            return DeepFeatures(self.deepcache)
        return caches_of(network.module, has_cross_attention=bool(network.layers.cross_attention))

    def _strategy(self, is_denoiser: bool) -> Whole:
        guidance = self._family.guidance
        looks = self.config.look_interval is not None
        if guidance is Guidance.CALLS:
            return Calls(looks=looks)
        if guidance is Guidance.NONE:
            return Whole()
        # if cross-attention is not stored, only the positive branch holds the prompt
        is_positive = looks or self.drops_guidance_alone
        return (Lists if guidance is Guidance.LISTS else Halves)(
            self.config.branch or ("positive" if is_positive else self._family.branch),
            positive_first=guidance in (Guidance.HALVES_POSITIVE_FIRST, Guidance.LISTS),
            looks=looks,
            is_denoiser=is_denoiser,
            is_tried=self._is_tried,
        )

    def _watched(self, network: GatedNetwork) -> tuple[str, ...]:
        names = tuple(network.layers.cross_attention)
        if self._watches_all:
            return names
        if self.config.gate_step != "auto":
            return ()
        return tuple(names[index] for index in watched_layers(len(names)))

    def _check_is_not_overtaken(self, timestep: Any) -> None:
        timesteps = self._overtaken.get(threading.get_ident())
        if timesteps is None:
            return
        now = self.pipe.scheduler.timesteps
        is_seen = position_in(timestep, timesteps) is not None
        is_new = position_in(timestep, now) is not None or self.run is None or now is not self.run.timesteps
        if is_seen or not is_new:
            del self._overtaken[threading.get_ident()]
            raise self._two_at_once()

    def _two_at_once(self) -> StateError:
        return StateError(
            f"`pipe` must not run in two threads at once, got a second run of this {type(self.pipe).__name__} while "
            "the first was going on. The two share a scheduler. Give each thread a pipeline of its own with a "
            "scheduler of its own: `type(pipe).from_pipe(pipe, scheduler=type(pipe.scheduler).from_config("
            "pipe.scheduler.config))`."
        )


def position_in(timestep: Any, timesteps: Any) -> int | None:
    """Return the index of a timestep in the scheduler's timesteps; None if it is not a view of them."""
    if not isinstance(timestep, torch.Tensor) or not isinstance(timesteps, torch.Tensor):
        return None
    if timestep.device != timesteps.device or timestep.dtype != timesteps.dtype or timesteps.ndim != 1:
        return None
    offset = timestep.data_ptr() - timesteps.data_ptr()
    position, rest = divmod(offset, timesteps.element_size() * max(1, timesteps.stride(0)))
    return position if rest == 0 and 0 <= position < len(timesteps) else None
