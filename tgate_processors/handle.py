"""Gating a pipeline: `apply_tgate` attaches processors and a hook, and the handle takes them away again."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Self

import torch
from torch.utils.hooks import RemovableHandle

from tgate_processors import pipelines
from tgate_processors.cost import Evaluation, evaluation_costs, meta_denoiser, on_meta, total
from tgate_processors.deepcache import is_enabled, last_step_was_full, make_next_step_full
from tgate_processors.errors import ConfigError, StateError
from tgate_processors.gate import Gate
from tgate_processors.guidance import Inputs, halves_are_equal, repeat_branch, sample_of, take_branch
from tgate_processors.installation import Installation, is_gated
from tgate_processors.schedule import Schedule, StepClock, StepMode, TGateConfig
from tgate_processors.summary import Summary


StepCallback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def apply_tgate(
    pipe: Any, config: TGateConfig, *, callback_on_step_end: StepCallback | None = None, deepcache: Any = None
) -> "TGate":
    """Gate a diffusers pipeline; its own `__call__` runs as before.

        tgate = apply_tgate(pipe, TGateConfig(gate_step=10))
        image = pipe(prompt, num_inference_steps=25, callback_on_step_end=tgate).images[0]
        tgate.remove()

    Args:
        pipe: A pipeline whose `unet` or `transformer` has cross-attention layers.
        config: When the gate closes, and what is reused.
        callback_on_step_end: A callback of your own, called after every step beside the handle's work.
        deepcache: The `DeepCacheSDHelper` that is enabled on the pipeline, where there is one.

    Returns:
        The handle: the pipeline's `callback_on_step_end`, and a context manager that removes itself.

    Raises:
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """
    if not isinstance(config, TGateConfig):
        raise ConfigError(f"`config` must be a TGateConfig, got {config!r}. Pass `TGateConfig(gate_step=10)`.")
    denoiser = pipelines.denoiser_of(pipe)
    if is_gated(denoiser):
        raise StateError(
            f"`pipe` must not be gated already, got a gated {type(denoiser).__name__}. "
            "Call `remove()` on the handle of the first `apply_tgate`, then apply again."
        )
    if deepcache is None and is_enabled(denoiser):
        raise StateError(
            "`deepcache` must be the helper that is enabled on the pipeline, got None. "
            "Pass `apply_tgate(pipe, config, deepcache=helper)`, or call `helper.disable()` first."
        )
    return TGate(pipe, denoiser, config, callback_on_step_end, deepcache)


@dataclass
class _Run:
    """One denoising loop of the pipeline, from its first evaluation on."""

    timesteps: "weakref.ref[torch.Tensor]"  # every `set_timesteps` makes a new tensor, and so a new run
    clock: StepClock
    inputs: Inputs  # of the first evaluation, on the meta device
    guided: bool | None = None  # None until the gate has to know
    guided_batch: int = 0
    batch: int = 0  # of the evaluation under way
    folded: bool = False  # whether it is one half
    evaluations: list[tuple[int, int, bool]] = field(default_factory=list)  # step, batch and shallow of each
    num_callbacks: int = 0


class TGate:
    """What `apply_tgate` put on a pipeline. Made by it alone.

    Attributes:
        config: The settings.
        gate: The state of the run; closed in the fidelity-improving phase.
        callback_on_step_end: A callback of your own, called with the pipeline's arguments after every step.
        tensor_inputs: Empty; diffusers' `MultiPipelineCallbacks` asks for it.
    """

    tensor_inputs: ClassVar[list[str]] = []

    def __init__(
        self, pipe: Any, denoiser: Any, config: TGateConfig, callback_on_step_end: StepCallback | None, deepcache: Any
    ) -> None:
        self.config = config
        self.gate = Gate(config)
        self.callback_on_step_end = callback_on_step_end
        self._pipe = pipe
        self._denoiser = denoiser
        self._deepcache = deepcache
        self._branch = config.branch or pipelines.family_of(pipe).branch
        self._moved_by_callback = pipelines.takes_callback(pipe)
        self._run: _Run | None = None
        self._layers = Installation(denoiser, self.gate)
        self._hooks: list[RemovableHandle] = []
        try:
            self._layers.install()
            self._hooks.append(denoiser.register_forward_pre_hook(self._before, with_kwargs=True))
            self._hooks.append(denoiser.register_forward_hook(self._after))
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __call__(self, pipe: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Move the gate on after a step; this is the pipeline's `callback_on_step_end`."""
        run = self._run
        if run is None or run.timesteps() is not self._pipe.scheduler.timesteps:
            raise StateError(
                f"`callback_on_step_end` was called after a step in which the gated {type(self._denoiser).__name__} "
                "was not evaluated. If the gate was removed, or the pipeline has another denoiser now, apply again."
            )
        run.num_callbacks += 1
        if self._moved_by_callback and self.gate.schedule is not None:
            self._advance(run, step_index + 1)
        if self.callback_on_step_end is not None:
            callback_kwargs = self.callback_on_step_end(pipe, step_index, timestep, callback_kwargs)
        if getattr(pipe, "interrupt", False):
            self._finish()  # no step follows
        return callback_kwargs

    def remove(self) -> None:
        """Take everything away: the same processor objects are back, the hook is gone. Safe to call twice.

        A processor that someone else has put in since stays, with a warning.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._layers.remove()

    def summary(self) -> Summary:
        """What the last run did. Counts its arithmetic on the meta device, in a second or so.

        Raises:
            StateError: No run was made.
        """
        run = self._run
        if run is None or not run.evaluations:
            raise StateError("`summary` was called before a run. Run the pipeline first, then ask.")
        schedule = Schedule(self.config, run.clock.num_steps, guidance=bool(run.guided))
        stock = Evaluation(StepMode.PLANNING, sample_of(run.inputs).shape[0])
        done = [Evaluation(schedule[step], batch, shallow) for step, batch, shallow in run.evaluations]
        model = meta_denoiser(self._denoiser)
        costs, _ = evaluation_costs(model, self.config, run.inputs, [stock, *done], self._deepcache)
        return Summary(
            schedule=schedule,
            evaluations=tuple(done),
            cost=total(costs, done),
            stock_macs=costs[stock].macs * len(done),
            cache_bytes=self.gate.peak_cache_bytes,
        )

    # The hook on the denoiser

    def _before(self, denoiser: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs | None:
        run = self._run
        if run is None or run.timesteps() is not self._pipe.scheduler.timesteps:
            run = self._run = self._begin((args, kwargs))
        run.folded = False
        if self.gate.schedule is None:
            return None  # the run is over: someone evaluates the denoiser on their own
        self._check_callback(run)
        sample = sample_of((args, kwargs))
        batch = sample.shape[0]
        self._settle_guidance(run, sample)
        run.folded = self.gate.closed and bool(run.guided) and batch == run.guided_batch
        run.batch = batch // 2 if run.folded else batch
        if self._deepcache is not None and self._deep_features_do_not_fit(run):
            make_next_step_full(self._deepcache)
        return take_branch((args, kwargs), batch, self._branch) if run.folded else None

    def _after(self, denoiser: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        run = self._run
        assert run is not None
        if self.gate.schedule is None:
            return None
        shallow = self._deepcache is not None and not last_step_was_full(self._deepcache)
        run.evaluations.append((self.gate.step, run.batch, shallow))
        if not self._moved_by_callback:
            self._advance(run, len(run.evaluations))
        return repeat_branch(output, run.guided_batch) if run.folded else None

    def _begin(self, inputs: Inputs) -> _Run:
        self._layers.install()  # over whatever the user has put in since the last run
        clock = pipelines.step_clock(self._pipe)
        self.gate.start(clock.num_steps, guidance=False)
        return _Run(weakref.ref(self._pipe.scheduler.timesteps), clock, on_meta(inputs))

    def _deep_features_do_not_fit(self, run: _Run) -> bool:
        if not run.evaluations:
            return True
        step, batch, _ = run.evaluations[-1]
        return batch != run.batch or (self.gate.cross_attention.stores and step != self.gate.step)

    def _advance(self, run: _Run, evaluation: int) -> None:
        if evaluation < run.clock.num_evaluations:
            self.gate.advance(to_step=run.clock.step(evaluation))
        else:
            self._finish()

    def _finish(self) -> None:
        self.gate.stop()
        if self._deepcache is not None:
            make_next_step_full(self._deepcache)

    def _check_callback(self, run: _Run) -> None:
        if self._moved_by_callback and len(run.evaluations) > run.num_callbacks:
            raise StateError(
                "`callback_on_step_end` must be the handle that `apply_tgate` returned, but it was not called after "
                f"evaluation {len(run.evaluations)}. Pass it to the pipeline: "
                "`pipe(..., callback_on_step_end=tgate)`; give a callback of your own to `apply_tgate`."
            )

    def _settle_guidance(self, run: _Run, sample: torch.Tensor) -> None:
        """Find out whether the batch is `[negative, positive]`, as late as the gate allows."""
        if run.guided is not None or self.gate.step < self.config.gate_step - 1:
            return
        guided = pipelines.does_guidance(self._pipe)
        if guided is None:
            if self.gate.step == 0:
                return  # two pictures may start from the same noise; in the next step they differ
            guided = halves_are_equal(sample)
        run.guided, run.guided_batch = guided, sample.shape[0]
        self.gate.set_guidance(guided)
