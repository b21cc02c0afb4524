"""The gate: which step a run is in, and so what its attention layers do. The layers read it, one writer moves it."""

from typing import Protocol

import torch

from tgate_processors.errors import StateError
from tgate_processors.schedule import AttentionMode, Phase, Schedule, StepMode, TGateConfig


class GatedLayer(Protocol):
    """What the gate knows of a layer: its kind, and the output that it keeps."""

    is_cross_attention: bool
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

    Args:
        config: The gate's settings.
    """

    def __init__(self, config: TGateConfig) -> None:
        self.config = config
        self.layers: list[GatedLayer] = []
        self.call = 0
        self._caches_of_calls: dict[int, list[torch.Tensor | None]] = {}  # of all calls but this
        self.schedule: Schedule | None = None
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
        caches = [[layer.cached for layer in self.layers], *self._caches_of_calls.values()]
        return sum(cached.nbytes for cache in caches for cached in cache if cached is not None)

    def start(self, num_inference_steps: int, *, guidance: bool = True) -> None:
        """Begin a run at its step 0, whatever became of the run before.

        Raises:
            ConfigError: `num_inference_steps` is no whole number of at least 1.
        """
        self.stop()
        self.schedule = Schedule(self.config, num_inference_steps, guidance=guidance)
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
        if step < len(self.schedule):
            self._move_to(step)
        else:
            self.stop()

    def stop(self) -> None:
        """End the run and free its caches; until the next `start` every layer computes."""
        self.schedule = None
        self.step = 0
        self.begin_call(0)
        self.enter(StepMode.PLANNING)
        self._caches_of_calls.clear()

    def set_guidance(self, guidance: bool) -> None:
        """Say in the middle of a run whether it has two branches, for pipelines that show it late.

        What was stored whole by then is averaged, as if it had been known.
        """
        assert self.schedule is not None
        stored_whole = self.closed and guidance and not self.schedule.guidance
        self.schedule = Schedule(self.config, len(self.schedule), guidance=guidance)
        if stored_whole:
            for layer in self.layers:
                layer.cached = None if layer.cached is None else mean_of_halves(layer.cached)
        else:
            self._move_to(self.step)

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
        if self.closed:
            self._keep_the_mean_of_calls()
        for index, layer in enumerate(self.layers):
            # Only a store comes right before a reuse, so what a computing layer keeps is never read again.
            now = self.cross_attention if layer.is_cross_attention else self.self_attention
            if now is AttentionMode.COMPUTE:
                layer.cached = None
                for caches in self._caches_of_calls.values():
                    caches[index] = None

    def _keep_the_mean_of_calls(self) -> None:
        self.begin_call(0)
        for caches in self._caches_of_calls.values():
            for layer, other in zip(self.layers, caches, strict=True):
                if layer.cached is not None and other is not None:
                    layer.cached = (layer.cached + other) / 2
        self._caches_of_calls.clear()

    def _move_to(self, step: int) -> None:
        assert self.schedule is not None
        self.step = step
        mode = self.schedule[step]
        if mode.phase is Phase.FIDELITY and self.layers and all(layer.cached is None for layer in self.layers):
            # The network was not evaluated in the step that closes the gate: it closes in the first that it is.
            mode = self.schedule[self.config.gate_step - 1]
        self.enter(mode)


def mean_of_halves(output: torch.Tensor) -> torch.Tensor:
    """The mean over the branches of guidance: `(2 * batch, ...)` to `(batch, ...)`."""
    first, second = output.chunk(2)
    return (first + second) / 2
