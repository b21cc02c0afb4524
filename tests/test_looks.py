"""Looks: after the gate the text is looked at again, and guidance is kept between looks."""

import pytest
import torch
from every import CALLS, ONE_PICTURE_ONLY
from hypothesis import given
from hypothesis import strategies as st
from seen import Seen
from tiny import seeded, tiny
from torch.nn import functional
from zoo import ENTRIES, STEPS
from zoo import seeded as seeded_pipeline

from tgate_processors import ConfigError, TGateConfig, apply_tgate
from tgate_processors._folding import difference_of_halves, with_difference
from tgate_processors._kept import UNMEASURED, KeptGuidance
from tgate_processors._modes import Phase
from tgate_processors._pipelines import denoisers_of, takes_callback


LOOKS = TGateConfig(gate_step=2, look_interval=3)


def gated(subject, config=LOOKS, **changes):
    with apply_tgate(subject.pipe, config) as tgate:
        return subject(tgate, **changes), tgate


@pytest.mark.parametrize("first", [True, False])
def test_a_difference_gives_the_halves_back(first):
    output = (torch.randn(4, 3, 2, generator=seeded(0), dtype=torch.float64),)
    goes_on = output[0].chunk(2)[0 if first else 1]
    both = with_difference((goes_on,), difference_of_halves(output, first=first), first=first)
    assert torch.allclose(both[0], output[0], rtol=0, atol=1e-15)


# What is kept


def rows(*values):
    """A difference of two pictures of two numbers each."""
    return torch.tensor(values).reshape(2, 2)


def test_guidance_fades_as_it_was_seen_to_by_hand():
    kept = KeptGuidance()
    kept.note([rows(1.0, 1.0, 2.0, 0.0)], 4)
    assert torch.allclose(kept.at(6)[0], rows(1.0, 1.0, 2.0, 0.0) * UNMEASURED**2)
    kept.note([rows(0.5, 0.0, 2.0, 5.0)], 6)  # of the first picture a quarter is left in two steps, of the other all
    assert torch.allclose(kept.at(6)[0], rows(0.5, 0.0, 2.0, 5.0))
    assert torch.allclose(kept.at(7)[0], rows(0.25, 0.0, 2.0, 5.0))
    assert torch.allclose(kept.at(8)[0], rows(0.125, 0.0, 2.0, 5.0))
    kept.note([rows(-1.0, 0.0, 9.0, 5.0)], 7)  # it has turned, or grown
    assert torch.equal(kept.at(8)[0], rows(0.0, 0.0, 9.0, 5.0))


def test_a_second_evaluation_of_a_step_replaces_the_first():
    once, twice = KeptGuidance(), KeptGuidance()
    for kept in (once, twice):
        kept.note([rows(4.0, 0.0, 1.0, 1.0)], 0)
    twice.note([rows(9.0, 9.0, 9.0, 9.0)], 2)
    for kept in (once, twice):
        kept.note([rows(1.0, 0.0, 1.0, 0.0)], 2)
    assert torch.equal(once.at(3)[0], twice.at(3)[0])
    assert torch.equal(once.at(3)[0], rows(0.5, 0.0, 0.5**0.5, 0.0))


def test_nothing_is_kept_before_the_first_look():
    assert KeptGuidance().at(3) == []


def test_another_size_begins_anew():
    kept = KeptGuidance()
    kept.note([torch.ones(2, 4)], 0)
    kept.note([torch.ones(3, 4)], 1)
    assert torch.equal(kept.at(2)[0], torch.full((3, 4), UNMEASURED))


def test_a_learned_variance_is_not_compared():
    kept = KeptGuidance()
    kept.note([torch.tensor([[4.0, 7.0]])], 0, channels=1)
    kept.note([torch.tensor([[2.0, -9.0]])], 1, channels=1)
    assert torch.equal(kept.at(2)[0], torch.tensor([[1.0, -4.5]]))


