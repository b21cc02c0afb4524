"""Gating a pipeline: `apply_tgate` attaches the gate to its networks, and the handle takes it away again."""

import functools
import logging
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from tgate_processors import pipelines
from tgate_processors.deepcache import is_enabled
from tgate_processors.errors import ConfigError, StateError
from tgate_processors.gate import Gate
from tgate_processors.guidance import Inputs
from tgate_processors.installation import is_gated
from tgate_processors.interception import interceptors
from tgate_processors.layers import check_can_be_gated
from tgate_processors.network import GatedNetwork
from tgate_processors.pipelines import Guidance
from tgate_processors.schedule import StepClock, TGateConfig
from tgate_processors.summary import Summary, summarize


logger = logging.getLogger(__name__)
FEW_STEPS = 8  # in which cross-attention hardly converges before the run is over

StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def apply_tgate(
    pipe: Any, config: TGateConfig, *, callback_on_step_end: StepCallback | None = None, deepcache: Any = None
) -> "TGate":
    """Gate a diffusers pipeline; its own `__call__` runs as before.

        tgate = apply_tgate(pipe, TGateConfig(gate_step=10))
        image = pipe(prompt, num_inference_steps=25, callback_on_step_end=tgate).images[0]
        tgate.remove()

    Args:
        pipe: A pipeline whose `unet` or `transformer` has cross-attention layers. Its ControlNets are gated with it.
        config: When the gate closes, and what is reused.
        callback_on_step_end: A callback of your own, called after every step beside the handle's work.
        deepcache: The `DeepCacheSDHelper` that is enabled on the pipeline, where there is one.

    Returns:
        The handle: the pipeline's `callback_on_step_end`, and a context manager that removes itself.

    Raises:
        ConfigError: `config` asks for what this pipeline cannot do.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already, or shares a scheduler with a gated pipeline of the same denoiser.
    """
    if not isinstance(config, TGateConfig):
        raise ConfigError(f"`config` must be a TGateConfig, got {config!r}. Pass `TGateConfig(gate_step=10)`.")
    pipelines.check_is_not_refused(pipe)
    if config.look_interval is not None and pipelines.family_of(pipe).guidance is Guidance.CALLS:
        raise ConfigError(
            f"`look_interval` must be None for {type(pipe).__name__}, which calls its denoiser for each branch of "
            f"guidance, got {config.look_interval}. Leave it out."
        )
    for denoiser in pipelines.denoisers_of(pipe):
        check_can_be_gated(denoiser)
        _check_is_free(denoiser, pipe)
        if deepcache is None and is_enabled(denoiser):
            raise StateError(
                "`deepcache` must be the helper that is enabled on the pipeline, got None. "
                "Pass `apply_tgate(pipe, config, deepcache=helper)`, or call `helper.disable()` first."
            )
    if not pipelines.is_known(pipe):
        warnings.warn(
            f"{type(pipe).__name__} is not among the pipelines that are known to work; it is taken to batch its "
            "guidance as `[negative, positive]`. Compare its pictures with the stock pipeline's.",
            stacklevel=2,
        )
    return TGate(pipe, config, callback_on_step_end, deepcache)


def _check_is_free(denoiser: torch.nn.Module, pipe: Any) -> None:
    name = type(denoiser).__name__
    others = handles_on(denoiser)
    if any(handle.pipe is pipe for handle in others) or (is_gated(denoiser) and not others):
        raise StateError(
            f"`pipe` must not be gated already, got a gated {name}. "
            "Call `remove()` on the handle of the first `apply_tgate`, then apply again."
        )
    if any(handle.pipe.scheduler is pipe.scheduler for handle in others):
        raise StateError(
            f"`pipe.scheduler` must not be the scheduler of another gated pipeline with the same {name}: a run is "
            "known by it. Set `pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)` first."
        )


def handles_on(denoiser: torch.nn.Module) -> "list[TGate]":
    """The handles of the gated pipelines that evaluate the denoiser."""
    loops = (getattr(interceptor, "loop", None) for interceptor in interceptors(denoiser))
    return [loop for loop in loops if isinstance(loop, TGate)]


@functools.cache
def _say_that_few_steps_gain_little() -> None:
    """Once in a process."""
    logger.warning(
        "a run of %d steps or fewer gains little from T-GATE: with latent-consistency models, in 4 steps, its authors "
        "report 1.04 to 1.08 times the speed. `summary()` says what your run saves.",
        FEW_STEPS,
    )


@dataclass
class _Run:
    """One denoising loop of the pipeline, from its first evaluation on."""

    timesteps: "weakref.ref[torch.Tensor]"  # every `set_timesteps` makes a new tensor, and so a new run
    clock: StepClock
    num_evaluations: int = 0  # of the denoiser
    last_step_index: int = -1  # that the callback was called with
    is_over: bool = False


