"""What cannot be gated is refused with a sentence, and nothing is half-installed."""

import math
import re
import warnings

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from tiny import Observed, fingerprint, tiny

import tgate_processors
from tgate_processors import (
    ConfigError,
    StateError,
    TGateConfig,
    TGateError,
    UnsupportedPipelineError,
    apply_tgate,
)
from tgate_processors import _network as network
from tgate_processors._layers import attention_layers
from tgate_processors.processors import GatedProcessor


CONFIG = TGateConfig(gate_step=2, sp_interval=2)


def test_every_error_is_ours_and_a_builtin():
    errors = [e for e in vars(tgate_processors).values() if isinstance(e, type) and issubclass(e, TGateError)]
    assert {e.__bases__ for e in errors if e is not TGateError} == {
        (TGateError, ValueError),
        (TGateError, TypeError),
        (TGateError, RuntimeError),
        (TGateError, ImportError),
    }


def test_applying_twice():
    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, CONFIG)
    before = fingerprint(subject.denoiser)
    with pytest.raises(StateError, match=r"`pipe` must not be gated already, got a gated UNet2DConditionModel. Call"):
        apply_tgate(subject.pipe, CONFIG)
    assert fingerprint(subject.denoiser) == before
    tgate.remove()
    apply_tgate(subject.pipe, CONFIG)


@pytest.mark.parametrize("config", [10, 0.4, {"gate_step": 10}, TGateConfig])
def test_a_config_of_another_type(config):
    subject = tiny("sd")
    before = fingerprint(subject.denoiser)
    message = f"`config` must be a TGateConfig or the name of a preset, got {config!r}. Pass for example"
    with pytest.raises(ConfigError, match=re.escape(message)):
        apply_tgate(subject.pipe, config)
    assert fingerprint(subject.denoiser) == before


def test_a_pipeline_without_a_denoiser():
    with pytest.raises(UnsupportedPipelineError, match="must be a diffusers pipeline with a `unet`"):
        apply_tgate(torch.nn.Linear(1, 1), CONFIG)


def unconditional():
    unet = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())


def joint():
    """A class that is in no table: nobody knows which half of its batch is which."""
    kind = type("JointPipeline", (diffusers.DiffusionPipeline,), {"__init__": lambda self: None})
    pipe = kind()
    pipe.unet = diffusers.SD3Transformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=4)
    return pipe


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (unconditional, "got DDPMPipeline: it does no guidance, and has no cross-attention to a prompt"),
        (joint, r"its text joins self-attention \(joint or added-KV attention\)"),
    ],
)
def test_a_pipeline_without_cross_attention(build, reason):
    pipe = build()
    before = fingerprint(pipe.unet)
    with pytest.raises(UnsupportedPipelineError, match=reason):
        apply_tgate(pipe, CONFIG)
    assert fingerprint(pipe.unet) == before


@pytest.mark.parametrize("family", ["sd", "pixart-alpha"])
@pytest.mark.parametrize("touch", [0, 1, 5])
def test_a_failure_halfway_through_installing(family, touch, monkeypatch):
    subject = tiny(family)
    before = fingerprint(subject.denoiser)
    layer = list(attention_layers(subject.denoiser).values())[touch]
    set_processor = type(layer).set_processor

    def fails_on_a_gated_one(self, processor):
        if self is layer and "TGate" in type(processor).__name__:
            raise MemoryError
        set_processor(self, processor)

    monkeypatch.setattr(type(layer), "set_processor", fails_on_a_gated_one)
    with pytest.raises(MemoryError):
        apply_tgate(subject.pipe, CONFIG)
    assert fingerprint(subject.denoiser) == before


def test_a_failure_after_the_processors(monkeypatch):
    subject = tiny("sd")
    before = fingerprint(subject.denoiser)

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(network, "intercept", fails)
    with pytest.raises(MemoryError):
        apply_tgate(subject.pipe, CONFIG)
    assert fingerprint(subject.denoiser) == before


def test_removing_keeps_a_processor_that_someone_put_in_since():
    subject = tiny("sd")
    before = subject.denoiser.attn_processors
    tgate = apply_tgate(subject.pipe, CONFIG)
    name, layer = next((n, x) for n, x in attention_layers(subject.denoiser).items() if "attn2" in n)
    theirs = AttnProcessor()
    layer.set_processor(theirs)
    with pytest.warns(UserWarning, match=f"1 attention processors were replaced .* the first of them `{name}`"):
        tgate.remove()
    assert subject.denoiser.attn_processors == before | {name: theirs}


def test_a_processor_put_in_since_is_gated_at_the_next_run():
    subject = tiny("sd")
    seen = Observed(subject)
    tgate = apply_tgate(subject.pipe, CONFIG)
    subject.denoiser.set_attn_processor(AttnProcessor())
    subject(tgate)
    assert seen.computed["cross"] == 2 * 7
    layers = subject.denoiser.attn_processors.values()
    assert all(isinstance(layer, AttnProcessor) and isinstance(layer, GatedProcessor) for layer in layers)
    assert len(layers) == 14
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tgate.remove()
    assert {type(p) for p in subject.denoiser.attn_processors.values()} == {AttnProcessor}


def test_a_processor_that_diffusers_made_anew_loses_its_gate():
    """`load_ip_adapter` makes processors by `type(processor)()`."""
    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, CONFIG)
    subject.denoiser.set_attn_processor({n: type(p)() for n, p in subject.denoiser.attn_processors.items()})
    tgate.remove()
    assert not any("TGate" in type(p).__name__ for p in subject.denoiser.attn_processors.values())


def test_a_summary_before_a_run():
    summary = apply_tgate(tiny("sd").pipe, CONFIG).summary()
    assert str(summary).splitlines() == [
        "settings  gate_step=2, sp_interval=2",
        "run       none yet: run the pipeline, then ask",
    ]
    assert summary.batches == ()
    assert math.isnan(summary.macs_saved)
