"""Every pipeline class that is known, at toy size: equal to stock where it must be, counted where it is gated."""

from collections import Counter
from functools import cache

import diffusers
import pipelines_page
import pytest
import torch
import zoo_motion
import zoo_transformers
from packaging.version import Version
from seen import Seen
from tiny import fingerprint, left_behind
from zoo import ENTRIES, STEPS, class_of, seeded

from tgate_processors import TGateConfig, UnsupportedPipelineError, apply_tgate
from tgate_processors._installation import is_gated
from tgate_processors._layers import attention_layers, cross_attention_layers
from tgate_processors._pipelines import FAMILIES, REFUSED, Guidance, denoisers_of, side_networks_of, takes_callback


GATE = 2
every_pipeline = pytest.mark.parametrize("name", ENTRIES)


def run(name, pipe, config=None, pictures=(0,)):
    """The latents of some pictures, gated where there is a configuration, and the handle, removed."""
    kwargs = ENTRIES[name].call(list(pictures))
    if config is None:
        return pipe(**kwargs)[0], None
    with apply_tgate(pipe, config) as tgate:
        if takes_callback(pipe):
            kwargs["callback_on_step_end"] = tgate
        return pipe(**kwargs)[0], tgate


@cache
def stock(name):
    return run(name, seeded(ENTRIES[name].build))[0]


def test_every_family_is_here():
    assert {class_of(name) for name in ENTRIES} == FAMILIES.keys()
    assert len(FAMILIES) >= 50


# The stock pipelines leave their perturbing processor on the layer, a new one after every run.
LEAVE_A_PROCESSOR = {"StableDiffusionXLPAGInpaintPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline"}


@every_pipeline
def test_a_gate_that_never_closes_is_the_stock_pipeline_and_leaves_no_trace(name):
    pipe = seeded(ENTRIES[name].build)
    networks = [*denoisers_of(pipe), *side_networks_of(pipe)]
    run(name, pipe)  # diffusers leaves a registry of its hooks on some denoisers at their first run
    before = list(map(fingerprint, networks))
    assert torch.equal(run(name, pipe, TGateConfig(gate_step=STEPS))[0], stock(name))
    gated, _ = run(name, pipe, TGateConfig(gate_step=1, sp_interval=2, fi_interval=2))
    assert not torch.allclose(gated, stock(name), atol=1e-4)
    if name not in LEAVE_A_PROCESSOR:
        assert [left_behind(*pair) for pair in zip(before, networks, strict=True)] == [{}] * len(networks)
    assert not any(map(is_gated, networks))
    assert torch.equal(run(name, pipe)[0], stock(name))


def expected_batches(name):
    """Of the denoiser, gated after `GATE` of `STEPS` steps."""
    branches, closed = ENTRIES[name].branches, STEPS - GATE
    if FAMILIES[class_of(name)].guidance is Guidance.CALLS:
        return [1] * (branches * GATE + closed)
    return [branches] * GATE + [1 if branches == 2 else branches] * closed


TWO_DENOISERS = "WanPipeline (two denoisers)"


@pytest.mark.parametrize("name", [name for name in ENTRIES if name != TWO_DENOISERS])
def test_evaluations_and_attention_calls(name):
    pipe = seeded(ENTRIES[name].build)
    denoisers, side_networks = denoisers_of(pipe), list(side_networks_of(pipe))
    seen = list(map(Seen, [*denoisers, *side_networks]))
    _, tgate = run(name, pipe, TGateConfig(gate_step=GATE))
    for one in seen:
        one.stop()

    assert [batch for one in seen[: len(denoisers)] for batch in one.batches] == expected_batches(name)
    summary = tgate.summary()
    assert summary.batches == tuple(expected_batches(name))
    assert summary.gate_closed_at == GATE
    computed = sum((one.computed for one in seen), Counter())
    assert summary.cost.cross_computed == computed["cross"]
    assert summary.cost.self_computed == computed["self"]
    assert summary.macs_saved > 0
    for one in seen:
        before_the_gate = len(one.batches) - (STEPS - GATE)
        assert one.computed["cross"] == len(one.cross) * before_the_gate
        assert one.computed["self"] == one.num_self * len(one.batches)
    assert tgate.gate.cache_bytes == 0


