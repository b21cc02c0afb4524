"""What people really do around a gated pipeline: each picture is right, or a sentence says what to do."""

import contextlib
import copy
import gc
import io
import pickle
import sys
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import diffusers
import pytest
import torch
import zoo_motion  # noqa: F401  # registers its pipelines
import zoo_transformers  # noqa: F401  # registers its pipelines
import zoo_unets  # noqa: F401  # registers its pipelines
from at_hand import class_named
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SDCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor2_0
from tiny import fingerprint, left_behind, live_bytes
from torch.utils.checkpoint import checkpoint
from zoo import ENTRIES, STEPS, of_pictures, seeded

from tgate_processors import (
    Gate,
    StateError,
    TGateConfig,
    TgateSDLoader,
    UnsupportedPipelineError,
    apply_tgate,
    gated_processors,
    ungated_processors,
)
from tgate_processors._layers import attention_layers, cross_attention_layers
from tgate_processors._modes import AttentionMode
from tgate_processors._pipelines import denoisers_of, takes_callback
from tgate_processors.processors import GatedProcessor, gated_class


GATE = 2
CONFIG = TGateConfig(gate_step=GATE)
NEVER = TGateConfig(gate_step=99)
SD, SDXL, PIXART, WAN = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "PixArtAlphaPipeline", "WanPipeline"


def build(name=SD):
    return seeded(ENTRIES[name].build)


def call(name=SD, pictures=(0,), **changes):
    return ENTRIES[name].call(list(pictures)) | changes


def gated(pipe, kwargs, config=CONFIG, mine=None, handle=True):
    """The latents of a gated run, and the handle, removed."""
    with apply_tgate(pipe, config, callback_on_step_end=mine) as tgate:
        passed = {"callback_on_step_end": tgate} if handle and takes_callback(pipe) else {}
        return pipe(**kwargs, **passed)[0], tgate


@cache
def fresh(name=SD, config=CONFIG, **changes):
    """The latents of a gated run on a fresh pipeline."""
    return gated(build(name), call(name, **changes), config)[0]


@cache
def stock_of(name=SD, **changes):
    """The latents of a fresh pipeline."""
    return build(name)(**call(name, **changes))[0]


@cache
def inputs_of(name):
    """What the denoiser is called with in each evaluation of a stock run."""
    pipe = build(name)
    given, hook = given_to(denoisers_of(pipe)[0])
    pipe(**call(name))
    hook.remove()
    return given


def sibling(pipe, cls=None):
    """Another pipeline of the same networks, with a scheduler of its own."""
    parts = pipe.components | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    other = (cls or type(pipe))(**parts)
    other.set_progress_bar_config(disable=True)
    return other


def direct(unet, seed=7):
    """A call of the UNet on one's own."""
    random = torch.Generator().manual_seed(seed)
    sample, text = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 7, 12, generator=random)
    with torch.no_grad():
        return unet(sample, 5, text).sample


def reuses(summary):
    """Whether an evaluation of the denoiser reused cross-attention."""
    return any(one.mode.cross_attention is AttentionMode.REUSE and not one.missed for one in summary.evaluations)


class Stop(Exception):
    pass


def raising(at, error=Stop):
    """Raises at call number `at`."""
    calls = iter(range(10**6))

    def hook(*_, **__):
        if next(calls) == at:
            raise error

    return hook


# Only what fits is reused


def passes_over(block, at):
    """A block that is left out in its evaluation number `at`, as LayerDrop and others do."""
    calls, forward = iter(range(10**6)), block.forward
    block.forward = lambda hidden_states, *args, **kwargs: (
        hidden_states if next(calls) == at else forward(hidden_states, *args, **kwargs)
    )


def test_a_layer_that_is_passed_over_in_the_step_that_stores():
    """It computes and stores in the next step, for each picture its own text."""

    def run(pictures):
        pipe = build()
        passes_over(next(m for m in pipe.unet.modules() if type(m).__name__ == "BasicTransformerBlock"), at=GATE - 1)
        return gated(pipe, call(pictures=pictures))

    both, tgate = run([0, 1])
    for picture in (0, 1):
        torch.testing.assert_close(both[picture : picture + 1], run([picture])[0], rtol=1e-3, atol=1e-4)
    missed = [len(evaluation.missed) for evaluation in tgate.summary().evaluations]
    assert missed == [0] * GATE + [1] + [0] * (STEPS - GATE - 1)


@pytest.mark.parametrize("config", [TGateConfig(gate_step=2), TGateConfig(gate_step=2, look_interval=3)])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_guidance_that_another_callback_cuts(config, at):
    """From then on the batch is of one branch; what was stored for one branch is reused."""
    pipe = build()
    batches = []
    hook = pipe.unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    with apply_tgate(pipe, config) as tgate:
        cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=at)
        steps = {"num_inference_steps": 7}
        latents = pipe(**call() | steps, callback_on_step_end=MultiPipelineCallbacks([tgate, cut]))[0]
        summary = tgate.summary()
    hook.remove()
    assert torch.isfinite(latents).all()
    assert set(batches[at + 1 :]) == {1}
    assert summary.batches == tuple(batches)
    assert reuses(summary)


def test_guidance_that_a_callback_begins():
    """Before the gate the batch is of one branch, then of two: the step that stores has both."""

    def begins(pipe, step, timestep, kwargs):
        if step == 0:
            pipe._guidance_scale = 5.0
            text = call()
            kwargs["prompt_embeds"] = torch.cat([text["negative_prompt_embeds"], text["prompt_embeds"]])
        return kwargs

    def run(config):
        pipe = build()
        with apply_tgate(pipe, config, callback_on_step_end=begins) as tgate:
            inputs = {"guidance_scale": 1.0, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
            return pipe(**call() | inputs, callback_on_step_end=tgate)[0], tgate.summary().batches

    stock, batches = run(NEVER)
    assert batches == (1, 2, 2, 2)
    latents, batches = run(CONFIG)
    assert batches == (1, 2, 1, 1)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, stock)


def test_guidance_that_a_callback_begins_in_the_last_step():
    """The calls of that step are of the run that is going on."""

    def begins(pipe, step, timestep, kwargs):
        if step == STEPS - 2:
            pipe._guidance_scale = 5.0
        return kwargs

    pipe = build("Cosmos2TextToImagePipeline")
    with apply_tgate(pipe, NEVER, callback_on_step_end=begins) as tgate:
        pipe(**call("Cosmos2TextToImagePipeline", guidance_scale=1.0), callback_on_step_end=tgate)
        assert tgate.summary().batches == (1,) * (STEPS + 1)
        assert tgate.gate.is_over


