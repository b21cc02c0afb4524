"""A network that a denoising loop evaluates, with its gate: the denoiser, or a ControlNet beside it."""

from dataclasses import replace
from typing import Any, Protocol

import torch

from tgate_processors.cost import Evaluation, on_meta
from tgate_processors.deepcache import last_step_was_full, make_next_step_full
from tgate_processors.errors import StateError
from tgate_processors.gate import Gate
from tgate_processors.guidance import (
    FADING,
    Inputs,
    difference_of_halves,
    double,
    halves_are_equal,
    sample_of,
    take_half,
    with_difference,
)
from tgate_processors.installation import Installation
from tgate_processors.interception import intercept, release
from tgate_processors.schedule import TGateConfig
from tgate_processors.watch import to_paper_steps


class Loop(Protocol):
    """The denoising loop that a network is evaluated in."""

    def enter(self, network: "GatedNetwork", inputs: Inputs) -> bool:
        """Say before a call whether it is one of a gated run."""

    def leave(self, network: "GatedNetwork") -> None:
        """Take note of such a call."""


class GatedNetwork:
    """Gated layers, and the interceptor of the network's calls, which leaves out a half of the batch, or a call.

    Args:
        module: The network.
        config: The gate's settings.
        loop: The loop that it is evaluated in.
        first_half: Whether the branch that goes on after the gate is the batch's first half.
        is_denoiser: Whether its output is guided: a ControlNet's is not, and it follows the denoiser's gate.
        a_call_a_branch: Whether the branches of guidance are calls, one after the other.
        deepcache: The `DeepCacheSDHelper` that is enabled on the network, where there is one.
    """

    # Of one run:
    guided: bool | None  # whether the batch has two halves; None until the gate has to know
    evaluations: list[Evaluation]
    num_calls: int  # with those that were left out
    calls_in_step: int
    inputs: Inputs | None  # of the first evaluation, on the meta device
    _kept_guidance: list[torch.Tensor] | None  # what the branches differed by when the text was looked at
    _kept_in_step: int
    _answer: Any  # of a step's first call, for the calls that are left out

    def __init__(
        self,
        module: Any,
        config: TGateConfig,
        loop: Loop,
        *,
        first_half: bool,
        is_denoiser: bool = True,
        a_call_a_branch: bool = False,
        deepcache: Any = None,
    ) -> None:
        self.module = module
        self.gate = Gate(config, first_half=first_half, follows=not is_denoiser)
        self.deepcache = deepcache
        self.loop = loop
        self._keeps_guidance = is_denoiser and config.look_interval is not None
        self._a_call_a_branch = a_call_a_branch
        self._layers = Installation(module, self.gate)
        self._forget()

    def attach(self) -> None:
        """Gate the layers and stand around the calls.

        Raises:
            UnsupportedPipelineError: The network has no cross-attention layer of its own.
        """
        self._layers.install()
        intercept(self.module, self)

    def detach(self) -> None:
        """Undo `attach`. Safe to call twice."""
        release(self.module, self)
        self._layers.remove()
        self._answer = self._kept_guidance = None

    def begin(self, num_steps: int) -> None:
        """Begin a run, over whatever processors the layers have now and with nothing of the run before."""
        self._layers.install()
        self.gate.start(num_steps, guidance=False)
        self._forget()

    def advance(self, step: int) -> None:
        """Go to step `step`."""
        self.calls_in_step = 0
        self._answer = None
        self.gate.advance(to_step=step)

    def finish(self) -> None:
        """End the run: nothing is kept."""
        self._answer = self._kept_guidance = None
        self.gate.stop()
        if self.deepcache is not None:
            make_next_step_full(self.deepcache)

    def settle_guidance(self, does_guidance: bool | None, inputs: Inputs) -> None:
        """Find out whether the batch has two halves, as late as the gate allows.

        Args:
            does_guidance: What the pipeline says; None where it says nothing.
            inputs: Of the call.
        """
        if self.guided is not None or self.gate.step < self.gate.gate_step - 1:
            return
        sample = sample_of(inputs)
        if inputs[1].get("guess_mode", False):
            does_guidance = False  # such a ControlNet is given the positive branch alone
        if does_guidance is None:
            if self.gate.step == 0:
                return  # two pictures may start from the same noise; in the next step they differ
            does_guidance = halves_are_equal(sample)
        if does_guidance and sample.shape[0] % 2:
            raise StateError(
                f"the batch of {type(self.module).__name__} must be the two halves of classifier-free guidance, as "
                f"the pipeline's `do_classifier_free_guidance` says, got a batch of {sample.shape[0]}. "
                "Remove the gate to run this pipeline."
            )
        self.guided, self._guided_batch = does_guidance, sample.shape[0]
        self.gate.set_guidance(does_guidance)
        if self.gate.closed:  # known one step late: the step before was the one that stores
            assert self.gate.schedule is not None
            closing = self.gate.schedule[self.gate.step - 1]
            self.evaluations = [replace(evaluation, mode=closing) for evaluation in self.evaluations]

    # The interceptor

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def before(self, inputs: Inputs) -> Inputs | None:
        """What the network is called with; None where its answer is known."""
        self._in_run = self.loop.enter(self, inputs)
        if not self._in_run:
            return inputs
        if self.inputs is None:
            self.inputs = on_meta(inputs)
        self.num_calls += 1
        if self._answer is not None:
            return None
        if self._a_call_a_branch:
            self.gate.begin_call(self.calls_in_step)
        self.gate.batch = batch = sample_of(inputs).shape[0]
        self._folded = self.gate.closed and bool(self.guided) and batch == self._guided_batch
        self._batch = batch // 2 if self._folded else batch
        if self.deepcache is not None and self._deep_features_do_not_fit():
            make_next_step_full(self.deepcache)
        return take_half(inputs, batch, first=self.gate.first_half) if self._folded else inputs

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # of torch
    def after(self, output: Any) -> Any:
        """What the caller gets."""
        if not self._in_run:
            return output
        self.calls_in_step += 1
        if self._answer is not None:
            return self._answer
        self.gate.own_caches()
        shallow = self.deepcache is not None and not last_step_was_full(self.deepcache)
        self.evaluations.append(Evaluation(self.gate.mode, self._batch, shallow))
        if self._folded:
            output = self._both_halves(output)
        elif self._keeps_guidance and self.gate.cross_attention.stores and self.guided is not False:
            self._kept_guidance = difference_of_halves(output, first=self.gate.first_half)
            self._kept_in_step = self.gate.step
        if self._a_call_a_branch and self.gate.closed:
            self._answer = output
        self.loop.leave(self)
        return output

    def _both_halves(self, output: Any) -> Any:
        if self._kept_guidance is None:
            return double(output)
        assert self.gate.schedule is not None
        since = (self.gate.step - self._kept_in_step) / to_paper_steps(len(self.gate.schedule))
        guidance = [FADING**since * difference for difference in self._kept_guidance]
        return with_difference(output, guidance, first=self.gate.first_half)

    def _forget(self) -> None:
        self.guided = None
        self.evaluations = []
        self.num_calls = 0
        self.calls_in_step = 0
        self.inputs = None
        self._guided_batch = 0
        self._batch = 0
        self._in_run = False
        self._folded = False
        self._kept_guidance = None
        self._kept_in_step = 0
        self._answer = None

    def _deep_features_do_not_fit(self) -> bool:
        if not self.evaluations:
            return True
        last = self.evaluations[-1]
        # every layer must be evaluated in the step that stores
        return last.batch != self._batch or (self.gate.cross_attention.stores and last.mode is not self.gate.mode)
