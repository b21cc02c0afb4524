"""Looks: after the gate the text is looked at again, and guidance is kept between looks."""

import pytest
import torch
import zoo_transformers  # noqa: F401  # its pipelines register themselves
from tiny import seeded, tiny
from torch.nn import functional
from zoo import ENTRIES
from zoo import seeded as seeded_pipeline

from tgate_processors import ConfigError, TGateConfig, apply_tgate
from tgate_processors._folding import difference_of_halves, with_difference
from tgate_processors._guidance import FADING
from tgate_processors._modes import Phase


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


def test_guidance_is_kept_and_fades(monkeypatch):
    """Between looks the pipeline is given two halves, whose difference is that of the last look, fading."""
    subject = tiny("sd")
    steps = 7
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
        modes = LOOKS.schedule(steps).modes
    looks = [step for step, mode in enumerate(modes) if mode.cross_attention.stores]
    assert looks == [1, 4]
    for step, difference in differences[2:]:
        last = max(look for look in looks if look <= step)
        faded = differences[last][1] * FADING ** ((step - last) * 25 / steps)
        assert torch.allclose(difference, faded, rtol=0, atol=1e-5 * float(faded.abs().max()))
        assert float(faded.abs().max()) > 0


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
    subject = tiny("lcm-sdxl")
    latents, tgate = gated(subject, TGateConfig(gate_step=1, look_interval=2))
    assert len(set(tgate.summary().batches)) == 1
    assert not torch.equal(latents, subject())


def test_pipelines_that_call_for_each_branch_are_refused():
    pipe = seeded_pipeline(ENTRIES["WanPipeline"].build)
    with pytest.raises(
        ConfigError, match="`look_interval` must be None for WanPipeline, which calls its denoiser for"
    ):
        apply_tgate(pipe, LOOKS)
    apply_tgate(pipe, TGateConfig(gate_step=2)).remove()