@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.sampled_from([torch.float16, torch.float64]))
def test_what_is_kept_is_never_more_and_each_picture_has_its_own(seed, span, later, dtype):
    shape = (3, 4, 5)
    looks = [torch.randn(shape, generator=seeded(seed + i), dtype=torch.float64) * 1000 for i in range(2)]
    looks[1] += looks[0] * torch.tensor([-1.0, 0.0, 1.0])[:, None, None]
    looks[0][0] *= seed % 2  # nothing at all, now and then
    together, alone = KeptGuidance(), [KeptGuidance() for _ in range(3)]
    for step, look in ((0, looks[0].to(dtype)), (span, looks[1].to(dtype))):
        together.note([look], step)
        for kept, row in zip(alone, look.split(1), strict=True):
            kept.note([row], step)
    (left,) = together.at(span + later)
    assert left.dtype == dtype
    assert torch.isfinite(left).all()
    assert (left.abs() <= looks[1].to(dtype).abs()).all()
    singles = torch.cat([kept.at(span + later)[0] for kept in alone])
    assert torch.allclose(left, singles, rtol=1e-3, atol=1e-6)


def left_of(looks, step):
    """What is kept in a step, from the differences seen in looks, by their steps: worked out once more."""
    *_, before, last = sorted(look for look in looks if look <= step)
    first, now = looks[before], looks[last]
    ratio = (first * now).flatten(1).sum(1) / first.square().flatten(1).sum(1)
    ratio = ratio.clamp(0, 1) ** ((step - last) / (last - before))
    return now * ratio.reshape(-1, *[1] * (now.ndim - 1))


@pytest.mark.parametrize("steps", [7, 11])
def test_guidance_is_kept_and_fades(monkeypatch, steps):
    """Between looks the pipeline is given two halves, whose difference is that of the last look, fading."""
    subject = tiny("sd")
    differences = []
    with apply_tgate(subject.pipe, LOOKS) as tgate:
        call = type(subject.denoiser).__call__

        def seen(self, *args, **kwargs):
            output = call(self, *args, **kwargs)
            negative, positive = output[0].chunk(2)
            differences.append((tgate.gate.step, positive - negative))
            return output

        monkeypatch.setattr(type(subject.denoiser), "__call__", seen)
        subject(tgate, num_inference_steps=steps)
    looks = {step: difference for step, difference in differences if step in (0, 1, 4, 7, 10)}
    assert len(looks) == len({0, 1, 4, 7, 10} & set(range(steps)))
    for step, difference in differences[2:]:
        faded = left_of(looks, step)
        assert torch.allclose(difference, faded, rtol=0, atol=1e-5 * float(faded.abs().max()))
        assert float(faded.abs().max()) > 0


# In pipelines


def test_each_look_is_a_step_of_both_branches():
    subject = tiny("sd")
    batch = 2 * subject.kwargs()["prompt_embeds"].shape[0]
    _, tgate = gated(subject, num_inference_steps=7)
    summary = tgate.summary()
    assert summary.batches == tuple(batch if step in (0, 1, 4) else batch // 2 for step in range(7))
    assert summary.gate_closed_at == 2
    assert summary.cost.cross_computed * 4 == summary.cost.cross_reused * 3


def test_looks_bring_pictures_nearer():
    subject = tiny("sd")
    stock = subject(num_inference_steps=9)
    plain, _ = gated(subject, TGateConfig(gate_step=2), num_inference_steps=9)
    looking, _ = gated(subject, TGateConfig(gate_step=2, look_interval=2), num_inference_steps=9)
    assert functional.mse_loss(looking, stock) < functional.mse_loss(plain, stock) / 2


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha", "svd", "sd-inpaint"])
@pytest.mark.parametrize("branch", ["negative", "positive"])
def test_every_family_looks(family, branch):
    """Only the cached attention and the held guidance are not exact: with the gate never closing all is stock."""
    subject = tiny(family)
    stock = subject()
    config = TGateConfig(gate_step=1, look_interval=2, branch=branch)
    latents, tgate = gated(subject, config)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, stock)
    phases = [mode.phase for mode in tgate.summary().schedule.modes]
    assert phases[1] is Phase.FIDELITY
    assert phases[2] is Phase.PLANNING
    never, _ = gated(subject, TGateConfig(gate_step=99, look_interval=2))
    assert torch.equal(never, stock)
    assert torch.equal(subject(), stock)


def test_two_pictures_look_as_each_alone():
    subject = tiny("sd")
    embeds = {name: subject.kwargs()[name] for name in ("prompt_embeds", "negative_prompt_embeds", "latents")}
    other = {name: tensor.flip(-1) for name, tensor in embeds.items()}
    both = {name: torch.cat([embeds[name], other[name]]) for name in embeds}
    together, _ = gated(subject, **both)
    alone = torch.cat([gated(subject, **embeds)[0], gated(subject, **other)[0]])
    assert torch.allclose(together, alone, rtol=0, atol=1e-4)


