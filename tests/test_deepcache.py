"""Beside DeepCache: a full step exactly where the batch or what is stored changes, and no trace afterwards."""

import sys

import pytest
import torch
from tiny import Observed, fingerprint, num_layers, tiny, widen

from tgate_processors import (
    ConfigError,
    MissingPackageError,
    StateError,
    TGateConfig,
    TgateSDDeepCacheLoader,
    apply_tgate,
)
from tgate_processors import _deepcache as deepcache


STEPS = 8


def expected_full_steps(gate_step, interval, *, guided=True):
    """DeepCache's own, begun anew where the gate closes (stored features) and where the batch changes."""
    full, since = [], 0
    for step in range(STEPS):
        closes = step == gate_step - 1 and gate_step < STEPS
        if closes or (guided and step == gate_step):
            since = 0
        full.append(since % interval == 0)
        since += 1
    return full


@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("interval", [2, 3, 5])
@pytest.mark.parametrize("gate_step", range(1, STEPS + 1))
def test_full_steps(gate_step, interval, pictures):
    subject = tiny("sd")
    batch = {k: widen(v, pictures) for k, v in subject.kwargs().items() if isinstance(v, torch.Tensor)}
    seen = Observed(subject)
    cross_layers, _ = num_layers("sd")
    helper = deepcache.make_helper(subject.pipe, interval, 0)
    with (
        deepcache.enabled(helper),
        apply_tgate(subject.pipe, TGateConfig(gate_step=gate_step), deepcache=helper) as tgate,
    ):
        subject(tgate, num_inference_steps=STEPS, **batch)
        summary = tgate.summary()
        assert not helper.cached_output
    full = expected_full_steps(gate_step, interval)
    assert [not evaluation.shallow for evaluation in summary.evaluations] == full
    assert seen.batches == [2 * pictures] * gate_step + [pictures] * (STEPS - gate_step)
    # a shallow step of branch 0 evaluates one cross-attention layer
    assert seen.computed["cross"] == sum(cross_layers if now else 1 for now in full[:gate_step])
    if interval == 3 and pictures == 1:  # counting takes longest
        assert summary.cost.cross_computed == seen.computed["cross"]
        assert summary.cost.self_computed == seen.computed["self"]


@pytest.mark.parametrize("interval", [2, 3])
@pytest.mark.parametrize("gate_step", [1, 2, 3, 5])
def test_without_guidance_the_batch_does_not_change(gate_step, interval):
    subject = tiny("sd")
    helper = deepcache.make_helper(subject.pipe, interval, 0)
    with (
        deepcache.enabled(helper),
        apply_tgate(subject.pipe, TGateConfig(gate_step=gate_step), deepcache=helper) as tgate,
    ):
        subject(tgate, num_inference_steps=STEPS, guidance_scale=1.0)
        full = [not evaluation.shallow for evaluation in tgate.summary().evaluations]
    assert full == expected_full_steps(gate_step, interval, guided=False)


@pytest.mark.parametrize("gate_step", [1, 3, STEPS])
def test_every_picture_of_a_batch_is_its_own_run(gate_step):
    def run(**inputs):
        subject = tiny("sd")
        pipe = TgateSDDeepCacheLoader(
            subject.pipe, cache_interval=3, num_inference_steps=STEPS + 1, gate_step=gate_step
        )
        return pipe.tgate(**subject.kwargs(num_inference_steps=STEPS + 1, **inputs)).images

    batch = {k: widen(v) for k, v in tiny("sd").kwargs().items() if isinstance(v, torch.Tensor)}
    for i, picture in enumerate(run(**batch)):
        alone = run(**{k: v[i : i + 1] for k, v in batch.items()})
        torch.testing.assert_close(picture, alone[0], rtol=1e-4, atol=3e-5)  # kernels differ by batch: 1.5e-5 on AVX2


def test_a_gate_that_never_closes_is_deepcache_alone():
    subject = tiny("sd")
    helper = deepcache.make_helper(subject.pipe, 3, 0)
    with deepcache.enabled(helper):
        alone = subject()
    with deepcache.enabled(helper), apply_tgate(subject.pipe, TGateConfig(gate_step=12), deepcache=helper) as tgate:
        assert torch.equal(subject(tgate), alone)


def test_self_attention_intervals_that_meet_a_layer_for_the_first_time():
    """In step 1 self-attention stores, but DeepCache skips; in step 2 the deep layers have nothing to reuse yet."""
    subject = tiny("sd")
    helper = deepcache.make_helper(subject.pipe, 2, 0)
    config = TGateConfig(gate_step=6, sp_interval=4, warm_up=1)
    with deepcache.enabled(helper), apply_tgate(subject.pipe, config, deepcache=helper) as tgate:
        assert subject(tgate).isfinite().all()


def test_enabling_leaves_no_trace_even_when_the_run_raises():
    subject = tiny("sd")
    before = fingerprint(subject.denoiser)
    pipe = TgateSDDeepCacheLoader(subject.pipe)

    def fails(*_):
        raise MemoryError

    with pytest.raises(MemoryError):
        pipe.tgate(**subject.kwargs(), gate_step=3, callback_on_step_end=fails)
    assert fingerprint(subject.denoiser) == before


def test_a_helper_that_the_user_enabled_must_be_named():
    subject = tiny("sd")
    helper = deepcache.make_helper(subject.pipe, 3, 0)
    helper.enable()
    with pytest.raises(
        StateError, match=r"Pass `apply_tgate\(pipe, config, deepcache=helper\)`, or call `helper.disable"
    ):
        apply_tgate(subject.pipe, TGateConfig(gate_step=2))
    with pytest.raises(StateError, match="`deepcache` must be the helper that is enabled on the pipeline, got None"):
        TgateSDDeepCacheLoader(subject.pipe)
    with pytest.raises(StateError, match="must not have DeepCache enabled already"), deepcache.enabled(helper):
        pass
    assert not hasattr(subject.pipe, "tgate")


@pytest.mark.parametrize(("name", "value", "least"), [("cache_interval", 0, 1), ("cache_branch_id", -1, 0)])
def test_bad_parameters(name, value, least):
    pipe = tiny("sd").pipe
    with pytest.raises(ConfigError, match=f"`{name}` must be a whole number of at least {least}, got {value}"):
        TgateSDDeepCacheLoader(pipe, **{name: value})
    assert not hasattr(pipe, "tgate")


def test_a_missing_package(monkeypatch):
    pipe = tiny("sd").pipe
    monkeypatch.setitem(sys.modules, "DeepCache", None)
    with pytest.raises(MissingPackageError, match=r"Run `pip install 'tgate-processors\[deepcache\]'`"):
        TgateSDDeepCacheLoader(pipe)
    assert not hasattr(pipe, "tgate")
