"""A gated pipeline at the weights of the recordings: what it counts, stores and leaves."""

import pytest
import torch
from tiny import FAMILIES, Observed, fingerprint, num_layers, tiny

from tgate_processors import TGateConfig, apply_tgate
from tgate_processors.processors import GatedProcessor


pytestmark = pytest.mark.parametrize("family", FAMILIES)


def test_removing_twice(family):
    subject = tiny(family)
    before = fingerprint(subject.denoiser)
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=1))
    assert fingerprint(subject.denoiser) != before
    for _ in range(2):
        tgate.remove()
        assert fingerprint(subject.denoiser) == before


def test_evaluations_and_attention_calls_of_a_gate_after_one_step(family):
    """Guidance that a pipeline keeps to itself is known one step late."""
    gate_step = 1
    subject = tiny(family)
    cross_layers, self_layers = num_layers(family)
    steps = subject.num_steps()
    seen = Observed(subject)
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=gate_step))
    subject(tgate)

    both = 2 if subject.guided else 1
    assert seen.batches == [both] * gate_step + [1] * (steps - gate_step)
    assert seen.computed == {"cross": cross_layers * gate_step, "self": self_layers * steps}
    summary = tgate.summary()
    assert list(summary.batches) == seen.batches
    assert summary.cost.cross_computed == seen.computed["cross"]
    assert summary.cost.self_computed == seen.computed["self"]
    assert summary.gate_closed_at == gate_step


def test_only_what_is_read_is_stored_and_nothing_stays(family):
    subject = tiny(family)
    cross_layers, _ = num_layers(family)
    kept = []
    config = TGateConfig(gate_step=2)
    tgate = apply_tgate(subject.pipe, config)
    states = [p.state for p in subject.denoiser.attn_processors.values() if isinstance(p, GatedProcessor)]
    subject.denoiser.register_forward_hook(lambda *_: kept.append(sum(bool(s.stored or s.new) for s in states)))
    subject(tgate)
    assert kept == [0] + [cross_layers] * (len(kept) - 1)
    assert tgate.gate.cache_bytes == 0
    assert not any(state.stored or state.new for state in states)


def test_a_second_call_equals_the_first(family):
    subject = tiny(family)
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=2, sp_interval=2, fi_interval=2))
    assert torch.equal(subject(tgate), subject(tgate))
