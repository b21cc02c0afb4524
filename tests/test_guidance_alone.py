"""Where the text joins self-attention guidance alone is left out: what can be asked for there, and what is said."""

import warnings

import diffusers
import every  # noqa: F401  # registers its pipelines
import pytest
import torch
from seen import Seen
from tiny import fingerprint
from zoo import ENTRIES, STEPS, class_of, seeded

from tgate_processors import ConfigError, StateError, TGateConfig, apply_tgate
from tgate_processors._pipelines import denoisers_of, takes_callback


SD3, QWEN, FLUX, Z_IMAGE = "StableDiffusion3Pipeline", "QwenImagePipeline", "FluxPipeline", "ZImagePipeline"
KINDS = [SD3, QWEN, Z_IMAGE, "LTX2Pipeline (all its guidance)", "DiTPipeline"]


def tiny(name):
    return seeded(ENTRIES[name].build), ENTRIES[name].call([0])


def gated(pipe, kwargs, config):
    with apply_tgate(pipe, config) as tgate:
        return pipe(**kwargs, **({"callback_on_step_end": tgate} if takes_callback(pipe) else {}))[0], tgate


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gate_step": "auto"}, r"`gate_step` must be a count or a fraction for SD3Transformer2DModel, got \"auto\""),
        ({"gate_step": 2, "sp_interval": 2}, "`sp_interval` must be 1 for SD3Transformer2DModel, got 2"),
        ({"gate_step": 2, "fi_interval": 3}, "`fi_interval` must be 1 for SD3Transformer2DModel, got 3"),
        ({"gate_step": 2, "branch": "negative"}, '`branch` must be "positive" or None for SD3Transformer2DModel'),
    ],
)
def test_what_needs_cross_attention_is_refused(settings, message):
    pipe, _ = tiny(SD3)
    before = fingerprint(pipe.transformer)
    with pytest.raises(ConfigError, match=message):
        apply_tgate(pipe, TGateConfig(**settings))
    assert fingerprint(pipe.transformer) == before


def test_guidance_must_begin_at_once_where_the_first_step_keeps_both_branches():
    pipe, _ = tiny("QwenImage21Pipeline")
    with pytest.raises(
        ConfigError, match="`guidance_start` must be 0 for QwenImage21Pipeline, whose first step keeps"
    ):
        apply_tgate(pipe, TGateConfig(gate_step=3, guidance_start=1))


@pytest.mark.parametrize(
    ("guider", "settings"),
    [
        ("SkipLayerGuidance", {"skip_layer_guidance_layers": [0]}),
        ("AutoGuidance", {"auto_guidance_layers": [0], "dropout": 0.1}),
    ],
)
def test_a_guider_whose_second_call_is_no_negative_branch_is_refused(guider, settings):
    pipe, _ = tiny("HunyuanVideo15Pipeline")
    pipe.register_modules(guider=getattr(diffusers.guiders, guider)(**settings))
    with pytest.raises(ConfigError, match=f"`pipe.guider` must be a guider of two branches, .* got a {guider}"):
        apply_tgate(pipe, TGateConfig(gate_step=2))


@pytest.mark.parametrize("name", [SD3, QWEN])
def test_a_class_derived_from_a_known_one_is_taken_to_be_like_it(name):
    """Its halves must be seen to be equal, which two pictures of the same noise are in the first step alone."""
    pipe, kwargs = tiny(name)
    expected, _ = gated(pipe, kwargs, TGateConfig(gate_step=2))
    pipe.__class__ = type("Mine", (type(pipe),), {})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latents, _ = gated(pipe, kwargs, TGateConfig(gate_step=2))
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", [f"{name} (without guidance)" for name in (SD3, QWEN, FLUX)])
def test_a_run_without_guidance_is_told_so_once_a_handle(name):
    pipe, kwargs = tiny(name)
    stock = pipe(**kwargs)[0]
    tgate = apply_tgate(pipe, TGateConfig(gate_step=2))
    with pytest.warns(UserWarning, match=f"`pipe` should do guidance in this run, got none from the {class_of(name)}"):
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], stock)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(**kwargs, callback_on_step_end=tgate)


@pytest.mark.parametrize("name", KINDS)
def test_looks_keep_guidance(name):
    """Gate at 2 of 8, looks at 3, 5 and 7; guidance is kept between."""
    pipe, kwargs = tiny(name)
    kwargs["num_inference_steps"] = 8
    seen = Seen(denoisers_of(pipe)[0])
    pipe(**kwargs)
    looks, _ = gated(pipe, kwargs, TGateConfig(gate_step=2, look_interval=2))
    seen.stop()
    dropped, _ = gated(pipe, kwargs, TGateConfig(gate_step=2))
    assert sum(seen.batches) == 2 * 8 * ENTRIES[name].branches - 3  # one row less in each of the steps 2, 4 and 6
    assert not torch.equal(looks, dropped)
    assert torch.isfinite(looks).all()


@pytest.mark.parametrize("name", [SD3, QWEN, FLUX, "CogVideoXPipeline", "LTX2Pipeline", "HunyuanVideoPipeline"])
def test_in_half_precision_the_steps_are_known_too(name):
    """More timesteps are converted then."""
    pipe, kwargs = tiny(name)
    pipe.to(torch.bfloat16)
    kwargs = {key: as_half(value) for key, value in kwargs.items()}
    stock = pipe(**kwargs)[0]
    assert torch.equal(gated(pipe, kwargs, TGateConfig(gate_step=STEPS))[0], stock)
    seen = Seen(denoisers_of(pipe)[0])
    _, tgate = gated(pipe, kwargs, TGateConfig(gate_step=2))
    seen.stop()
    assert sum(seen.batches) == 2 * ENTRIES[name].branches + 2
    assert tgate.summary().gate_closed_at == 2


def as_half(value):
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_a_forgotten_callback_is_no_error_where_the_loop_says_its_timestep():
    """FLUX divides its timesteps by 1000 on the way."""
    pipe, kwargs = tiny(FLUX)
    expected, _ = gated(pipe, kwargs, TGateConfig(gate_step=2))
    with apply_tgate(pipe, TGateConfig(gate_step=2)):
        assert torch.equal(pipe(**kwargs)[0], expected)


def test_an_answer_for_another_batch_is_an_error():
    """What a cache that nobody knows may do: keep the output of the doubled batch."""
    pipe, kwargs = tiny(SD3)
    forward, outputs = pipe.transformer.forward, []

    def cached(*args, **kwargs):
        outputs.append(outputs[0] if outputs else forward(*args, **kwargs))
        return outputs[0]

    pipe.transformer.forward = cached
    with pytest.raises(StateError, match=r"must have a denoiser that returns one row for each input row, got 2 for 1"):
        gated(pipe, kwargs, TGateConfig(gate_step=2))