@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("config", [CONFIG, TGateConfig(gate_step=2, look_interval=2)])
def test_latents_that_grow_in_a_callback(at, config):
    """Hires fix: what is stored does not fit any more, so it is computed and stored anew."""

    def grows(pipe, step, timestep, kwargs):
        if step == at:
            kwargs["latents"] = torch.nn.functional.interpolate(kwargs["latents"], scale_factor=2)
        return kwargs

    steps = {"num_inference_steps": 6}
    stock, _ = gated(build(), call() | steps, NEVER, grows)
    latents, tgate = gated(build(), call() | steps, config, grows)
    assert latents.shape == stock.shape == (1, 4, 16, 16)
    assert torch.isfinite(latents).all()
    assert not torch.equal(latents, stock)
    assert set(tgate.summary().batches) == {1, 2}


@pytest.mark.parametrize(("before", "after"), [([0], [0, 1]), ([0, 1], [0])])
def test_a_batch_that_grows_or_shrinks_in_a_callback(before, after):
    names = ["latents", "prompt_embeds"]

    def changes(pipe, step, timestep, kwargs):
        if step == GATE:
            then = call(pictures=after)
            text = torch.cat([then["negative_prompt_embeds"], then["prompt_embeds"]])
            latents = kwargs["latents"][: len(after)]
            return {"latents": latents.expand(len(after), -1, -1, -1).clone(), "prompt_embeds": text}
        return kwargs

    inputs = call(pictures=before, num_inference_steps=6) | {"callback_on_step_end_tensor_inputs": names}
    stock, _ = gated(build(), inputs, NEVER, changes)
    latents, tgate = gated(build(), inputs, CONFIG, changes)
    assert latents.shape == stock.shape
    assert torch.isfinite(latents).all()
    branches = [2 * len(before)] * GATE + [len(before)] + [len(after)] * 3
    assert list(tgate.summary().batches) == branches


class Windows(torch.nn.Module):
    """A block that is called for one part of the tokens after the other, as FreeNoise does with frames."""

    def __init__(self, block, dim, parts):
        super().__init__()
        self.block, self.dim, self.parts = block, dim, parts

    def forward(self, hidden_states, encoder_hidden_states=None, **kwargs):
        done = []
        for part in range(self.parts):
            rows = hidden_states.chunk(self.parts, self.dim)[part]
            text = encoder_hidden_states
            if self.dim == 0:  # split inference: the rows of the batch one after the other
                text = text.chunk(self.parts)[part]
            done.append(self.block(rows, encoder_hidden_states=text, **kwargs))
        return torch.cat(done, self.dim)


def in_windows(pipe, dim):
    for module in list(pipe.unet.modules()):
        if isinstance(module, diffusers.Transformer2DModel):
            module.transformer_blocks = torch.nn.ModuleList(Windows(b, dim, 2) for b in module.transformer_blocks)
    return pipe


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_layer_that_is_called_several_times_in_a_step(dim, guidance_scale):
    """Each of its calls reuses its own output. Whose halves a part has nobody knows: the next step computes anew."""

    def run(pictures):
        kwargs = call(pictures=pictures, guidance_scale=guidance_scale, num_inference_steps=6)
        return gated(in_windows(build(), dim), kwargs)

    both, tgate = run([0, 1])
    if dim == 1:  # parts of the tokens: one picture's are split as two pictures' are
        for picture in (0, 1):
            alone = run([picture])[0]
            torch.testing.assert_close(both[picture : picture + 1], alone, rtol=1e-3, atol=1e-4)
    else:
        settings = {"pictures": (0, 1), "guidance_scale": guidance_scale, "num_inference_steps": 6}
        whole = fresh(**settings)
        assert (both - whole).abs().max() < (whole - stock_of(**settings)).abs().max()
    missed = [len(evaluation.missed) for evaluation in tgate.summary().evaluations]
    layers = len(cross_attention_layers(build().unet)) if guidance_scale > 1 else 0
    assert missed == [0] * GATE + [layers] + [0] * 3


class Regions(AttnProcessor2_0):
    """A processor that is given a mask for each region, `(regions, 1, channels)`."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, regions=None):
        output = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        return output if regions is None else output * regions.sum(0, keepdim=True)


@pytest.mark.parametrize("regions", [1, 2, 4])
def test_masks_of_regions_are_not_taken_for_a_batch(regions):
    """Two regions look like a batch of two halves: both branches are computed, and a sentence says why."""

    def run(config):
        pipe = build()
        pipe.unet.set_attn_processor(Regions())
        masks = of_pictures(range(regions), 1, 1).sigmoid()
        return gated(pipe, call() | {"cross_attention_kwargs": {"regions": masks}}, config)

    looks_like_halves = regions % 2 == 0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        latents, tgate = run(CONFIG)
    assert any("`regions` among the attention arguments" in str(w.message) for w in said) is looks_like_halves
    assert tgate.summary().batches == ((2,) * 4 if looks_like_halves else (2, 2, 1, 1))
    assert reuses(tgate.summary())
    assert torch.isfinite(latents).all()


# A run ends with its loop


def fails_in_the_vae(pipe, kwargs):
    pipe.vae.decode = raising(0)
    del kwargs["output_type"]


def fails_in_the_callback(pipe, kwargs):
    raise_now = raising(GATE)
    return lambda pipe, step, timestep, kw: raise_now() or kw


def is_interrupted_by_the_keyboard(pipe, kwargs):
    raise_now = raising(GATE, KeyboardInterrupt)
    return lambda pipe, step, timestep, kw: raise_now() or kw


def fails_in_the_denoiser(pipe, kwargs):
    hook = pipe.unet.conv_out.register_forward_pre_hook(raising(GATE))
    weakref.finalize(kwargs["latents"], hook.remove)


def fails_in_the_scheduler(pipe, kwargs):
    raise_now, step = raising(GATE), pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kw: raise_now() or step(*args, **kw)


class Cancels(PipelineCallback):
    tensor_inputs = ()

    def callback_fn(self, pipe, step, timestep, kwargs):
        pipe._interrupt = step >= GATE
        return kwargs


FAILURES = [fails_in_the_denoiser, fails_in_the_vae, fails_in_the_callback, fails_in_the_scheduler]


@pytest.mark.parametrize("fails", [*FAILURES, is_interrupted_by_the_keyboard])
def test_a_run_that_fails_leaves_nothing(fails):
    """Afterwards a call of one's own, an ungated sibling and a gated one meet a network that only computes."""
    pipe = build()
    other, ungated = sibling(pipe), sibling(pipe)
    expected, stock, own = fresh(), ungated(**call())[0], direct(pipe.unet)
    tgate, other_tgate = apply_tgate(pipe, CONFIG), apply_tgate(other, CONFIG)
    kwargs, parts = call(), (pipe.vae.decode, pipe.scheduler.step)
    tgate.callback_on_step_end = fails(pipe, kwargs)
    with pytest.raises((Stop, KeyboardInterrupt)):
        pipe(**kwargs, callback_on_step_end=tgate)
    assert tgate.gate.is_over is (
        fails in (fails_in_the_denoiser, fails_in_the_vae)
    )  # of others the next call shows it
    tgate.callback_on_step_end = None
    pipe.unet.conv_out._forward_pre_hooks.clear()
    pipe.vae.decode, pipe.scheduler.step = parts
    assert torch.equal(direct(pipe.unet), own)
    assert tgate.gate.cache_bytes == 0
    assert torch.equal(ungated(**call())[0], stock)
    for _ in range(2):
        assert torch.equal(other(**call(), callback_on_step_end=other_tgate)[0], expected)
        assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], expected)


