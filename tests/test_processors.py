"""Gated processors by themselves: any class below them, their signature, their residual, a loop of one's own."""

import inspect

import diffusers
import pytest
import torch
from diffusers.models import attention_processor as zoo
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from tiny import tiny

from tgate_processors import (
    Gate,
    TGateAttnProcessor2_0,
    TGateConfig,
    apply_tgate,
    gated_processors,
    ungated_processors,
)
from tgate_processors._gated_layers import GatedLayers
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
    unet.set_attn_processor(gated_processors(unet, Gate(TGateConfig(gate_step=2))))
    assert torch.equal(unet(sample, 5, text, cross_attention_kwargs=extra).sample, plain)
    layers = [p for p in unet.attn_processors.values() if isinstance(p, GatedProcessor)]
    assert all(isinstance(layer, Scaled) and layer.factor == 0.5 for layer in layers)
    assert len(layers) == len({id(layer) for layer in layers}) == 7  # one was shared; each layer has its own


def test_what_is_set_on_a_users_processor_is_seen_at_once_and_stays():
    """A gated one has the attributes of the one that it stands in for, and not copies."""
    unet, mine = tiny("sd").denoiser, Scaled(0.5)
    unet.set_attn_processor(mine)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    half = unet(sample, 5, text).sample
    unet.set_attn_processor(gated_processors(unet, Gate(TGateConfig(gate_step=2))))
    mine.factor = 0.25
    quarter = unet(sample, 5, text).sample
    assert not torch.equal(quarter, half)
    next(p for p in unet.attn_processors.values() if isinstance(p, GatedProcessor)).factor = 0.5
    assert mine.factor == 0.5
    unet.set_attn_processor(ungated_processors(unet))
    assert set(map(id, unet.attn_processors.values())) == {id(mine)}
    assert torch.equal(unet(sample, 5, text).sample, half)


def test_ungated_is_the_processor_below():
    processor = Scaled(0.5)
    assert ungated(gated(processor, GatedLayers(), is_cross_attention=True)) is processor
    assert ungated(processor) is processor
    anew = ungated(type(gated(processor, GatedLayers(), is_cross_attention=True))(0.25))  # as diffusers does
    assert type(anew) is Scaled
    assert anew.factor == 0.25


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("rescale", [1.0, 2.0])
@pytest.mark.parametrize("picture", [False, True])
def test_reuse_adds_its_own_residual(residual, rescale, picture):
    """What is reused is `attention(old)`; the layer gives `(attention(old) + new) / rescale`."""
    attn = Attention(8, heads=2, dim_head=4, residual_connection=residual, rescale_output_factor=rescale)
    shape = (2, 8, 3, 3) if picture else (2, 9, 8)
    old, new = torch.randn(shape), torch.randn(shape)
    layers = GatedLayers()
    attn.set_processor(gated(AttnProcessor2_0(), layers, is_cross_attention=False))
    layers.hold({"layer": attn.processor})
    layers.begin(StepMode.PLANNING_STORE_SELF, {})
    with torch.no_grad():
        computed = attn(old)
        [(_, stored)] = layers.end().new["layer"]
        layers.begin(StepMode.PLANNING_REUSE_SELF, {"layer": [stored]})
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
    run = gate.start(num_inference_steps=12, guidance=True)
    for t in scheduler.timesteps:
        text = run.fold(torch.cat([negative, positive]))
        u, c = run.unfold(unet(run.fold(torch.cat([latents] * 2)), t, text).sample).chunk(2)
        latents = scheduler.step(u + 5.0 * (c - u), t, latents).prev_sample
        run.advance()
    assert torch.equal(latents, expected)
    assert run.cache_bytes == 0
    assert run.is_over
    assert not run.closed


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
