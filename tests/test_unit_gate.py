"""The gate alone, on a network of two layers: what each step folds, computes, keeps and returns."""

import pytest
import torch
from small import inputs, small

from tgate_processors import Gate, TGateConfig, gated_processors
from tgate_processors._layers import attention_layers, set_processors


def gated(**settings):
    """Return a gate, its network, and the number of times that each layer has computed."""
    module, computed = small(), {"attn1": 0, "attn2": 0}
    gate = Gate(TGateConfig(**settings))
    set_processors(module, gated_processors(module, gate))
    for name in computed:
        getattr(module, name).to_k.register_forward_hook(
            lambda *_, name=name: computed.update({name: computed[name] + 1})
        )
    return gate, module, computed


def test_the_layers_that_can_reuse_are_its_own():
    gate, module, _ = gated(gate_step=2)
    assert list(gate.layers.cross_attention) == ["attn2.processor"]
    assert len(attention_layers(module)) == 2


def test_cross_attention_is_computed_up_to_the_gate_and_self_attention_in_every_step():
    gate, module, computed = gated(gate_step=2)
    sample, text = inputs()
    run = gate.start(5, guidance=False)
    while not run.is_over:
        module(sample, 0, text)
        run.advance()
    assert computed == {"attn1": 5, "attn2": 2}


def test_with_intervals_self_attention_is_reused_too():
    """With 6 steps, gate step 2 and interval 2, self-attention is computed in steps 0, 1, 2 and 4."""
    gate, module, computed = gated(gate_step=2, fi_interval=2)
    sample, text = inputs()
    run = gate.start(6, guidance=False)
    while not run.is_over:
        module(sample, 0, text)
        run.advance()
    assert computed == {"attn1": 4, "attn2": 2}


def test_what_is_kept_is_the_mean_of_both_branches():
    gate, module, _ = gated(gate_step=1)
    sample, text = inputs()
    hidden = sample + module.attn1(sample)
    attended = module.attn2(hidden, text)
    run = gate.start(3, guidance=True)
    module(sample, 0, text)
    run.advance()
    half, its_text = run.fold(sample), run.fold(text)
    assert torch.equal(half, sample[:1])
    expected = hidden[:1] + attended.mean(0, keepdim=True)
    assert torch.allclose(module(half, 0, its_text)[0], expected, atol=1e-6)


def test_what_is_kept_is_counted_in_bytes_and_freed_with_the_run():
    gate, module, _ = gated(gate_step=1)
    sample, text = inputs()
    run = gate.start(2, guidance=False)
    assert run.cache_bytes == 0
    module(sample, 0, text)
    run.advance()
    assert run.cache_bytes == sample.nbytes  # one layer's output, of the sample's size
    run.advance()
    assert run.is_over
    assert run.cache_bytes == 0


@pytest.mark.parametrize(("branch", "first"), [("negative", True), ("positive", False)])
def test_looks_give_the_guidance_back_that_they_saw(branch, first):
    gate, module, _ = gated(gate_step=1, look_interval=2, branch=branch)
    sample, text = inputs()
    run = gate.start(5, guidance=True)
    module(sample, 0, text)
    seen = torch.tensor([[1.0], [3.0]])
    assert torch.equal(run.unfold(seen), seen)
    run.advance()
    kept = run.unfold(torch.tensor([[10.0]])).flatten().tolist()
    # Guidance that was seen once fades to 0.9 in a step: it was 3 - 1 = 2, so 1.8 is left.
    assert kept == pytest.approx([10, 11.8] if first else [8.2, 10])


def test_an_output_that_does_not_fit_is_computed_anew():
    gate, module, computed = gated(gate_step=1)
    sample, text = inputs()
    run = gate.start(3, guidance=False)
    module(sample, 0, text)
    run.advance()
    wider, words = inputs(rows=3)
    output = module(wider, 0, words)[0]
    assert computed["attn2"] == 2
    run.stop()
    assert torch.equal(output, module(wider, 0, words)[0])