class TGate:
    """What `apply_tgate` put on a pipeline. Made by it alone.

    Attributes:
        pipe: The pipeline.
        config: The settings.
        callback_on_step_end: A callback of your own, called with the pipeline's arguments after every step.
        tensor_inputs: Empty; diffusers' `MultiPipelineCallbacks` asks for it.
    """

    tensor_inputs: ClassVar[list[str]] = []

    def __init__(
        self, pipe: Any, config: TGateConfig, callback_on_step_end: StepCallback | None, deepcache: Any
    ) -> None:
        self.pipe = pipe
        self.config = config
        self.callback_on_step_end = callback_on_step_end
        self._family = pipelines.family_of(pipe)
        self._moved_by_callback = pipelines.takes_callback(pipe)
        self._run: _Run | None = None
        self._foreign_timesteps: weakref.ref[torch.Tensor] | None = None
        self._denoisers = [
            self._network(module, a_call_a_branch=self._family.guidance is Guidance.CALLS, deepcache=deepcache)
            for module in pipelines.denoisers_of(pipe)
        ]
        side_networks = [self._network(module, is_denoiser=False) for module in pipelines.side_networks_of(pipe)]
        self._networks = [*self._denoisers, *side_networks]
        for other in handles_on(self._denoisers[0].module):  # a run of one is no run of the other
            other._ignore_present_timesteps()
            self._ignore_present_timesteps()
        try:
            for network in self._networks:
                network.attach()
        except BaseException:
            self.remove()
            raise

    def _network(self, module: torch.nn.Module, **how: Any) -> GatedNetwork:
        negative_first = self._family.guidance is not Guidance.HALVES_POSITIVE_FIRST
        branch = self.config.branch or ("positive" if self.config.look_interval else self._family.branch)
        return GatedNetwork(module, self.config, self, first_half=(branch == "negative") == negative_first, **how)

    @property
    def gate(self) -> Gate:
        """The state of the run in the denoiser; closed in the fidelity-improving phase."""
        return self._denoisers[0].gate

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __call__(self, pipe: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Move the gate on after a step; this is the pipeline's `callback_on_step_end`."""
        if pipe is not self.pipe:
            raise StateError(
                "`callback_on_step_end` must be the handle of the pipeline that runs, got that of another "
                f"{type(self.pipe).__name__}. Call `apply_tgate` for this {type(pipe).__name__} too, pass its handle."
            )
        run = self._run
        if run is None or run.timesteps() is not pipe.scheduler.timesteps or step_index <= run.last_step_index:
            raise StateError(
                "`callback_on_step_end` was called after a step in which the gated "
                f"{type(self._denoisers[0].module).__name__} was not evaluated. If the gate was removed, or the "
                "pipeline has another denoiser now, apply again."
            )
        run.last_step_index = step_index
        if self._moved_by_callback and not run.is_over:
            self._advance(run, step_index + 1)
        if self.callback_on_step_end is not None:
            callback_kwargs = self.callback_on_step_end(pipe, step_index, timestep, callback_kwargs)
        if getattr(pipe, "interrupt", False):
            self._finish()  # no step follows
        return callback_kwargs

    def remove(self) -> None:
        """Take everything away: the same processor objects are back, every call is the network's own. Safe to call
        twice.

        A processor that someone else has put in since stays, with a warning.
        """
        if self._run is not None:
            self._run.is_over = True
        for network in self._networks:
            network.detach()

    def summary(self) -> Summary:
        """What the last run did. Counts its arithmetic on the meta device, in a second or so.

        Raises:
            StateError: No run was made.
        """
        run = self._run
        if run is None or not run.num_evaluations:
            raise StateError("`summary` was called before a run. Run the pipeline first, then ask.")
        side_networks = self._networks[len(self._denoisers) :]
        return summarize(self.config, run.clock.num_steps, self._denoisers, side_networks)

    # The loop that the networks are evaluated in

    def enter(self, network: GatedNetwork, inputs: Inputs) -> bool:
        """Begin a run with the first evaluation after `set_timesteps`; False outside of runs."""
        is_denoiser = network in self._denoisers
        if self._begins_a_run():
            self._begin()
        run = self._run
        if run is None or run.is_over:
            return False  # someone evaluates the network on their own
        if is_denoiser:
            self._check_callback(network)
        network.settle_guidance(pipelines.does_guidance(self.pipe, self._family.guidance), inputs)
        return True

    def leave(self, network: GatedNetwork) -> None:
        """Count the denoiser's evaluations, and move the gate by them where there is no callback."""
        run = self._run
        assert run is not None
        if network in self._denoisers:
            run.num_evaluations += 1
            if not self._moved_by_callback:
                self._advance(run, run.num_evaluations)

    def _begins_a_run(self) -> bool:
        timesteps = self.pipe.scheduler.timesteps
        if self._foreign_timesteps is not None and self._foreign_timesteps() is timesteps:
            return False
        return self._run is None or self._run.timesteps() is not timesteps

    def _ignore_present_timesteps(self) -> None:
        timesteps = self.pipe.scheduler.timesteps
        self._foreign_timesteps = weakref.ref(timesteps) if isinstance(timesteps, torch.Tensor) else None

    def _begin(self) -> None:
        clock = pipelines.step_clock(self.pipe)
        if clock.num_steps <= FEW_STEPS:
            _say_that_few_steps_gain_little()
        self._run = _Run(weakref.ref(self.pipe.scheduler.timesteps), clock)
        for network in self._networks:
            network.begin(clock.num_steps)

    def _advance(self, run: _Run, evaluation: int) -> None:
        if evaluation >= run.clock.num_evaluations:
            self._finish()
            return
        for network in self._networks:
            network.advance(run.clock.step(evaluation))
        if self.config.gate_step == "auto":
            self._close_together()

    def _close_together(self) -> None:
        """What the gate of one denoiser has decided holds for all networks of the loop."""
        gate_step = min(denoiser.gate.gate_step for denoiser in self._denoisers)
        for network in self._networks:
            if network.gate.gate_step != gate_step:
                network.gate.close_at(gate_step)

    def _finish(self) -> None:
        assert self._run is not None
        self._run.is_over = True
        for network in self._networks:
            network.finish()

    def _check_callback(self, network: GatedNetwork) -> None:
        calls = 2 if self._family.guidance is Guidance.CALLS else 1
        if self._moved_by_callback and network.calls_in_step >= calls:
            raise StateError(
                "`callback_on_step_end` must be the handle that `apply_tgate` returned, but it was not called after "
                "the last evaluation. Pass it to the pipeline: "
                "`pipe(..., callback_on_step_end=tgate)`; give a callback of your own to `apply_tgate`."
            )
