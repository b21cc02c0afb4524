"""Every pipeline class that is known, at toy size: equal to stock where it must be, counted where it is gated."""

import inspect
import warnings
from collections import Counter
from contextlib import contextmanager
from functools import cached_property, lru_cache

import diffusers
import pipelines_page
import pytest
import torch
from at_hand import IS_OLDER, class_named
from every import ALONE, GATED, NOT_GATED, ONE_PICTURE_ONLY
from seen import Seen
from tiny import fingerprint, left_behind
from zoo import ENTRIES, STEPS, class_of, seeded

from tgate_processors import TGateConfig, UnsupportedPipelineError, apply_tgate
from tgate_processors._families import FAMILIES, REFUSED, Guidance
from tgate_processors._installation import is_gated
from tgate_processors._layers import attention_layers, cross_attention_layers
from tgate_processors._pipelines import denoisers_of, side_networks_of, takes_callback


# diffusers' own, of the parts that it has deprecated, and of the CPU
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "In CPU autocast",
        "Initializing zero-element tensors",
        "`LoraLoaderMixin` is deprecated",
        "`Transformer2DModelOutput` is deprecated",
        "`FluxPosEmbed",
    )
]
GATE = 2
of_the_newest = pytest.mark.skipif(IS_OLDER, reason="the tables are of the newest diffusers")
every_pipeline = pytest.mark.parametrize("name", GATED)


def run(name, pipe, config=None, pictures=(0,), **changes):
    """The latents of some pictures, gated where there is a configuration, and the handle, removed."""
    kwargs = ENTRIES[name].call(list(pictures)) | changes
    if config is None:
        return pipe(**kwargs)[0], None
    with apply_tgate(pipe, config) as tgate, no_warning_of_guidance():
        if takes_callback(pipe):
            kwargs["callback_on_step_end"] = tgate
        return pipe(**kwargs)[0], tgate


@contextmanager
def no_warning_of_guidance():
    """Entries without guidance are told that nothing can be left out of them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`pipe` should do guidance")
        yield


class Subject:
    """An entry's pipeline, and what its tests share: they leave no trace on it, which one of them checks."""

    def __init__(self, name):
        self.name = name
        self.pipe = seeded(ENTRIES[name].build)
        self.denoisers = denoisers_of(self.pipe)
        self.networks = [*self.denoisers, *side_networks_of(self.pipe)]

    @cached_property
    def stock(self):
        """The latents of the stock pipeline."""
        return run(self.name, self.pipe)[0]

    @cached_property
    def gated(self):
        """The latents with a gate at `GATE`, the handle, and what the networks were seen to do."""
        seen = list(map(Seen, self.networks))
        latents, tgate = run(self.name, self.pipe, TGateConfig(gate_step=GATE))
        for one in seen:
            one.stop()
        return latents, tgate, seen


@lru_cache(maxsize=1)
def subject(name):
    """The tests of one entry follow one another (`conftest.py`)."""
    return Subject(name)


@of_the_newest
def test_every_family_is_here():
    assert {class_of(name) for name in GATED} == FAMILIES.keys()
    assert len(FAMILIES) >= 160


@of_the_newest
def test_every_class_of_diffusers_is_known():
    pipelines = {
        name
        for name, cls in inspect.getmembers(diffusers, inspect.isclass)
        if issubclass(cls, diffusers.DiffusionPipeline) and cls is not diffusers.DiffusionPipeline
    }
    assert pipelines - FAMILIES.keys() - REFUSED.keys() == set()
    assert FAMILIES.keys() & REFUSED.keys() == set()


SELF_TOO = {"sp_interval": 2, "fi_interval": 2}


def is_alone(pipe):
    """Whether guidance alone can be left out."""
    return not any(map(cross_attention_layers, denoisers_of(pipe)))


def is_without_guidance(name, pipe):
    """Whether an entry leaves nothing to leave out."""
    return is_alone(pipe) and ENTRIES[name].branches == 1