def test_a_run_that_is_cancelled_by_a_callback_after_the_handle():
    pipe = build()
    own, stock = direct(pipe.unet), pipe(**call())[0]
    ungated = sibling(pipe)
    tgate = apply_tgate(pipe, CONFIG)
    both = MultiPipelineCallbacks([tgate, Cancels(cutoff_step_ratio=0.5)])
    pipe(**call(num_inference_steps=8), callback_on_step_end=both)
    assert torch.equal(direct(pipe.unet), own)
    assert tgate.gate.cache_bytes == 0
    assert torch.equal(ungated(**call())[0], stock)
    assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], fresh())


def test_an_aborted_run_is_let_go_when_another_pipeline_runs():
    pipe = build()
    other = sibling(pipe)
    fail = raising(GATE)
    tgate = apply_tgate(pipe, CONFIG, callback_on_step_end=lambda pipe, step, timestep, kw: fail() or kw)
    other_tgate = apply_tgate(other, CONFIG)
    with pytest.raises(Stop):
        pipe(**call(), callback_on_step_end=tgate)
    assert tgate.gate.cache_bytes > 0
    other(**call(), callback_on_step_end=other_tgate)
    assert tgate.gate.is_over
    assert tgate.gate.cache_bytes == 0


def test_a_hundred_runs_with_failures_do_not_grow():
    pipe = build()
    tgate = apply_tgate(pipe, CONFIG)

    def runs(count):
        for number in range(count):
            fail = raising(number % 5)
            tgate.callback_on_step_end = lambda pipe, step, timestep, kw, fail=fail: fail() or kw
            with contextlib.suppress(Stop):
                pipe(**call(num_inference_steps=3), callback_on_step_end=tgate)

    runs(10)
    gc.collect()
    tensors, objects = live_bytes(), len(gc.get_objects())
    runs(90)
    assert live_bytes() <= tensors
    assert len(gc.get_objects()) <= objects + 20


# A call that is not the run's next is nobody's


@pytest.mark.parametrize("name", [SD, PIXART, WAN, "SanaPipeline", "LuminaPipeline"])
def test_calls_of_ones_own_before_and_between_runs(name):
    """The very inputs of a run's evaluations, given once more: the network's own answers."""
    pipe, seen = build(name), []
    network = denoisers_of(pipe)[0]
    hook = network.register_forward_hook(
        lambda _, args, kwargs, out: seen.append((args, kwargs, out)), with_kwargs=True
    )
    pipe(**call(name))
    hook.remove()

    def again():
        with torch.no_grad():
            return all(torch.equal(network(*args, **kwargs)[0], out[0]) for args, kwargs, out in seen)

    expected = fresh(name)
    with apply_tgate(pipe, CONFIG) as tgate:
        passed = {"callback_on_step_end": tgate} if takes_callback(pipe) else {}
        for _ in range(2):
            assert again()
            assert torch.equal(pipe(**call(name), **passed)[0], expected)
        assert again()


def given_to(network):
    """The inputs of each call of a network, in order, and the hook that sees them."""
    given = []
    return given, network.register_forward_pre_hook(lambda _, *inputs: given.append(inputs), with_kwargs=True)


# Sana converts its timesteps, so without the handle nobody can tell the step.
WAYS = [(name, way) for name in (SD, WAN, "SanaPipeline") for way in ("the handle's", "a callback of diffusers")]


@pytest.mark.parametrize(("name", "way"), [*WAYS, (SD, "forgotten handle"), (WAN, "forgotten handle")])
@pytest.mark.parametrize("at", range(STEPS))
def test_a_call_of_ones_own_in_a_callback(name, at, way):
    """Of the first step, the last and the next: the network's own answers, and the run goes on."""
    pipe, answers = build(name), []
    network = denoisers_of(pipe)[0]
    (args, kwargs), steps = inputs_of(name)[0], iter(range(10**6))

    def looks(pipe, step, timestep, callback_kwargs):
        if next(steps) == at:
            for position in {0, at, min(at + 1, STEPS - 1)}:
                now = pipe.scheduler.timesteps[position]
                if len(args) > 1:
                    inputs = (args[0], now), kwargs
                else:
                    inputs = args, kwargs | {"timestep": now.expand(kwargs["timestep"].shape)}
                answers.append((inputs, network(*inputs[0], **inputs[1])[0]))
        return callback_kwargs

    class Looks(PipelineCallback):
        tensor_inputs = ()

        def callback_fn(self, *arguments):
            return looks(*arguments)

    with apply_tgate(pipe, CONFIG, callback_on_step_end=looks if way == "the handle's" else None) as tgate:
        callback = {
            "the handle's": tgate,
            "a callback of diffusers": MultiPipelineCallbacks([tgate, Looks(cutoff_step_ratio=0.5)]),
            "forgotten handle": looks,
        }[way]
        assert torch.equal(pipe(**call(name), callback_on_step_end=callback)[0], fresh(name))
    assert answers
    with torch.no_grad():
        assert all(torch.equal(network(*args, **kwargs)[0], answer) for (args, kwargs), answer in answers)


def test_a_call_of_ones_own_in_a_plain_callback_of_three_arguments():
    """PixArt's older `callback`; it looks ahead, with the timestep that the loop comes to next."""
    pipe = build(PIXART)
    seen, _ = given_to(pipe.transformer)
    kwargs, answers = call(PIXART), []

    def looks(step, timestep, latents):
        if step < STEPS - 1:
            args, given = seen[-1]
            following = pipe.scheduler.timesteps[step + 1].expand(given["timestep"].shape)
            answers.append(pipe.transformer(*args, **given | {"timestep": following}))

    with apply_tgate(pipe, CONFIG) as tgate:
        latents = pipe(**kwargs, callback=looks, callback_steps=1)[0]
        assert tgate.gate.is_over
        assert tgate.summary().batches == (2, 2, 1, 1)
    assert len(answers) == STEPS - 1
    assert torch.equal(latents, fresh(PIXART))


