"""A network whose calls are intercepted and whose layers are gated. It finds the run that each call belongs to."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch

from tgate_processors._callers import NotTheLoop, callers
from tgate_processors._checkpointing import checkpoints_kept
from tgate_processors._folding import Inputs, timestep_of
from tgate_processors._gated_layers import GatedLayers, Taken
from tgate_processors._installation import Installation
from tgate_processors._interception import intercept, interceptor_of, release
from tgate_processors.run import Call, Part


class EvaluatesNetworks(Protocol):
    """What a gated network uses of a pipeline's loop."""

    reuses_self_attention: bool
    pipe: Any
    run: Any

    def claim(self, network: "GatedNetwork", timestep: Any) -> Part | None:
        """Return the run's part for the network if a call of the pipeline belongs to a run, else None."""

    def leaves(self, stack: Sequence[Any]) -> None:
        """Stop the run if its pipeline is not among the callers in this thread."""

    def does_guidance(self) -> bool | None:
        """Return whether the pipeline does guidance now; None if it does not say."""

    def was_evaluated(self, network: "GatedNetwork") -> None:
        """Note an evaluation that was claimed."""


class GatedNetwork(NotTheLoop):
    """A network whose layers are gated, for all pipelines that evaluate it.

    In a call that no pipeline's run claims, the layers only compute. A lock admits one call at a time, so several
    threads may share the network.

    Args:
        module: The network.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.loops: list[EvaluatesNetworks] = []
        self._installation = Installation(module)
        self._lock = threading.RLock()
        self._inside = False

    @classmethod
    def of(cls, module: torch.nn.Module) -> "GatedNetwork":
        """Return the gated network of a module, which is a new one if the module is not gated yet."""
        network = interceptor_of(module)
        return network if isinstance(network, cls) else cls(module)

    @property
    def layers(self) -> GatedLayers:
        """The network's gated layers."""
        return self._installation.layers

    @property
    def processors(self) -> dict[str, Any]:
        """The network's processors when the last run began, without the gate, as in `Installation`."""
        return self._installation.processors

    def join(self, loop: EvaluatesNetworks) -> None:
        """Add a pipeline's loop to those that evaluate the network. The first loop gates the network.

        Raises:
            UnsupportedPipelineError: The network merges tokens around cross-attention, or has a processor whose maps
                the pipeline reads in every step.
        """
        with self._lock:
            self.install(loop)
            if not self.loops:
                intercept(self.module, self)
            self.loops.append(loop)

    def leave(self, loop: EvaluatesNetworks) -> None:
        """Undo `join`. After the last loop has left, the network is as it was before. Safe to call twice."""
        with self._lock:
            if loop in self.loops:
                self.loops.remove(loop)
            if not self.loops:
                if interceptor_of(self.module) is self:
                    release(self.module)
                self._installation.remove()

    def install(self, loop: EvaluatesNetworks) -> None:
        """Gate the processors that the network has now, for a run of the loop."""
        with self._lock:
            self._installation.install(self_attention=loop.reuses_self_attention)

    # Not `recursive`, so that `torch.compile` of the network compiles what `forward` calls.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # of torch
    def around(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answer a call of the network: as the run decides if the call belongs to one, otherwise unchanged."""
        with self._lock:
            if self._inside:  # a call from inside of another call belongs to no run
                with self._set_aside():
                    return forward(*args, **kwargs)
            self._inside = True
            try:
                loop, part = self._claimed((args, kwargs))
                if loop is None or part is None:
                    return forward(*args, **kwargs)
                return self._evaluate(loop, part, forward, (args, kwargs))
            finally:
                self._inside = False

    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # of torch
    def _evaluate(self, loop: EvaluatesNetworks, part: Part, forward: Callable[..., Any], inputs: Inputs) -> Any:
        output = None
        try:
            try:
                call, checkpoints = self._enter(loop, part, inputs)
                if call.answer is None:
                    with checkpoints:
                        output = forward(*call.inputs[0], **call.inputs[1])
            finally:
                taken = self._leave()
            return self._answer(loop, part, call, taken, output)
        except BaseException:
            part.run.stop()  # the error ends the pipeline's loop too
            raise

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _enter(self, loop: EvaluatesNetworks, part: Part, inputs: Inputs) -> tuple[Call, AbstractContextManager[None]]:
        call = part.before(inputs, loop.does_guidance)
        if call.answer is not None:
            return call, nullcontext()
        settings = part.settings(call)
        self.layers.begin(**settings)
        return call, self._checkpoints(call, settings) if torch.is_grad_enabled() else nullcontext()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _leave(self) -> Taken:
        return self.layers.end()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _answer(self, loop: EvaluatesNetworks, part: Part, call: Call, taken: Taken, output: Any) -> Any:
        answer = part.after(call, taken, output) if call.answer is None else call.answer
        loop.was_evaluated(self)
        return answer

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _claimed(self, inputs: Inputs) -> tuple[EvaluatesNetworks | None, Part | None]:
        stack = callers(but=self)
        caller = next(stack, None)
        for loop in self.loops:
            last = loop.run
            part = loop.claim(self, timestep_of(inputs)) if loop.pipe is caller else None
            if part is not None:
                if loop.run is not last:  # a run has begun
                    self._stop_abandoned_runs([caller, *stack])
                return loop, part
        self._stop_abandoned_runs([caller, *stack])
        return None, None

    def _stop_abandoned_runs(self, running: Sequence[Any]) -> None:
        for loop in self.loops:
            loop.leaves(running)

    def _checkpoints(self, call: Call, settings: dict[str, Any]) -> AbstractContextManager[None]:
        @contextmanager
        def again() -> Iterator[None]:
            with self._lock, self._set_aside():
                self.layers.begin(**settings)
                try:
                    yield
                finally:
                    self.layers.end()

        return checkpoints_kept(self.module, again, is_gated=not call.mode.only_computes)

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        aside = self.layers.set_aside()
        try:
            yield
        finally:
            self.layers.go_on(aside)