# What the stock pipelines leave on their denoiser, a new one in every run.
LEAVE_A_TRACE = {
    "QwenImage21Pipeline",  # positions
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",  # a perturbing processor
    "StableDiffusionXLPAGInpaintPipeline",
}


@every_pipeline
def test_a_gate_that_never_closes_is_the_stock_pipeline_and_leaves_no_trace(name):
    pipe, networks = subject(name).pipe, subject(name).networks
    stock = subject(name).stock  # diffusers leaves a registry of its hooks on some denoisers at their first run
    before = list(map(fingerprint, networks))
    assert torch.equal(run(name, pipe, TGateConfig(gate_step=STEPS))[0], stock)
    gated, _ = run(name, pipe, TGateConfig(gate_step=1) if is_alone(pipe) else TGateConfig(gate_step=1, **SELF_TOO))
    if is_without_guidance(name, pipe):
        assert torch.equal(gated, stock)
    else:
        assert not torch.allclose(gated, stock, atol=1e-4)
    if class_of(name) not in LEAVE_A_TRACE:
        assert [left_behind(*pair) for pair in zip(before, networks, strict=True)] == [{}] * len(networks)
    assert not any(map(is_gated, networks))
    assert torch.equal(run(name, pipe)[0], stock)


def expected_batches(name):
    """Of the denoiser, gated after `GATE` of `STEPS` steps."""
    branches, closed = ENTRIES[name].branches, STEPS - GATE
    guidance = FAMILIES[class_of(name)].guidance
    if name == "SemanticStableDiffusionPipeline (without edits)":
        return [branches] * STEPS  # they are taken for two of its parts
    if guidance is Guidance.CALLS:
        return [1] * (branches * GATE + closed)
    if guidance is Guidance.HALVES_THEN_CALLS:
        calls = [1] * (branches - 2)
        return [min(2, branches), *calls] * GATE + [1, *calls] * closed
    return [branches] * GATE + [1 if branches == 2 else branches] * closed


TWO_DENOISERS = "WanPipeline (two denoisers)"
OTHER_LOOPS = {
    "AmusedImg2ImgPipeline",  # begins with its second step
    "ChronoEditPipeline (fewer frames from the third step on)",  # so that nothing stored fits
    "Cosmos2_5_TransferPipeline (two chunks)",  # a loop for each
    "GlmImagePipeline (edit)",  # evaluates its pictures before the loop
    "HeliosPipeline (two chunks)",
    "HunyuanVideoFramepackPipeline (two parts)",
    "KandinskyPriorPipeline",  # two rows for each branch
    "KandinskyV22PriorEmb2EmbPipeline",
    "KandinskyV22PriorPipeline",
    "LucyEditPipeline (two denoisers)",
    "ShapEImg2ImgPipeline",  # Heun's sampler
    "ShapEPipeline",
    "WanAnimatePipeline (two segments)",
    TWO_DENOISERS,
}
# What cannot be run on the meta device, and is not counted.
NOT_COUNTED = {
    "Cosmos3OmniPipeline",
    "ErnieImagePipeline",
    "GlmImagePipeline",
    "HeliosPipeline",
    "HiDreamImagePipeline",
    "HunyuanImagePipeline",
    "HunyuanVideo15ImageToVideoPipeline",
    "HunyuanVideo15Pipeline",
    "HunyuanVideoFramepackPipeline",
    "Lumina2Pipeline",
    "MochiPipeline",
    "NucleusMoEImagePipeline",
    "OmniGenPipeline",
    "QwenImage21Pipeline",
    "SanaWMPipeline",
    "ZImageControlNetInpaintPipeline",
    "ZImageControlNetPipeline",
}


def kind_of(name):
    """The networks of an entry, by the annotations of its class, and how they are evaluated."""
    parameters = inspect.signature(getattr(diffusers, class_of(name)).__init__).parameters.values()
    names = ("adapter", "controlnet", "motion", "prior", "transformer", "unet")
    networks = [str(parameter) for parameter in parameters if parameter.name.startswith(names)]
    return *networks, ENTRIES[name].branches, FAMILIES[class_of(name)].guidance