@pytest.mark.parametrize("name", [SD, PIXART, WAN])
def test_a_call_from_within_an_evaluation(name):
    """A hook that calls the network again: its own answer, and the evaluation goes on."""
    pipe, answers = build(name), []
    network = denoisers_of(pipe)[0]
    args, kwargs = inputs_of(name)[0]
    with torch.no_grad():
        own = network(*args, **kwargs)[0]
    inside = []

    def calls_again(*_):
        if not inside:
            inside.append(True)
            answers.append(network(*args, **kwargs)[0])
            inside.clear()

    block = next(module for module in network.modules() if isinstance(module, torch.nn.ModuleList))[0]
    hook = block.register_forward_pre_hook(calls_again)
    latents, _ = gated(pipe, call(name))
    hook.remove()
    assert torch.equal(latents, fresh(name))
    assert len(answers) >= STEPS
    assert all(torch.equal(answer, own) for answer in answers)


@pytest.mark.parametrize("shares_scheduler", [False, True])
@pytest.mark.parametrize("is_gated", [False, True])
def test_a_preview_of_a_sibling_in_a_callback(is_gated, shares_scheduler):
    """The sibling draws its own picture, and the run goes on. DDIM keeps nothing that another run could change."""
    pipe = build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    other = sibling(pipe)
    if shares_scheduler:
        other.scheduler = pipe.scheduler
    small = call(pictures=[1], num_inference_steps=STEPS)
    stock, expected = sibling(pipe)(**small)[0], gated(pipe, call())[0]
    expected_preview = gated(sibling(pipe), small, TGateConfig(gate_step=1))[0] if is_gated else stock
    previews = []

    def previews_now(pipe, step, timestep, kwargs):
        if step in (0, GATE):
            passed = {"callback_on_step_end": of_other} if is_gated else {}
            previews.append(other(**small, **passed)[0])
        return kwargs

    of_other = apply_tgate(other, TGateConfig(gate_step=1)) if is_gated else None
    latents, _ = gated(pipe, call(), mine=previews_now)
    assert torch.equal(latents, expected)
    assert [torch.equal(preview, expected_preview) for preview in previews] == [True, True]


def test_an_ungated_pipeline_that_shares_network_and_scheduler():
    pipe = build()
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    stock = other(**call())[0]
    with apply_tgate(pipe, CONFIG) as tgate:
        for _ in range(2):
            assert torch.equal(other(**call())[0], stock)
            assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], fresh())


def test_a_call_of_a_controlnet_from_within_an_evaluation_of_the_denoiser():
    name = "StableDiffusionControlNetPipeline"
    pipe, answers = build(name), []
    given, hook = given_to(pipe.controlnet)
    pipe(**call(name))
    hook.remove()
    args, kwargs = given[0]
    with torch.no_grad():
        own = pipe.controlnet(*args, **kwargs)[1]

    def calls(*_):
        following = pipe.scheduler.timesteps[(len(answers) + 1) % STEPS]
        pipe.controlnet(args[0], following, *args[2:], **kwargs)
        answers.append(pipe.controlnet(*args, **kwargs)[1])

    hook = pipe.unet.conv_out.register_forward_pre_hook(calls)
    latents, _ = gated(pipe, call(name))
    hook.remove()
    assert torch.equal(latents, fresh(name))
    assert [torch.equal(answer, own) for answer in answers] == [True] * STEPS


# Threads


@pytest.fixture
def switches_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("switches_often")
@pytest.mark.parametrize("name", [SD, PIXART])
def test_eight_threads_each_with_a_sibling(name):
    pipe = build(name)
    expected = [fresh(name, TGateConfig(gate_step=1 + number % 3)) for number in range(8)]
    siblings = [sibling(pipe) for _ in range(8)]
    handles = [apply_tgate(one, TGateConfig(gate_step=1 + number % 3)) for number, one in enumerate(siblings)]

    def draws(number):
        passed = {"callback_on_step_end": handles[number]} if takes_callback(pipe) else {}
        return [torch.equal(siblings[number](**call(name), **passed)[0], expected[number]) for _ in range(4)]

    with ThreadPoolExecutor(8) as threads:
        right = [drawn for drawns in threads.map(draws, range(8)) for drawn in drawns]
    assert right == [True] * 32


@pytest.mark.usefixtures("switches_often")
def test_one_pipeline_in_two_threads_is_right_or_refused():
    pipe = build()
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)  # stateless: stock is right by luck
    expected = gated(pipe, call())[0]
    tgate = apply_tgate(pipe, CONFIG)

    def draws(_):
        try:
            return torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], expected)
        except StateError as error:
            return str(error)

    with ThreadPoolExecutor(2) as threads:
        drawn = list(threads.map(draws, range(10)))
    assert False not in drawn
    message = "`pipe` must not run in two threads at once, got a second run of this StableDiffusionPipeline"
    assert all(said is True or said.startswith(message) for said in drawn)
    assert draws(0) is True


# Copies


@pytest.mark.parametrize("name", [SD, PIXART, WAN])
@pytest.mark.parametrize("when", ["before a run", "in a run", "after a run", "after a failed run"])
def test_a_copy_is_ungated_and_can_be_gated(name, when):
    pipe, copies = build(name), []
    cls = type(denoisers_of(pipe)[0])
    stock, expected = stock_of(name), fresh(name)
    tgate = apply_tgate(pipe, CONFIG)
    passed = {"callback_on_step_end": tgate} if takes_callback(pipe) else {}
    network = denoisers_of(pipe)[0]
    if when == "in a run":
        copying = raising(GATE, StopIteration)

        def hook(*_):
            try:
                copying()
            except StopIteration:
                copies.append(copy.deepcopy(pipe))

        handle = network.register_forward_hook(hook)
        pipe(**call(name), **passed)
        handle.remove()
        denoisers_of(copies[0])[0]._forward_hooks.clear()
    elif when == "after a failed run":
        hook = network.register_forward_hook(raising(GATE))
        with pytest.raises(Stop):
            pipe(**call(name), **passed)
        hook.remove()
    elif when == "after a run":
        pipe(**call(name), **passed)
    twin = copies[0] if copies else copy.deepcopy(pipe)
    twin.set_progress_bar_config(disable=True)
    copied = denoisers_of(twin)[0]
    assert type(copied) is cls
    assert not any(isinstance(layer.processor, GatedProcessor) for layer in attention_layers(copied).values())
    assert torch.equal(twin(**call(name))[0], stock)
    assert torch.equal(gated(twin, call(name))[0], expected)
    assert torch.equal(pipe(**call(name), **passed)[0], expected)
    tgate.remove()
    assert torch.equal(pipe(**call(name))[0], stock)


