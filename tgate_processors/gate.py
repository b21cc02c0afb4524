"""The gate: which step a run is in, and so what its attention layers do. The layers read it, one writer moves it."""

from typing import Protocol

import torch

from tgate_processors.errors import StateError
from tgate_processors.schedule import AttentionMode, Phase, Schedule, StepMode, TGateConfig
from tgate_processors.watch import Watch, has_converged, watched_layers


class GatedLayer(Protocol):
    """What the gate knows of a layer: its kind, and the output that it keeps."""

    is_cross_attention: bool
    is_watched: bool
    cached: torch.Tensor | None
    owns_cached: bool


class Gate:
    """The state of a gated denoising loop.

    Layers read `cross_attention` and `self_attention` and nothing else, so that `torch.compile` specialises on
    the few modes and not on the step. `apply_tgate` drives a gate for a pipeline; in a loop of one's own:

        gate = Gate(TGateConfig(gate_step=10))
        unet.set_attn_processor(gated_processors(unet, gate))
        gate.start(num_inference_steps=25)
        for t in timesteps:
            if gate.closed:
                ...  # denoise one branch, without guidance
            else:
                ...  # denoise both branches
            gate.advance()

    With `gate_step="auto"` it watches some of its layers, and closes itself.

    Args:
        config: The gate's settings.
        first_half: Whether the branch that goes on after the gate is the first half of a doubled batch.
        follows: Whether another gate decides for this one, where the configuration leaves it to the run.

    Attributes:
        batch: Number of samples in the evaluations; None: as many as the outputs of the layers have rows.
        watches_all: Whether it watches all of its layers throughout the run instead, to measure, and never closes.
    """

    def __init__(self, config: TGateConfig, *, first_half: bool = True, follows: bool = False) -> None:
        self.config = config
        self.follows = follows
        self.first_half = first_half
        self.batch: int | None = None
        self.layers: list[GatedLayer] = []
        self.watch = Watch(1)  # of this run, or of the last
        self.watches = False
        self.watches_all = False
        self.call = 0
        self._caches_of_calls: dict[int, list[torch.Tensor | None]] = {}  # of all calls but this
        self.schedule: Schedule | None = None
        self.closes_at: int | None = None  # what this run, or the last, has decided
        self.step = 0
        self.peak_cache_bytes = 0
        self.enter(StepMode.PLANNING)

    @property
    def closed(self) -> bool:
        """Whether the run is in its fidelity-improving phase."""
        return self.mode.phase is Phase.FIDELITY

    @property
    def cache_bytes(self) -> int:
        """Bytes of attention output kept now."""
        caches = [[layer.cached for layer in self.layers], *self._caches_of_calls.values(), self.watch.before]
        kept = {id(cached): cached.nbytes for cache in caches for cached in cache if cached is not None}
        return sum(kept.values())

    @property
    def gate_step(self) -> int:
        """The first step after the gate, as far as it is known in this run."""
        assert self.schedule is not None
        return self.schedule.gate_step

    def mode_of(self, layer: GatedLayer) -> AttentionMode:
        """What a layer does in this step."""
        if layer.is_cross_attention:
            return self.watched_attention if layer.is_watched else self.cross_attention
        return self.self_attention

    def start(self, num_inference_steps: int, *, guidance: bool = True) -> None:
        """Begin a run at its step 0, whatever became of the run before.

        Raises:
            ConfigError: `num_inference_steps` is no whole number of at least 1.
        """
        self.stop()
        self.closes_at = None
        self.schedule = Schedule(self.config, num_inference_steps, guidance=guidance)
        if self.config.gate_step == "auto" and not self.follows:
            self._begin_watching(num_inference_steps)
        self._move_to(0)
        self.peak_cache_bytes = 0

    def advance(self, to_step: int | None = None) -> None:
        """Go to the next step, or to `to_step`. Past the last step the run is over and its caches are freed.

        Raises:
            StateError: No run was started.
        """
        if self.schedule is None:
            raise StateError("`advance` was called before `start`. Call `gate.start(num_inference_steps)` first.")
        step = self.step + 1 if to_step is None else to_step
        if step > self.step and self.watches:
            self._look()
            if not self.watches_all and has_converged(self.watch.changes, len(self.schedule), self.config.tolerance):
                self.close_at(step + 1)
        if step < len(self.schedule):
            self._move_to(step)
        else:
            self.stop()

    def close_at(self, gate_step: int) -> None:
        """Say in the middle of a run at which step the gate closes; the step before it stores."""
        assert self.schedule is not None
        self.closes_at = gate_step
        self._end_watching()
        self._plan(self.schedule.guidance)
        self._move_to(self.step)

    def stop(self) -> None:
        """End the run and free its caches; until the next `start` every layer computes."""
        if self.watches:
            self._look()
        self._end_watching()
        self.schedule = None
        self.step = 0
        self.begin_call(0)
        self.enter(StepMode.PLANNING)
        self._caches_of_calls.clear()

    def set_guidance(self, guidance: bool) -> None:
        """Say in the middle of a run whether it has two branches, for pipelines that show it late.

        Of what was stored whole by then, what one branch needs is kept, as if it had been known.
        """
        assert self.schedule is not None
        stored_whole = self.closed and guidance and not self.schedule.guidance
        self._plan(guidance)
        if stored_whole:
            closing = self.schedule[self.gate_step - 1].cross_attention
            for layer in self.layers:
                layer.cached = None if layer.cached is None else self.kept(layer.cached, closing)
        else:
            self._move_to(self.step)

    def kept(self, output: torch.Tensor, mode: AttentionMode) -> torch.Tensor:
        """What a layer stores of its output in this mode: `(2 * batch, ...)` to `(batch, ...)`, or all of it."""
        if mode is AttentionMode.STORE:
            return output
        first, second = output.chunk(2)
        if mode is AttentionMode.STORE_MEAN:
            return (first + second) / 2
        return first if self.first_half else second

    def begin_call(self, call: int) -> None:
        """Begin call `call` of a step, in a loop that calls the denoiser once for each branch of guidance.

        Each call has its caches; when the gate closes, the mean over the calls is kept.
        """
        if call == self.call:
            return
        caches = self._caches_of_calls.pop(call, [None] * len(self.layers))
        self._caches_of_calls[self.call] = [layer.cached for layer in self.layers]
        for layer, cached in zip(self.layers, caches, strict=True):
            layer.cached = cached
        self.call = call

    def own_caches(self) -> None:
        """Copy what was stored since: a CUDA graph writes its next replay's outputs over those of the last.

        Call it after the network, outside of what is compiled.
        """
        for layer in self.layers:
            if layer.cached is not None and not layer.owns_cached:
                layer.cached = layer.cached.clone()
                layer.owns_cached = True

    def enter(self, mode: StepMode) -> None:
        """Put every layer into the mode of a step, and free what no layer reads any more."""
        self.peak_cache_bytes = max(self.peak_cache_bytes, self.cache_bytes)
        self.mode = mode
        self.cross_attention = mode.cross_attention
        self.self_attention = mode.self_attention
        self.watched_attention = AttentionMode.STORE if self.watches else mode.cross_attention
        if self.closed:
            self._keep_the_mean_of_calls()
        for index, layer in enumerate(self.layers):
            # Only a store comes right before a reuse, so what a computing layer keeps is never read again.
            now = self.mode_of(layer)
            if now is AttentionMode.COMPUTE:
                layer.cached = None
                for caches in self._caches_of_calls.values():
                    caches[index] = None

    def _begin_watching(self, num_steps: int) -> None:
        cross = [layer for layer in self.layers if layer.is_cross_attention]
        for index in range(len(cross)) if self.watches_all else watched_layers(len(cross)):
            cross[index].is_watched = True
        self.watch = Watch(num_steps)
        self.watches = True

    def _look(self) -> None:
        outputs = [layer.cached for layer in self.layers if layer.is_watched]
        rows = [output.shape[0] for output in outputs if output is not None]
        if rows:
            self.watch.look(outputs, self.batch or rows[0])

    def _end_watching(self) -> None:
        self.watches = False
        self.watch.before.clear()
        for layer in self.layers:
            layer.is_watched = False

    def _keep_the_mean_of_calls(self) -> None:
        self.begin_call(0)
        for caches in self._caches_of_calls.values():
            for layer, other in zip(self.layers, caches, strict=True):
                if layer.cached is not None and other is not None:
                    layer.cached = (layer.cached + other) / 2
        self._caches_of_calls.clear()

    def _plan(self, guidance: bool) -> None:
        assert self.schedule is not None
        self.schedule = Schedule(self.config, len(self.schedule), guidance=guidance, closes_at=self.closes_at)

    def _move_to(self, step: int) -> None:
        assert self.schedule is not None
        self.step = step
        mode = self.schedule[step]
        if mode.phase is Phase.FIDELITY and self.layers and all(layer.cached is None for layer in self.layers):
            # The network was not evaluated in the step that closes the gate: it closes in the first that it is.
            mode = self.schedule[self.schedule.gate_step - 1]
        self.enter(mode)
