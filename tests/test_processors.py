"""Gated processors by themselves: any class below them, their signature, their residual, a loop of one's own."""

import inspect

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as zoo
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from tiny import tiny

from tgate_processors import Gate, StateError, TGateAttnProcessor2_0, TGateConfig, apply_tgate, gated_processors
from tgate_processors._modes import StepMode
from tgate_processors.processors import GatedProcessor, gated, gated_class, ungated


ALL_CLASSES = [
    cls
    for name, cls in vars(zoo).items()
    if inspect.isclass(cls) and "AttnProcessor" in name and "__call__" in vars(cls) and cls.__module__ == zoo.__name__
]


def test_there_are_classes():
    assert len(ALL_CLASSES) >= 30


@pytest.mark.parametrize("cls", ALL_CLASSES)
def test_over_every_class_of_diffusers(cls):
    over = gated_class(cls)
    assert gated_class(cls) is over
    assert issubclass(over, GatedProcessor)
    assert issubclass(over, cls)
    assert inspect.signature(over.__call__) == inspect.signature(cls.__call__)


def test_the_named_class_is_the_one_over_the_default():
    assert gated_class(AttnProcessor2_0) is TGateAttnProcessor2_0


def test_without_a_gate_it_computes():
    attn = Attention(query_dim=8, heads=2, dim_head=4)
    x = torch.randn(2, 5, 8)
    assert torch.equal(TGateAttnProcessor2_0()(attn, x), AttnProcessor2_0()(attn, x))


class Scaled(AttnProcessor2_0):
    """A user's own processor, with state and a keyword."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, extra=0.0):
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask) * self.factor + extra


def test_a_users_processor_keeps_its_state_and_its_keywords():
    unet = tiny("sd").denoiser
    unet.set_attn_processor(Scaled(0.5))
    sample, text, extra = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32), {"extra": 0.25}
    plain = unet(sample, 5, text, cross_attention_kwargs=extra).sample
    gate = Gate(TGateConfig(gate_step=2))
    unet.set_attn_processor(gated_processors(unet, gate))
    assert torch.equal(unet(sample, 5, text, cross_attention_kwargs=extra).sample, plain)
    assert all(isinstance(layer, Scaled) and layer.factor == 0.5 for layer in gate.layers)
    assert len({id(layer) for layer in gate.layers}) == 7  # one instance was shared; each layer has its own


def test_ungated_is_the_processor_below():
    processor = Scaled(0.5)
    below = ungated(gated(processor, Gate(TGateConfig(gate_step=2)), is_cross_attention=True))
    assert type(below) is Scaled
    assert vars(below) == vars(processor)
    assert ungated(processor) is processor


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rescale", [1.0, 2.0])
@pytest.mark.parametrize("picture", [False, True])
def test_reuse_adds_its_own_residual(residual, rescale, picture):
    """What is reused is `attention(old)`; the layer gives `(attention(old) + new) / rescale`."""
    attn = Attention(8, heads=2, dim_head=4, residual_connection=residual, rescale_output_factor=rescale)
    shape = (2, 8, 3, 3) if picture else (2, 9, 8)
    old, new = torch.randn(shape), torch.randn(shape)
    gate = Gate(TGateConfig(gate_step=2, sp_interval=2))
    attn.set_processor(gated(AttnProcessor2_0(), gate, is_cross_attention=False))
    gate.layers = [attn.processor]
    gate.enter(StepMode.PLANNING_STORE_SELF)
    with torch.no_grad():
        computed = attn(old)
        gate.enter(StepMode.PLANNING_REUSE_SELF)
        expected = computed + (new - old) / rescale if residual else computed
        torch.testing.assert_close(attn(new), expected, rtol=0, atol=1e-6)


def test_a_loop_of_ones_own_equals_the_pipeline():
    subject = tiny("sd")
    kwargs = subject.kwargs()
    with apply_tgate(subject.pipe, TGateConfig(gate_step=5)) as tgate:
        expected = subject(tgate)

    unet, scheduler = subject.denoiser, subject.pipe.scheduler
    gate = Gate(TGateConfig(gate_step=5))
    unet.set_attn_processor(gated_processors(unet, gate))
    scheduler.set_timesteps(12)
    negative, positive = kwargs["negative_prompt_embeds"], kwargs["prompt_embeds"]
    latents = kwargs["latents"] * scheduler.init_noise_sigma
    gate.start(num_inference_steps=12)
    for t in scheduler.timesteps:
        if gate.closed:
            noise = unet(latents, t, negative).sample
        else:
            u, c = unet(torch.cat([latents] * 2), t, torch.cat([negative, positive])).sample.chunk(2)
            noise = u + 5.0 * (c - u)
        latents = scheduler.step(noise, t, latents).prev_sample
        gate.advance()
    assert torch.equal(latents, expected)
    assert gate.cache_bytes == 0
    assert not gate.closed


def test_advancing_before_a_run_is_an_error():
    with pytest.raises(
        StateError, match=r"`advance` was called before `start`. Call `gate.start\(num_inference_steps\)`"
    ):
        Gate(TGateConfig(gate_step=2)).advance()


def test_self_attention_that_is_never_reused_keeps_its_processors():
    unet = tiny("sd").denoiser
    before = unet.attn_processors
    after = gated_processors(unet, Gate(TGateConfig(gate_step=2)))
    assert {name for name in before if after[name] is before[name]} == {name for name in before if "attn1" in name}


def test_sd_processors_are_the_named_class():
    subject = tiny("sd")
    apply_tgate(subject.pipe, TGateConfig(gate_step=2, fi_interval=2))
    assert {type(p) for p in subject.denoiser.attn_processors.values()} == {TGateAttnProcessor2_0}


def test_model_of_diffusers_that_has_no_attention_processors():
    with pytest.raises(TypeError, match="got AutoencoderTiny: it has no attention processors"):
        gated_processors(diffusers.AutoencoderTiny(), Gate(TGateConfig(gate_step=2)))