def test_the_loaders_method_of_a_copy_draws_with_the_copy():
    pipe = TgateSDLoader(build(), gate_step=GATE)
    twin = copy.deepcopy(pipe)
    twin.set_progress_bar_config(disable=True)
    for weight in twin.unet.parameters():
        weight.data.mul_(1.5)
    changed = {name: value for name, value in call().items() if name != "return_dict"}
    assert not torch.equal(twin.tgate(**changed).images, pipe.tgate(**changed).images)


@pytest.mark.parametrize("way", ["pickle", "torch.save", "copy"])
@pytest.mark.parametrize("while_gated", [True, False])
def test_a_network_that_is_pickled_or_saved(way, while_gated):
    pipe = build()
    expected = direct(pipe.unet)
    tgate = apply_tgate(pipe, CONFIG)
    pipe(**call(), callback_on_step_end=tgate)
    if not while_gated:
        tgate.remove()
    if way == "pickle":
        data = pickle.dumps(pipe.unet)
        assert b"tgate" not in data
        loaded = pickle.loads(data)
    elif way == "torch.save":
        torch.save(pipe.unet, buffer := io.BytesIO())
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    else:
        loaded = copy.copy(pipe.unet)
    assert type(loaded) is diffusers.UNet2DConditionModel
    assert torch.equal(direct(loaded), expected)


@pytest.mark.parametrize(
    "cls",
    [
        diffusers.StableDiffusionImg2ImgPipeline,
        diffusers.StableDiffusionInpaintPipeline,
        diffusers.StableDiffusionPAGPipeline,
    ],
)
def test_from_pipe_of_a_gated_pipeline(cls):
    pipe = build()
    with apply_tgate(pipe, CONFIG):
        other = cls.from_pipe(pipe)
        assert other.unet is pipe.unet
        assert diffusers.AutoPipelineForImage2Image.from_pipe(pipe).unet is pipe.unet
    assert type(pipe.unet) is diffusers.UNet2DConditionModel


# Gradients


def gradients(name, checkpoints, config=CONFIG):
    pipe = build(name)
    network = denoisers_of(pipe)[0].requires_grad_(True).train()
    if checkpoints == "reentrant":
        network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=True))
    elif checkpoints:
        network.enable_gradient_checkpointing()
    with apply_tgate(pipe, config) as tgate:
        passed = {"callback_on_step_end": tgate} if takes_callback(pipe) else {}
        latents = type(pipe).__call__.__wrapped__(pipe, **call(name), **passed)[0]
        latents.square().sum().backward()
    return torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])


@pytest.mark.parametrize("name", [SD, PIXART])
@pytest.mark.parametrize("config", [CONFIG, TGateConfig(gate_step=2, look_interval=2), NEVER])
def test_gradients_through_checkpoints(name, config):
    """What is computed again in the backward pass finds the modes and outputs of its evaluation."""
    plain = gradients(name, None, config)
    torch.testing.assert_close(
        gradients(name, "ordinary", config), plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max())
    )


def test_reentrant_checkpoints_are_refused_where_attention_is_stored():
    with pytest.raises(StateError, match=r"gradient checkpointing must not be reentrant .* got `use_reentrant=True`"):
        gradients(SD, "reentrant")


@pytest.mark.parametrize("config", [NEVER, TGateConfig(gate_step=99, guidance_start=2)])
def test_gradients_through_reentrant_checkpoints_where_attention_is_only_computed(config):
    plain = gradients(SD, None, config)
    torch.testing.assert_close(
        gradients(SD, "reentrant", config), plain, rtol=1e-4, atol=1e-6 * float(plain.abs().max())
    )


# Parts that are shared, replaced or patched


def test_two_gated_pipelines_that_share_a_controlnet():
    """Each has a denoiser of its own; the ControlNet is folded and reused in the runs of both."""
    name = "StableDiffusionControlNetPipeline"
    pipe = build(name)
    parts = pipe.components | {"unet": build(name).unet}
    other = type(pipe)(**parts | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
    other.set_progress_bar_config(disable=True)
    expected = fresh(name)
    batches = []
    pipe.controlnet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    first, second = apply_tgate(pipe, CONFIG), apply_tgate(other, CONFIG)
    for _ in range(2):
        assert torch.equal(pipe(**call(name), callback_on_step_end=first)[0], expected)
        assert torch.equal(other(**call(name), callback_on_step_end=second)[0], expected)
    assert batches == [2, 2, 1, 1] * 4
    first.remove()
    assert torch.equal(other(**call(name), callback_on_step_end=second)[0], expected)


def test_a_controlnet_that_is_replaced_while_gated():
    name = "StableDiffusionControlNetPipeline"
    pipe = build(name)
    tgate = apply_tgate(pipe, CONFIG)
    pipe.controlnet = build(name).controlnet
    message = (
        "must have the networks that were gated, got a StableDiffusionControlNetPipeline without the gated Control"
    )
    with pytest.raises(StateError, match=message):
        pipe(**call(name), callback_on_step_end=tgate)
    assert "the gate is on a ControlNetModel that the pipeline no longer has" in str(tgate.summary())
    tgate.remove()
    assert torch.equal(gated(pipe, call(name))[0], fresh(name))


@pytest.mark.parametrize("name", [PIXART, SD])
def test_a_denoiser_that_is_replaced_while_gated(name):
    """Without a callback nobody can raise; the summary says it."""
    pipe = build(name)
    part = next(key for key, value in pipe.components.items() if value is denoisers_of(pipe)[0])
    tgate = apply_tgate(pipe, CONFIG)
    setattr(pipe, part, denoisers_of(build(name))[0])
    if takes_callback(pipe):
        with pytest.raises(StateError, match="or the pipeline has another denoiser now, call `apply_tgate` again"):
            pipe(**call(name), callback_on_step_end=tgate)
    else:
        pipe(**call(name))
    assert "that the pipeline no longer has: apply it again" in str(tgate.summary())
    tgate.remove()
    assert torch.equal(gated(pipe, call(name))[0], fresh(name))


def test_a_denoiser_that_is_compiled_while_gated_is_the_same_one():
    pipe = build()
    tgate = apply_tgate(pipe, CONFIG)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], fresh())
    assert "no longer has" not in str(tgate.summary())
    with pytest.raises(StateError, match="`pipe` must not be gated already"):
        apply_tgate(pipe, CONFIG)


