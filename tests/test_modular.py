"""Modular pipelines: their loops call the denoiser as a guider asks, and have no callback."""

from functools import cached_property, lru_cache

import diffusers
import pytest
import torch
from seen import Seen
from tiny import fingerprint, left_behind
from zoo import STEPS, seeded
from zoo_modular import MODULAR, ONE_PICTURE_ONLY

from tgate_processors import ConfigError, TGateConfig, UnsupportedPipelineError, apply_tgate
from tgate_processors._pipelines import denoisers_of


# HeliosPyramid takes a number of steps for each of its stages
pytestmark = pytest.mark.filterwarnings("ignore:Unexpected input", "ignore:`gate_step` should be below the number")
GATE = 2
GUIDED = [name for name, entry in MODULAR.items() if entry.guiders]
STAGES = "HeliosPyramid"  # each a loop of its own, of one or two steps
HEUN = "StableDiffusionXL (Heun)"  # whose guider ends guidance in the middle of the run: it is told half of the steps
ALL_GUIDANCE = "LTX2 (all its guidance)"  # two calls more, which are kept
SDXL, WAN, QWEN = "StableDiffusionXL", "Wan", "QwenImage"


def tiny(name):
    return seeded(MODULAR[name].build)


def call(name, pictures=(0,), **settings):
    return MODULAR[name].call(list(pictures)) | settings


def gated(pipe, name, config, pictures=(0,), **settings):
    with apply_tgate(pipe, config) as tgate:
        return pipe(**call(name, pictures, **settings)), tgate


class Subject:
    """An entry's pipeline, and what its tests share: they leave no trace on it, which one of them checks."""

    def __init__(self, name):
        self.name = name
        self.pipe = tiny(name)

    @cached_property
    def stock(self):
        """The latents of the stock pipeline."""
        return self.pipe(**call(self.name))


@lru_cache(maxsize=1)
def subject(name):
    """The tests of one entry follow one another (`conftest.py`)."""
    return Subject(name)


@pytest.mark.parametrize("name", GUIDED)
def test_a_gate_that_never_closes_is_the_stock_pipeline_and_leaves_no_trace(name):
    pipe, stock = subject(name).pipe, subject(name).stock
    networks = denoisers_of(pipe)
    before = list(map(fingerprint, networks))
    assert torch.equal(gated(pipe, name, TGateConfig(gate_step=STEPS))[0], stock)
    changed, _ = gated(pipe, name, TGateConfig(gate_step=1))
    assert not torch.equal(changed, stock)
    if "QwenImage21" not in name:  # which leaves its positions anew in every run
        assert [left_behind(*pair) for pair in zip(before, networks, strict=True)] == [{}] * len(networks)
    assert torch.equal(pipe(**call(name)), stock)


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in (STAGES, HEUN, ALL_GUIDANCE)])
def test_calls_are_left_out(name):
    """Where guidance alone is left out, it is what diffusers' own guider does that stops there."""
    pipe = subject(name).pipe
    loops = 2 if "two chunks" in name else 1
    seen = list(map(Seen, denoisers_of(pipe)))
    latents, tgate = gated(pipe, name, TGateConfig(gate_step=GATE))
    for one in seen:
        one.stop()
    calls = 2 * GATE + (STEPS - GATE)
    second = len(seen) > 1 and bool(seen[1].batches)  # Wan 2.2's second network closes in its own first step
    assert sum(len(one.batches) for one in seen) == loops * (calls + (second and bool(seen[1].cross)))
    summary = tgate.summary()
    assert len(summary.evaluations) == calls + (second and bool(seen[1].cross))
    for one in seen:
        if one.cross and not second:
            assert one.computed["cross"] == loops * 2 * GATE * len(one.cross)
    if not any(one.cross for one in seen):
        assert torch.equal(latents, with_guiders_that_stop(name, pipe))


def with_guiders_that_stop(name, pipe):
    """The stock latents where guidance ends at `GATE`."""
    guiders = [getattr(pipe, guider) for guider in MODULAR[name].guiders]
    with pytest.MonkeyPatch.context() as patch:
        for guider in guiders:
            patch.setattr(guider, "_stop", GATE / STEPS)
        return pipe(**call(name))


@pytest.mark.parametrize("name", [SDXL, WAN, QWEN, "StableDiffusionXL (ControlNet)", "LTX2"])
def test_looks_and_an_interval(name):
    """Guidance begins in step 1; the gate is at 3, and steps 4 and 6 look again."""
    pipe = tiny(name)
    config = TGateConfig(gate_step=3, look_interval=2, guidance_start=1)
    seen = list(map(Seen, denoisers_of(pipe)))
    picture, _ = gated(pipe, name, config, num_inference_steps=8)
    for one in seen:
        one.stop()
    assert torch.isfinite(picture).all()
    assert sum(len(one.batches) for one in seen) == 1 + 2 * 2 + 1 + 2 + 1 + 2 + 1


@pytest.mark.parametrize("name", [name for name in GUIDED if name not in ONE_PICTURE_ONLY])
@pytest.mark.filterwarnings("ignore:.*another network begins:UserWarning")  # Wan 2.2's does, and looks after that
def test_a_batch_of_two_is_two_runs_of_one(name):
    pipe, config = subject(name).pipe, TGateConfig(gate_step=GATE, look_interval=2)
    both, one, other = (gated(pipe, name, config, pictures)[0] for pictures in ([0, 1], [0], [1]))
    torch.testing.assert_close(both, torch.cat([one, other]), rtol=1e-3, atol=5e-4)  # kernels differ by batch


@pytest.mark.parametrize("name", [name for name in MODULAR if name not in GUIDED])
def test_without_a_guider_there_is_nothing_to_leave_out(name):
    with pytest.raises(UnsupportedPipelineError, match="must have a guider, or a denoiser with cross-attention"):
        apply_tgate(tiny(name), TGateConfig(gate_step=GATE))


def test_a_guider_of_other_predictions_is_refused():
    """Its second call is no negative branch."""
    pipe = tiny(SDXL)
    pipe.update_components(guider=diffusers.guiders.PerturbedAttentionGuidance(perturbed_guidance_layers=[0]))
    with pytest.raises(ConfigError, match=r"`pipe.guider` must be a guider of two branches, .* PerturbedAttention"):
        apply_tgate(pipe, TGateConfig(gate_step=GATE))


def test_a_run_that_failed_leaves_nothing():
    pipe = tiny(SDXL)
    stock = pipe(**call(SDXL))
    expected, _ = gated(pipe, SDXL, TGateConfig(gate_step=GATE))
    forward, calls = pipe.unet.forward, []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 * GATE + 2:
            raise MemoryError
        return forward(*args, **kwargs)

    pipe.unet.forward = fails
    with apply_tgate(pipe, TGateConfig(gate_step=GATE)):
        with pytest.raises(MemoryError):
            pipe(**call(SDXL))
        del pipe.unet.forward
        assert torch.equal(pipe(**call(SDXL)), expected)
    assert torch.equal(pipe(**call(SDXL)), stock)
