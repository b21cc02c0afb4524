"""A gated network: it stands around the network's calls, and sees of each whose it is."""

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
from tgate_processors._modes import StepMode
from tgate_processors.run import Call, Part


class EvaluatesNetworks(Protocol):
    """A pipeline's loop, which evaluates the network."""

    reuses_self_attention: bool
    pipe: Any
    run: Any

    def claim(self, network: "GatedNetwork", timestep: Any) -> Part | None:
        """What its run keeps of the network, if a call that the pipeline makes is one of a run; else None."""

    def leaves(self, stack: Sequence[Any]) -> None:
        """Let the run go where its pipeline is not in the stack of this thread."""

    def does_guidance(self) -> bool | None:
        """Whether the pipeline does guidance now; None where it does not say."""

    def was_evaluated(self, network: "GatedNetwork") -> None:
        """Take note of an evaluation that was claimed."""


class GatedNetwork(NotTheLoop):
    """A network whose layers are gated, whichever pipelines evaluate it.

    A call that no pipeline's run claims is the network's own: its layers only compute. One call at a time is inside,
    so that several threads may share the network.

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
        """The gated network that a module is, or a new one."""
        network = interceptor_of(module)
        return network if isinstance(network, cls) else cls(module)

    @property
    def layers(self) -> GatedLayers:
        """Its gated layers."""
        return self._installation.layers

    @property
    def processors(self) -> dict[str, Any]:
        """Its processors when the last run began, without the gate, as `Installation` has them."""
        return self._installation.processors

    def join(self, loop: EvaluatesNetworks) -> None:
        """Be evaluated by a pipeline's loop too.

        Raises:
            UnsupportedPipelineError: The network merges tokens around cross-attention, or has a processor whose maps
                are read in every step.
        """
        with self._lock:
            self.install(loop)
            if not self.loops:
                intercept(self.module, self)
            self.loops.append(loop)

    def leave(self, loop: EvaluatesNetworks) -> None:
        """Undo `join`; after the last loop has left, the network is as before. Safe to call twice."""
        with self._lock:
            if loop in self.loops:
                self.loops.remove(loop)
            if not self.loops:
                if interceptor_of(self.module) is self:
                    release(self.module)
                self._installation.remove()

    def install(self, loop: EvaluatesNetworks) -> None:
        """Gate what processors there are now, for a run of the loop."""
        with self._lock:
            self._installation.install(self_attention=loop.reuses_self_attention)

    # Not `recursive`: `torch.compile` of the network shall compile what `forward` calls.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # of torch
    def around(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the network: of a run, as the run wants it; else as it is."""
        with self._lock:
            if self._inside:  # a call from within a call is nobody's
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
            part.run.stop()  # its loop has failed with it
            raise

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _enter(self, loop: EvaluatesNetworks, part: Part, inputs: Inputs) -> tuple[Call, AbstractContextManager[None]]:
        call = part.before(inputs, loop.does_guidance)
        if call.answer is not None:
            return call, nullcontext()
        settings = part.settings(call)
        self.layers.put_in(**settings)
        return call, self._checkpoints(call, settings) if torch.is_grad_enabled() else nullcontext()

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def _leave(self) -> Taken:
        return self.layers.take_out()

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
                if loop.run is not last:  # a run begins: those of pipelines that are no longer running are let go
                    self._let_go_of_others([caller, *stack])
                return loop, part
        self._let_go_of_others([caller, *stack])
        return None, None

    def _let_go_of_others(self, running: Sequence[Any]) -> None:
        for loop in self.loops:
            loop.leaves(running)

    def _checkpoints(self, call: Call, settings: dict[str, Any]) -> AbstractContextManager[None]:
        @contextmanager
        def again() -> Iterator[None]:
            with self._lock, self._set_aside():
                self.layers.put_in(**settings)
                try:
                    yield
                finally:
                    self.layers.take_out()

        return checkpoints_kept(self.module, again, is_gated=call.mode is not StepMode.PLANNING)

    @contextmanager
    def _set_aside(self) -> Iterator[None]:
        aside = self.layers.set_aside()
        try:
            yield
        finally:
            self.layers.go_on(aside)