class Patched(AttnProcessor2_0):
    """A class that somebody patches after it was gated."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)


def test_a_processor_class_that_is_patched_after_it_was_gated(monkeypatch):
    pipe = build()
    pipe.unet.set_attn_processor(Patched())
    with apply_tgate(pipe, CONFIG) as tgate:
        plain = pipe(**call(), callback_on_step_end=tgate)[0]

        def louder(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, extra=1.0):
            output = AttnProcessor2_0.__call__(self, attn, hidden_states, encoder_hidden_states, attention_mask)
            return output * extra

        monkeypatch.setattr(Patched, "__call__", louder)
        assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], plain)
        passed = {"cross_attention_kwargs": {"extra": 1.5}}  # its new argument is passed on in the next run
        patched = pipe(**call(), **passed, callback_on_step_end=tgate)[0]
    assert not torch.equal(patched, plain)
    pipe = build()
    pipe.unet.set_attn_processor(Patched())
    assert torch.equal(gated(pipe, call() | passed)[0], patched)


def test_what_a_processor_class_holds_is_freed_with_the_gate():
    def once():
        held = torch.zeros(1000)

        class Mine(AttnProcessor2_0):
            def __call__(self, *args, **kwargs):
                return super().__call__(*args, **kwargs) + held[0]

        pipe = build()
        pipe.unet.set_attn_processor(Mine())
        handle = apply_tgate(pipe, CONFIG)
        pipe(**call(), callback_on_step_end=handle)
        handle.summary()
        handle.remove()
        pipe.unet.set_attn_processor(AttnProcessor2_0())
        return handle, weakref.ref(held), weakref.ref(gated_class(Mine))

    kept = [once() for _ in range(3)]  # the handles are still there
    gc.collect()
    assert all(held() is None and cls() is None for _, held, cls in kept)


def test_removing_in_a_callback_of_a_pag_pipeline():
    """It puts the processors back that it found; those only compute, and both ways out are open."""
    name = "StableDiffusionPAGPipeline"
    pipe, handles = build(name), []
    stock, before = pipe(**call(name))[0], fingerprint(pipe.unet)
    config = TGateConfig(gate_step=2, sp_interval=2)

    def removes(pipe, step, timestep, kwargs):
        if step == GATE:
            handles[0].remove()
        return kwargs

    handles.append(apply_tgate(pipe, config, callback_on_step_end=removes))
    pipe(**call(name), callback_on_step_end=handles[0])
    assert torch.equal(pipe(**call(name))[0], stock)
    again = apply_tgate(pipe, config)
    assert torch.equal(pipe(**call(name), callback_on_step_end=again)[0], fresh(name, config))
    again.remove()
    handles[0].remove()
    assert left_behind(before, pipe.unet) == {}


def test_gated_processors_that_somebody_kept_and_puts_back():
    pipe = build()
    stock, before = pipe(**call())[0], fingerprint(pipe.unet)
    tgate = apply_tgate(pipe, CONFIG)
    kept = dict(pipe.unet.attn_processors)
    tgate.remove()
    pipe.unet.set_attn_processor(dict(kept))
    assert torch.equal(pipe(**call())[0], stock)
    assert torch.equal(gated(pipe, call())[0], fresh())
    pipe.unet.set_attn_processor(dict(kept))
    tgate.remove()
    assert left_behind(before, pipe.unet) == {}


def test_the_default_processors_set_while_gated():
    pipe = build()
    tgate = apply_tgate(pipe, CONFIG)
    pipe(**call(), callback_on_step_end=tgate)
    pipe.unet.set_default_attn_processor()  # diffusers compares classes
    latents = pipe(**call(), callback_on_step_end=tgate)[0]
    torch.testing.assert_close(latents, fresh(), rtol=1e-3, atol=1e-4)
    tgate.remove()
    assert not any(isinstance(p, GatedProcessor) for p in pipe.unet.attn_processors.values())


def test_a_parametrization_between_applying_and_removing():
    class Halved(torch.nn.Module):
        def forward(self, weight):
            return weight / 2

    def halve(pipe):
        torch.nn.utils.parametrize.register_parametrization(pipe.unet, "scale", Halved())

    def with_scale():
        pipe = build()
        pipe.unet.scale = torch.nn.Parameter(torch.ones(1))
        return pipe

    for order in ("before", "after"):
        pipe = with_scale()
        if order == "before":
            halve(pipe)
        tgate = apply_tgate(pipe, CONFIG)
        if order == "after":
            halve(pipe)
        assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], fresh())
        tgate.remove()
        assert pipe.unet.scale.item() == 0.5
        torch.nn.utils.parametrize.remove_parametrizations(pipe.unet, "scale")
        assert type(pipe.unet) is diffusers.UNet2DConditionModel
        assert torch.equal(gated(pipe, call())[0], fresh())


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 shards on accelerators alone")
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["sharded before", "sharded while gated"])
def test_a_network_that_is_sharded(order):
    """FSDP gives a module a class of its own, as the gate does, and looks for what it made of a class before."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    pipe, other = build(), build()
    stock, expected = stock_of(), fresh()
    fully_shard(other.unet, mesh=mesh)  # torch keeps what it makes of a class
    if order == "sharded before":
        fully_shard(pipe.unet, mesh=mesh)
    tgate = apply_tgate(pipe, CONFIG)
    if order == "sharded while gated":
        fully_shard(pipe.unet, mesh=mesh)
    for _ in range(2):
        assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], expected)
    tgate.remove()
    assert isinstance(pipe.unet, FSDPModule)
    assert not any("interceptor" in name for cls in type(pipe.unet).__mro__ for name in vars(cls))
    assert torch.equal(pipe(**call())[0], stock)
    assert torch.equal(other(**call())[0], stock)


# Timesteps


def remembers_timesteps(scheduler):
    """From now on its timesteps are the same tensor in every run of as many steps."""
    set_timesteps, known = scheduler.set_timesteps, {}

    def remembers(steps, device=None, **kwargs):
        set_timesteps(steps, device=device, **kwargs)
        scheduler.timesteps = known.setdefault(steps, scheduler.timesteps)

    scheduler.set_timesteps = remembers


def test_timesteps_that_are_the_same_tensor_in_every_run():
    """A scheduler that remembers them: the first timestep again is a new run."""
    pipe = build()
    remembers_timesteps(pipe.scheduler)
    tgate = apply_tgate(pipe, CONFIG)
    for fails_at in (None, 0, 2, None, 3, None):
        fail = raising(fails_at)
        tgate.callback_on_step_end = lambda pipe, step, timestep, kw, fail=fail: fail() or kw
        if fails_at is None:
            assert torch.equal(pipe(**call(), callback_on_step_end=tgate)[0], fresh())
        else:
            with pytest.raises(Stop):
                pipe(**call(), callback_on_step_end=tgate)