@pytest.mark.parametrize(
    "name", [name for name in ENTRIES if name not in zoo_motion.ONE_PICTURE_ONLY | zoo_transformers.ONE_PICTURE_ONLY]
)
def test_a_batch_of_two_is_two_runs_of_one(name):
    pipe, config = seeded(ENTRIES[name].build), TGateConfig(gate_step=GATE)
    both, one, other = (run(name, pipe, config, pictures)[0] for pictures in ([0, 1], [0], [1]))
    torch.testing.assert_close(both, torch.cat([one, other]), rtol=1e-3, atol=2e-4)  # kernels differ by batch


def test_the_second_of_two_denoisers_closes_in_its_own_first_step():
    """Wan 2.2 changes to another denoiser on the way; that one has nothing stored when the gate has closed."""
    pipe = seeded(ENTRIES[TWO_DENOISERS].build)
    seen = list(map(Seen, denoisers_of(pipe)))
    _, tgate = run(TWO_DENOISERS, pipe, TGateConfig(gate_step=GATE))
    first, second = seen
    assert len(first.batches) == 2 * GATE
    assert len(second.batches) == 2 + 1
    assert first.computed["cross"] == 2 * GATE * len(first.cross)
    assert second.computed["cross"] == 2 * len(second.cross)
    assert tgate.summary().batches == (1,) * 7


@pytest.mark.parametrize("name", REFUSED)
def test_a_loop_that_cannot_be_gated_is_refused(name):
    """By its class alone: these are not run."""
    cls = getattr(diffusers, name)
    pipe = cls.__new__(cls)
    with pytest.raises(UnsupportedPipelineError, match=f"got {name}: it|got {name}: its"):
        apply_tgate(pipe, TGateConfig(gate_step=GATE))


@pytest.mark.skipif(Version(diffusers.__version__) < Version("0.42"), reason="the page is of diffusers 0.42")
def test_the_page_is_what_the_tests_know():
    """Written again by `python tests/pipelines_page.py`; building it refuses every denoiser that it lists."""
    assert pipelines_page.PAGE.read_text() == pipelines_page.page()


def inputs_of(module, kwargs_name="encoder_hidden_states"):
    """What a denoiser's calls are given as text, in order, and the hook that sees it."""
    given = []

    def look(module, args, kwargs):
        given.append(kwargs[kwargs_name] if kwargs_name in kwargs else args[2])

    return given, module.register_forward_pre_hook(look, with_kwargs=True)


@pytest.mark.parametrize(
    "name",
    ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtSigmaPipeline", "SanaPipeline", "LuminaPipeline"],
)
@pytest.mark.parametrize("branch", ["negative", "positive"])
def test_the_branch_that_goes_on(name, branch):
    """Whichever half it is in: Lumina's batch begins with the positive one."""
    pipe = seeded(ENTRIES[name].build)
    given, hook = inputs_of(denoisers_of(pipe)[0])
    run(name, pipe, TGateConfig(gate_step=GATE, branch=branch))
    hook.remove()
    embeds = ENTRIES[name].call([0])["prompt_embeds" if branch == "positive" else "negative_prompt_embeds"]
    assert [len(text) for text in given] == [2] * GATE + [1] * (STEPS - GATE)
    assert all(torch.equal(text, embeds) for text in given[GATE:])


def outputs_of(layer):
    """The outputs of an attention layer, in order, and the hook that sees them."""
    outputs = []
    return outputs, layer.register_forward_hook(lambda *args: outputs.append(args[-1]))


def test_branches_that_are_calls_have_caches_of_their_own():
    """Before the gate each call reuses what it stored itself; from the gate on there is the mean over the calls."""
    name = "WanPipeline"
    pipe = seeded(ENTRIES[name].build)
    *_, cross = cross_attention_layers(pipe.transformer).values()  # the first would not have met the text yet
    *_, own = (layer for layer in attention_layers(pipe.transformer).values() if not layer.is_cross_attention)
    (of_self, hook), (of_cross, other_hook) = outputs_of(own), outputs_of(cross)
    run(name, pipe, TGateConfig(gate_step=3, sp_interval=2))  # of 4 steps: compute, reuse, close, fidelity
    hook.remove()
    other_hook.remove()
    assert len(of_self) == len(of_cross) == 2 * 3 + 1
    assert torch.equal(of_self[2], of_self[0])
    assert torch.equal(of_self[3], of_self[1])
    assert not torch.equal(of_self[0], of_self[1])
    assert torch.equal(of_cross[6], (of_cross[4] + of_cross[5]) / 2)