LOOPS = [name for name in GATED if name not in OTHER_LOOPS]
COUNTED = set({kind_of(name): name for name in reversed(LOOPS)}.values())


@pytest.mark.parametrize("name", LOOPS)
def test_evaluations_and_attention_calls(name):
    """The arithmetic, which takes longest to count, is counted for one entry of each kind."""
    pipe = subject(name).pipe
    _, tgate, seen = subject(name).gated
    of_denoisers = seen[: len(subject(name).denoisers)]
    assert [batch for one in of_denoisers for batch in one.batches] == expected_batches(name)
    summary = tgate.summary()
    assert summary.batches == tuple(expected_batches(name))
    assert summary.gate_closed_at == GATE
    assert tgate.gate.cache_bytes == 0
    if name in COUNTED:
        assert bool(summary.notes) == (class_of(name) in NOT_COUNTED), summary.notes
        if not summary.notes:
            assert (summary.macs_saved > 0) != is_without_guidance(name, pipe)
            assert ("guidance alone is left out" in str(summary)) == is_alone(pipe)
    if class_of(name) in NOT_COUNTED or is_alone(pipe):
        return
    if name in COUNTED:
        computed = sum((one.computed for one in seen), Counter())
        assert summary.cost.cross_computed == computed["cross"]
        assert summary.cost.self_computed == computed["self"]
    for one in seen:
        before_the_gate = len(one.batches) - (STEPS - GATE)
        assert one.computed["cross"] == len(one.cross) * before_the_gate
        assert one.computed["self"] == one.num_self * len(one.batches)


def of_twice_the_steps(name):
    """What changes in a call so that `STEPS` are run of twice as many."""
    noise = torch.linspace(0.8, 0.1, 2 * STEPS)
    changes = {"num_inference_steps": 2 * STEPS, "sigmas": noise.tolist(), "timesteps": (1000 * noise).tolist()}
    if name == "LatentConsistencyModelImg2ImgPipeline":  # runs all, all of them from the middle on
        changes = {}
    return {key: value for key, value in changes.items() if key in ENTRIES[name].call([0])} | {"strength": 0.5}


@pytest.mark.parametrize("name", [name for name in GATED if "strength" in ENTRIES[name].call([0])])
def test_a_loop_that_begins_in_the_middle_is_counted_as_it_is_run(name):
    _, tgate = run(name, subject(name).pipe, TGateConfig(gate_step=GATE / STEPS), **of_twice_the_steps(name))
    assert tgate.summary().gate_closed_at == GATE
    assert len(tgate.summary().batches) == len(expected_batches(name))


@pytest.mark.parametrize("name", [name for name in GATED if not {name, class_of(name)} & ONE_PICTURE_ONLY])
def test_a_batch_of_two_is_two_runs_of_one(name):
    pipe, one = subject(name).pipe, subject(name).gated[0]
    both, other = (run(name, pipe, TGateConfig(gate_step=GATE), pictures)[0] for pictures in ([0, 1], [1]))
    torch.testing.assert_close(both, torch.cat([one, other]), rtol=1e-3, atol=2e-4)  # kernels differ by batch


def test_the_second_of_two_denoisers_closes_in_its_own_first_step():
    """Wan 2.2 changes to another denoiser on the way; that one has nothing stored when the gate has closed."""
    _, tgate, (first, second) = subject(TWO_DENOISERS).gated
    assert len(first.batches) == 2 * GATE
    assert len(second.batches) == 2 + 1
    assert first.computed["cross"] == 2 * GATE * len(first.cross)
    assert second.computed["cross"] == 2 * len(second.cross)
    assert tgate.summary().batches == (1,) * 7