def test_timesteps_that_are_replaced_in_the_middle_of_a_run():
    pipe = build(PIXART)
    calls, step = iter(range(99)), pipe.scheduler.step

    def moves(*args, **kwargs):
        if next(calls) == 2:
            pipe.scheduler.timesteps = pipe.scheduler.timesteps.clone()
        return step(*args, **kwargs)

    pipe.scheduler.step = moves
    assert torch.equal(gated(pipe, call(PIXART))[0], fresh(PIXART))


def test_timesteps_that_are_a_list():
    """Then the callback says the step."""
    pipe = build()
    set_timesteps = pipe.scheduler.set_timesteps

    def lists(*args, **kwargs):
        set_timesteps(*args, **kwargs)
        pipe.scheduler.timesteps = list(pipe.scheduler.timesteps.clone().unbind())

    pipe.scheduler.set_timesteps = lists
    for _ in range(2):
        assert torch.equal(gated(pipe, call())[0], fresh())
    with pytest.raises(StateError, match="it was not called after 1 evaluations"):
        gated(pipe, call(), handle=False)
    assert torch.equal(gated(pipe, call())[0], fresh())


def test_a_run_that_failed_in_its_first_step_is_not_gone_on_with():
    """The next one has the same timesteps, and begins with the same evaluation."""
    pipe = build()
    remembers_timesteps(pipe.scheduler)
    tgate = apply_tgate(pipe, CONFIG)
    step = pipe.scheduler.step
    pipe.scheduler.step = raising(0)
    with pytest.raises(Stop):
        pipe(**call(), callback_on_step_end=tgate)
    pipe.scheduler.step = step
    pipe(**call(), callback_on_step_end=tgate)
    assert tgate.summary().batches == (2, 2, 1, 1)


# Loops that are not known


class Foreign(diffusers.DiffusionPipeline):
    """A guided loop of nobody that we know, which calls for each branch."""

    _callback_tensor_inputs = ("latents",)
    do_classifier_free_guidance = True

    def __init__(self, transformer, scheduler, converts=False):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.converts = converts

    @torch.no_grad()
    def __call__(self, latents, prompts, num_inference_steps, callback_on_step_end=None):
        self.scheduler.set_timesteps(num_inference_steps)
        for i, now in enumerate(self.scheduler.timesteps):
            timestep = now.expand(len(latents))
            timestep = timestep.clone() if self.converts else timestep
            given = {"hidden_states": latents, "timestep": timestep, "return_dict": False}
            first, *rest = (self.transformer(encoder_hidden_states=text, **given)[0] for text in prompts)
            noise = first + sum(other - first for other in rest)
            latents = self.scheduler.step(noise, now, latents, return_dict=False)[0]
            if callback_on_step_end:
                callback_on_step_end(self, i, now, {"latents": latents})
        return (latents,)


@pytest.mark.filterwarnings("ignore:Foreign is not among the pipelines")
@pytest.mark.parametrize("converts", [False, True])
@pytest.mark.parametrize("branches", [2, 3])
@pytest.mark.parametrize("pictures", [1, 2])
def test_a_loop_that_is_not_known_and_calls_several_times(branches, converts, pictures):
    """Every call reuses its own cross-attention, nothing else is left out."""
    wan = build(WAN)
    pipe = Foreign(wan.transformer, wan.scheduler, converts)
    pipe.set_progress_bar_config(disable=True)
    kwargs = call(WAN, pictures=range(pictures))
    prompts = [kwargs["prompt_embeds"] * factor for factor in (1.0, -0.5, 0.3)[:branches]]
    same_noise = kwargs["latents"][:1].repeat(pictures, *[1] * (kwargs["latents"].ndim - 1))  # no halves of guidance
    arguments = (same_noise, prompts, 6)
    stock = pipe(*arguments)[0]
    with apply_tgate(pipe, TGateConfig(gate_step=6)) as tgate:
        assert torch.equal(pipe(*arguments, callback_on_step_end=tgate)[0], stock)
    stored = []
    last = list(cross_attention_layers(pipe.transformer).values())[-1]
    hook = last.register_forward_hook(lambda *args: stored.append(args[-1]))
    with apply_tgate(pipe, TGateConfig(gate_step=1)) as tgate:
        pipe(*arguments, callback_on_step_end=tgate)
        summary = tgate.summary()
    hook.remove()
    assert summary.batches == (pictures,) * 6 * branches
    assert summary.cost.cross_reused == 5 * branches * len(cross_attention_layers(pipe.transformer))
    for step in range(1, 6):
        for branch in range(branches):
            assert torch.equal(stored[step * branches + branch], stored[branch])


@pytest.mark.filterwarnings("ignore:Foreign is not among the pipelines")
def test_a_loop_that_is_not_known_and_does_not_call_its_callback():
    """Its timesteps say the step; where it converts them too, the sentence says that the callback was not called."""
    wan = build(WAN)
    kwargs = call(WAN)
    arguments = (kwargs["latents"], [kwargs["prompt_embeds"], kwargs["negative_prompt_embeds"]], 6)
    seen, converting = Foreign(wan.transformer, wan.scheduler), Foreign(wan.transformer, wan.scheduler, True)
    with apply_tgate(seen, CONFIG) as tgate:
        expected = seen(*arguments, callback_on_step_end=tgate)[0]
        assert torch.equal(seen(*arguments)[0], expected)
    with (
        apply_tgate(converting, CONFIG) as tgate,
        pytest.raises(StateError, match="it was not called after 5 evaluations"),
    ):
        converting(*arguments)


class Reference(diffusers.StableDiffusionPipeline):
    """A loop of somebody's own over a known class: it evaluates a reference, then both branches."""

    @torch.no_grad()
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds, reference, callback_on_step_end=None):
        self._guidance_scale, self._interrupt = 5.0, False
        self.scheduler.set_timesteps(6)
        text = torch.cat([negative_prompt_embeds, prompt_embeds])
        for i, t in enumerate(self.scheduler.timesteps):
            shift = self.unet(reference, t, encoder_hidden_states=text.repeat(2, 1, 1)).sample.mean()
            both = self.unet(torch.cat([latents, latents]), t, encoder_hidden_states=text).sample
            negative, positive = both.chunk(2)
            latents = self.scheduler.step(negative + 5 * (positive - negative) + shift, t, latents).prev_sample
            if callback_on_step_end:
                callback_on_step_end(self, i, t, {"latents": latents})
        return (latents,)


