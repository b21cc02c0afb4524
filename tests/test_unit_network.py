"""A gated network alone: which run a call belongs to, what the layers do in it, and what stays after removal."""

import threading
from types import SimpleNamespace

import pytest
import torch
from small import inputs, small
from tiny import fingerprint, left_behind

from tgate_processors import TGateConfig, UnsupportedPipelineError
from tgate_processors._clock import StepClock
from tgate_processors._guidance import Calls, Halves
from tgate_processors._interception import interceptor_of
from tgate_processors._network import GatedNetwork
from tgate_processors.run import Part, Run


STEPS = 4


class Loop:
    """A loop without a pipeline. While `claims` is True, every call belongs to its run.

    Args:
        network: The gated network.
        strategy: Strategy of guidance.
        calls_per_step: Number of calls in a step.
    """

    pipe = None  # in these tests no pipeline calls the network
    reuses_self_attention = False

    def __init__(self, network, strategy, *, calls_per_step=1):
        self.run = Run(TGateConfig(gate_step=1), StepClock(STEPS))
        self.part = self.run.parts[network.layers] = Part(self.run, network.layers, strategy)
        self.claims, self.evaluated = True, 0
        self._calls_per_step = calls_per_step

    def claim(self, network, timestep):
        self.run.move_to(self.evaluated // self._calls_per_step)
        return self.part if self.claims and not self.run.is_over else None

    def leaves(self, stack):
        pass

    def does_guidance(self):
        return True

    def was_evaluated(self, network):
        self.evaluated += 1


def gated(strategy, **settings):
    """Return a small network that a loop has joined, with the batches that reach its first layer."""
    module = small()
    network = GatedNetwork.of(module)
    loop = Loop(network, strategy, **settings)
    network.join(loop)
    batches, computed = [], []
    module.attn1.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    module.attn2.to_k.register_forward_hook(lambda *_: computed.append(True))
    return SimpleNamespace(module=module, network=network, loop=loop, batches=batches, computed=computed)


def doubled():
    sample, text = inputs(rows=1)
    return torch.cat([sample, sample]), torch.cat([text, -text])


def test_after_the_gate_one_half_goes_in_and_both_come_out():
    """The gate closes at step 1, so step 0 stores and three steps reuse its output."""
    subject = gated(Halves("negative"))
    sample, text = doubled()
    outputs = [subject.module(sample, step, text)[0] for step in range(STEPS)]
    assert subject.batches == [2, 1, 1, 1]
    assert len(subject.computed) == 1
    assert [len(output) for output in outputs] == [2] * STEPS
    assert not torch.equal(*outputs[0].chunk(2))
    assert torch.equal(*outputs[1].chunk(2))


def test_calls_of_the_other_branch_are_answered_without_the_network():
    subject = gated(Calls(looks=False), calls_per_step=2)
    sample, text = inputs()
    for step in range(STEPS):
        first, second = (subject.module(sample, step, words)[0] for words in (text, -text))
        assert torch.equal(first, second) is (step > 0)
    assert subject.batches == [2, 2, 2, 2, 2]


def test_a_call_that_is_nobodys_only_computes():
    subject = gated(Halves("negative"))
    sample, text = doubled()
    own = subject.module(sample, 0, text)[0]
    subject.module(sample, 1, text)
    assert subject.loop.run.closed
    subject.loop.claims = False
    assert torch.equal(subject.module(sample, 1, text)[0], own)
    assert subject.batches == [2, 1, 2]


def test_a_call_from_within_a_call_is_nobodys():
    """The inner call has one row, like the outer one after the gate, so the stored outputs would fit it."""
    subject = gated(Halves("negative"))
    sample, text = doubled()
    subject.loop.claims = False
    own = subject.module(sample[:1], 0, text[1:])[0]
    subject.loop.claims = True
    subject.module(sample, 0, text)
    within = []

    def call_again(*_):
        hook.remove()
        within.append(subject.module(sample[:1], 1, text[1:])[0])

    hook = subject.module.attn2.register_forward_pre_hook(call_again)
    after = subject.module(sample, 1, text)[0]
    assert torch.equal(within[0], own)
    assert torch.equal(*after.chunk(2))  # the outer call is not disturbed
    assert subject.loop.evaluated == 2


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_evaluation_that_fails_ends_its_run_and_leaves_layers_that_compute(error):
    subject = gated(Halves("negative"))
    sample, text = doubled()
    own = subject.module(sample, 0, text)[0]

    def fail(*_):
        raise error

    hook = subject.module.attn2.register_forward_hook(fail)
    with pytest.raises(error):
        subject.module(sample, 1, text)
    hook.remove()
    assert subject.loop.run.is_over
    assert subject.loop.run.cache_bytes == 0
    assert torch.equal(subject.module(sample, 1, text)[0], own)


def test_past_the_last_step_the_network_computes_and_nothing_is_stored():
    subject = gated(Halves("negative"))
    sample, text = doubled()
    outputs = [subject.module(sample, 0, text)[0] for _ in range(STEPS + 1)]
    assert subject.batches == [2, 1, 1, 1, 2]
    assert torch.equal(outputs[-1], outputs[0])
    assert subject.loop.run.cache_bytes == 0


def test_another_threads_call_waits_for_the_one_that_is_inside():
    subject = gated(Halves("negative"))
    sample, text = doubled()
    order = []
    other = threading.Thread(target=lambda: (subject.module(sample, 1, text), order.append("other")))

    def meanwhile(*_):
        hook.remove()
        other.start()
        other.join(timeout=0.05)
        order.append("inside")

    hook = subject.module.attn2.register_forward_pre_hook(meanwhile)
    subject.module(sample, 0, text)
    other.join()
    assert order == ["inside", "other"]


def test_the_network_is_gated_until_its_last_loop_has_left():
    module = small()
    before = fingerprint(module)
    network = GatedNetwork.of(module)
    first, second = (Loop(network, Halves("negative")) for _ in range(2))
    network.join(first)
    assert GatedNetwork.of(module) is network
    network.join(second)
    network.leave(first)
    assert len(network.layers) == 1
    network.leave(second)
    network.leave(second)  # safe to call twice
    assert left_behind(before, module) == {}


def test_without_cross_attention_guidance_alone_is_left_out():
    subject = gated(Halves("negative"))
    subject.network.leave(subject.loop)
    subject.module.attn2.is_cross_attention = False
    loop = Loop(subject.network, Halves("negative"))
    subject.network.join(loop)
    assert len(subject.network.layers) == 0
    sample, text = doubled()
    for step in range(STEPS):
        subject.module(sample, step, text)
    assert subject.batches == [2, 1, 1, 1]
    assert len(subject.computed) == STEPS


def test_merged_tokens_are_refused_and_the_network_is_left_alone():
    module = small()
    merging = type("ToMeBlock", (torch.nn.Module,), {})
    module.block = merging()
    module.block._tome_info = {"args": {"merge_crossattn": True}}
    before = fingerprint(module)
    network = GatedNetwork.of(module)
    with pytest.raises(UnsupportedPipelineError, match="`merge_crossattn` must be False"):
        network.join(Loop(network, Halves("negative")))
    assert interceptor_of(module) is None
    assert left_behind(before, module) == {}