@pytest.mark.parametrize("name", REFUSED)
def test_a_class_with_nothing_to_leave_out_is_refused(name):
    cls = class_named(name)
    pipe = cls.__new__(cls)
    with pytest.raises(UnsupportedPipelineError, match=f"got {name}: it|got {name}: its"):
        apply_tgate(pipe, TGateConfig(gate_step=GATE))


@pytest.mark.filterwarnings("ignore")  # theirs: some are deprecated, or use what is
@pytest.mark.parametrize("name", NOT_GATED)
def test_what_is_refused_runs_as_before(name):
    pipe = seeded(ENTRIES[name].build)
    networks = [component for component in pipe.components.values() if isinstance(component, torch.nn.Module)]
    before = list(map(fingerprint, networks))
    with pytest.raises(UnsupportedPipelineError, match=f"got {class_of(name)}: it"):
        apply_tgate(pipe, TGateConfig(gate_step=GATE))
    assert [left_behind(*pair) for pair in zip(before, networks, strict=True)] == [{}] * len(networks)
    assert pipe(**ENTRIES[name].call([0])) is not None


# Classes that have no loop to run, or do not run at all.
NOT_RUN = {
    "FluxPriorReduxPipeline",
    "LTX2LatentUpsamplePipeline",
    "LTX2VideoDiffusionDecodePipeline",
    "LTXLatentUpsamplePipeline",
    "SanaWMLTX2Refiner",
    "VersatileDiffusionDualGuidedPipeline",
    "VersatileDiffusionPipeline",
}


@of_the_newest
def test_every_refused_class_is_run():
    assert {class_of(name) for name in NOT_GATED} == REFUSED.keys() - NOT_RUN


@of_the_newest
def test_the_page_is_what_the_tests_know():
    """Written again by `python tests/pipelines_page.py`."""
    assert pipelines_page.PAGE.read_text() == pipelines_page.page()


def with_the_positive_branch_alone(name, pipe):
    """The stock pipeline's latents where from the gate on both branches are answered with what the positive one is."""
    denoiser = denoisers_of(pipe)[0]
    forward, branches = denoiser.forward, ENTRIES[name].branches
    guidance = FAMILIES[class_of(name)].guidance
    calls = {Guidance.CALLS: branches, Guidance.HALVES_THEN_CALLS: branches - 1}.get(guidance, 1)
    outputs = []

    def answer(*args, **kwargs):
        step, call = divmod(len(outputs), calls)
        outputs.append(forward(*args, **kwargs))
        if step < GATE:
            return outputs[-1]
        if guidance is Guidance.CALLS:
            return outputs[step * calls]
        return outputs[-1] if call else _both(outputs[-1], guidance)

    denoiser.forward = answer
    try:
        return run(name, pipe)[0]
    finally:
        del denoiser.forward


def _both(value, guidance):
    """The positive half twice, of each batch in an output."""
    if isinstance(value, torch.Tensor | list):
        half = len(value) // 2
        first, second = value[:half], value[half:]
        positive = second if guidance in (Guidance.HALVES, Guidance.HALVES_THEN_CALLS) else first
        return positive + positive if isinstance(value, list) else torch.cat([positive, positive])
    if isinstance(value, tuple):
        return tuple(_both(item, guidance) for item in value)
    return type(value)(**{key: _both(item, guidance) for key, item in value.items()})


@pytest.mark.parametrize(
    "name",
    # those that are truncated drop guidance by themselves
    [name for name in ALONE if name not in OTHER_LOOPS and ENTRIES[name].branches > 1 and "truncated" not in name],
)
def test_guidance_alone_is_the_positive_branch_in_the_place_of_both(name):
    expected = with_the_positive_branch_alone(name, subject(name).pipe)
    gated = subject(name).gated[0]
    torch.testing.assert_close(gated, expected, rtol=1e-3, atol=2e-4)  # kernels differ by batch
    assert not torch.allclose(gated, subject(name).stock, rtol=1e-3, atol=2e-4)


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