@pytest.mark.parametrize("handle", [False, True])
def test_a_loop_of_ones_own_over_a_known_class_that_evaluates_twice_in_a_step(handle):
    """The reference is not two halves, and guidance is kept. Both evaluations reuse what they stored."""
    parts = build().components
    pipe = Reference(**parts, requires_safety_checker=False)
    kwargs = {n: call()[n] for n in ("latents", "prompt_embeds", "negative_prompt_embeds")}
    kwargs |= {"reference": of_pictures([5, 6, 7, 8], 4, 8, 8)}
    stock = pipe(**kwargs)[0]

    def run(config):
        with apply_tgate(pipe, config) as tgate:
            return pipe(**kwargs, callback_on_step_end=tgate if handle else None)[0], tgate.summary()

    assert torch.equal(run(TGateConfig(gate_step=6))[0], stock)
    for gate_step in (1, 2):
        latents, summary = run(TGateConfig(gate_step=gate_step))
        assert summary.batches == (4, 2) * 6
        assert summary.cost.cross_reused == 2 * (6 - gate_step) * len(cross_attention_layers(pipe.unet))
        assert not torch.equal(latents, stock)


class Skips(diffusers.StableDiffusionPipeline):
    """A loop of somebody's own that goes on with the last noise in one of its steps."""

    @torch.no_grad()
    def __call__(self, latents, prompt_embeds, negative_prompt_embeds, callback_on_step_end=None):
        self._guidance_scale, self._interrupt = 5.0, False
        self.scheduler.set_timesteps(6)
        text = torch.cat([negative_prompt_embeds, prompt_embeds])
        for i, t in enumerate(self.scheduler.timesteps):
            if i != 3:
                both = self.unet(torch.cat([latents, latents]), t, encoder_hidden_states=text).sample
            latents = self.scheduler.step(both[:1] + 5 * (both[1:] - both[:1]), t, latents).prev_sample
            if callback_on_step_end:
                callback_on_step_end(self, i, t, {"latents": latents})
        return (latents,)


@pytest.mark.parametrize(("handle", "after_it"), [(True, [1, 1]), (False, [2, 2])])
def test_a_loop_that_passes_over_a_step(handle, after_it):
    """Where the callback says so the run goes on; else the evaluation that comes is not its next, and stock."""
    pipe = Skips(**build().components, requires_safety_checker=False)
    with apply_tgate(pipe, CONFIG) as tgate:
        batches = []
        hook = pipe.unet.conv_in.register_forward_hook(lambda *args: batches.append(args[-1].shape[0]))
        kwargs = {name: call()[name] for name in ("latents", "prompt_embeds", "negative_prompt_embeds")}
        pipe(**kwargs, callback_on_step_end=tgate if handle else None)
        hook.remove()
    assert batches == [2, 2, 1, *after_it]


def modular_sdxl():
    sequence = class_named("SequentialPipelineBlocks")
    from diffusers.modular_pipelines.stable_diffusion_xl import before_denoise, denoise

    class Blocks(sequence):
        block_classes = (
            before_denoise.StableDiffusionXLInputStep,
            before_denoise.StableDiffusionXLSetTimestepsStep,
            before_denoise.StableDiffusionXLPrepareLatentsStep,
            before_denoise.StableDiffusionXLPrepareAdditionalConditioningStep,
            denoise.StableDiffusionXLDenoiseStep,
        )
        block_names = ("input", "timesteps", "latents", "conditioning", "denoise")

    pipe, parts = Blocks().init_pipeline(), build(SDXL)
    pipe.update_components(unet=parts.unet, vae=parts.vae, scheduler=parts.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("pictures", [[0], [0, 1]])
def test_a_modular_pipeline(pictures):
    """Its guider calls for each branch: from the gate on the second call is left out."""
    pipe, kwargs = modular_sdxl(), call(SDXL, pictures=pictures)
    names = ("height", "latents", "width")
    given = {name: value for name, value in kwargs.items() if name in names or name.endswith("embeds")}

    def run():
        return pipe(**given, num_inference_steps=6, output="latents")

    stock = run()
    with apply_tgate(pipe, TGateConfig(gate_step=6)):
        assert torch.equal(run(), stock)
    with apply_tgate(pipe, CONFIG) as tgate:
        latents = run()
        summary = tgate.summary()
    assert not torch.equal(latents, stock)
    assert summary.batches == (len(pictures),) * 8
    assert summary.cost.cross_computed == summary.cost.cross_reused
    assert torch.equal(run(), stock)


class Silent(diffusers.DiffusionPipeline):
    """A loop that nobody knows, which converts its timesteps and calls no callback."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    def __call__(self, latents, text):
        self.scheduler.set_timesteps(4)
        for now in self.scheduler.timesteps:  # diffusers' own loops name it `t`, which would say it
            self.transformer(latents, timestep=now.expand(1).clone(), encoder_hidden_states=text)


@pytest.mark.filterwarnings("ignore:Silent is not among the pipelines")
def test_a_loop_whose_step_nobody_can_tell_is_refused():
    wan, kwargs = build(WAN), call(WAN)
    pipe = Silent(wan.transformer, wan.scheduler)
    with (
        apply_tgate(pipe, CONFIG),
        pytest.raises(UnsupportedPipelineError, match="must say which step it is in, got a Silent, which calls no"),
    ):
        pipe(kwargs["latents"], kwargs["prompt_embeds"])
    pipe(kwargs["latents"], kwargs["prompt_embeds"])


# Half precision


def test_the_mean_of_halves_does_not_overflow():
    """Two outputs of 40,000 add up to more than float16 holds."""
    unet = build().unet.to(torch.float16)

    class Loud(AttnProcessor2_0):
        def __call__(self, attn, hidden_states, *args, **kwargs):
            return torch.full_like(hidden_states, 4e4)

    unet.set_attn_processor({n: Loud() if "attn2" in n else p for n, p in unet.attn_processors.items()})
    gate = Gate(TGateConfig(gate_step=1))
    unet.set_attn_processor(gated_processors(unet, gate))
    run = gate.start(3, guidance=True)
    for layer in cross_attention_layers(unet).values():
        states = torch.zeros(2, 5, layer.query_dim, dtype=torch.float16)
        layer(states, torch.zeros(2, 7, 12, dtype=torch.float16))
    run.advance()
    for layer in cross_attention_layers(unet).values():
        reused = layer(torch.zeros(1, 5, layer.query_dim, dtype=torch.float16))
        assert torch.equal(reused, torch.full_like(reused, 4e4))
    run.stop()
    unet.set_attn_processor(ungated_processors(unet))


def test_a_gate_that_never_closes_is_said_once_a_handle():
    pipe = build()
    message = (
        "`gate_step` should be below the number of steps, got 99 of 4: the gate never closed. Pass `gate_step=0.4`"
    )
    with apply_tgate(pipe, NEVER) as tgate:
        with pytest.warns(UserWarning, match=message):
            pipe(**call(), callback_on_step_end=tgate)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pipe(**call(), callback_on_step_end=tgate)