def test_a_run_without_guidance_looks_at_its_text_alone():
    """It is told once that there is no guidance to keep."""
    subject = tiny("lcm-sdxl")
    with pytest.warns(
        UserWarning, match="`look_interval` should be None for a run that drops no guidance, got 2"
    ) as said:
        latents, tgate = gated(subject, TGateConfig(gate_step=1, look_interval=2))
    assert len(said) == 1
    assert len(set(tgate.summary().batches)) == 1
    assert not torch.equal(latents, subject())


def test_a_pipeline_that_does_no_guidance_is_refused():
    pipe = seeded_pipeline(ENTRIES["SanaSprintPipeline"].build)
    with pytest.raises(
        ConfigError, match="`look_interval` must be None for SanaSprintPipeline, which does no guidance that could be"
    ):
        apply_tgate(pipe, LOOKS)
    apply_tgate(pipe, TGateConfig(gate_step=2)).remove()


# Branches that are calls

OFTEN = TGateConfig(gate_step=1, look_interval=2)
TWO_DENOISERS = "WanPipeline (two denoisers)"


def run(name, config=None, pictures=(0,)):
    """The latents, the batches that reached the denoisers, and the handle, removed."""
    pipe = seeded_pipeline(ENTRIES[name].build)
    kwargs = ENTRIES[name].call(list(pictures))
    if config is None:
        return pipe(**kwargs)[0], None, None
    seen = list(map(Seen, denoisers_of(pipe)))
    with apply_tgate(pipe, config) as tgate:
        if takes_callback(pipe):
            kwargs["callback_on_step_end"] = tgate
        latents = pipe(**kwargs)[0]
    return latents, [one.batches for one in seen], tgate


@pytest.mark.parametrize("name", CALLS)
def test_a_look_is_a_step_of_all_calls(name):
    stock, *_ = run(name)
    latents, batches, tgate = run(name, OFTEN)
    if name == TWO_DENOISERS:
        assert list(map(len, batches)) == [3, 3]  # both branches at its look or in its first step, then one
    else:
        assert len(batches[0]) == sum(1 if step % 2 else 2 for step in range(STEPS))
    assert len(tgate.summary().batches) == sum(map(len, batches))
    assert torch.isfinite(latents).all()
    dropped, *_ = run(name, TGateConfig(gate_step=1))
    assert functional.mse_loss(latents, stock) < functional.mse_loss(dropped, stock)
    never, *_ = run(name, TGateConfig(gate_step=99, look_interval=2))
    assert torch.equal(never, stock)


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ONE_PICTURE_ONLY])
def test_two_pictures_look_as_each_alone_in_calls(name):
    both, one, other = (run(name, OFTEN, pictures)[0] for pictures in ([0, 1], [0], [1]))
    torch.testing.assert_close(both, torch.cat([one, other]), rtol=1e-3, atol=2e-4)  # kernels differ by batch


def test_a_call_that_is_left_out_is_answered_with_what_is_kept(monkeypatch):
    pipe = seeded_pipeline(ENTRIES["WanPipeline"].build)
    outputs = {}
    with apply_tgate(pipe, TGateConfig(gate_step=2, look_interval=3)) as tgate:
        call = type(pipe.transformer).__call__

        def seen(self, *args, **kwargs):
            step = tgate.gate.step
            output = call(self, *args, **kwargs)
            outputs.setdefault(step, []).append(output[0])
            return output

        monkeypatch.setattr(type(pipe.transformer), "__call__", seen)
        kwargs = ENTRIES["WanPipeline"].call([0]) | {"num_inference_steps": 7, "callback_on_step_end": tgate}
        pipe(**kwargs)
    differences = {step: other - one for step, (one, other) in outputs.items()}
    looks = {step: differences[step] for step in (0, 1, 4)}
    for step in (2, 3, 5, 6):
        faded = left_of(looks, step)
        assert torch.allclose(differences[step], faded, rtol=0, atol=1e-5 * float(outputs[step][0].abs().max()))
        assert float(faded.abs().max()) > 0
