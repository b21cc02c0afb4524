"""Beside caches that keep what blocks put out: diffusers' own, and cache-dit where it is installed."""

import copy
from functools import lru_cache, partial

import every  # noqa: F401  # registers its pipelines
import pytest
import torch
from at_hand import diffusers
from zoo import ENTRIES, class_of, seeded

from tgate_processors import StateError, TGateConfig, apply_tgate
from tgate_processors._families import FAMILIES, Guidance
from tgate_processors._layers import cross_attention_layers
from tgate_processors._pipelines import takes_callback


STEPS, GATE = 12, 6
CONFIG = TGateConfig(gate_step=GATE)
LTX, WAN, PIXART, SD3 = "LTXPipeline", "WanPipeline", "PixArtSigmaPipeline", "StableDiffusion3Pipeline"
SANA, QWEN, FLUX, COGVIDEOX = "SanaPipeline", "QwenImagePipeline", "FluxPipeline", "CogVideoXPipeline"
HUNYUAN, MOCHI, LATTE, ALLEGRO = "HunyuanVideoPipeline", "MochiPipeline", "LattePipeline", "AllegroPipeline"
COSMOS, LTX_2 = "CosmosTextToWorldPipeline", "LTX2Pipeline"
FRAMEPACK, HELIOS = "HunyuanVideoFramepackPipeline (two parts)", "HeliosPipeline (two chunks)"
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")


def first_block(clock):
    return diffusers.FirstBlockCacheConfig(threshold=0.3)


class Clock:
    """Tells a cache a timestep: 1000 in the first step of every run, in which nothing may be skipped, then 500."""

    def __init__(self):
        self.first = self.now = None

    def look(self, network, args, kwargs):
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        self.now = float(timestep.flatten()[-1])
        self.first = self.now if self.first is None else self.first

    def __call__(self):
        return 1000 if self.now == self.first else 500


def ranges(*kinds):
    """Of every second evaluation of these kinds of attention the output is reused."""
    values = {"block_skip_range": 2, "timestep_skip_range": (-1, 900)}
    return {f"{kind}_attention_{what}": value for kind in kinds for what, value in values.items()}


def pyramid(clock):
    kinds = ranges("spatial", "temporal", "cross")
    return diffusers.PyramidAttentionBroadcastConfig(**kinds, current_timestep_callback=clock)


def faster(clock, **settings):
    kinds = ranges("spatial", "temporal")
    return diffusers.FasterCacheConfig(**kinds, current_timestep_callback=clock, **settings)


def taylor(clock):
    names = [r".*(blocks|layers)\.\d+\.attn\d?"]
    return diffusers.TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32, cache_identifiers=names
    )


def magnitude(clock):
    ratios = [1.0, 0.9, 0.95, 0.97, 0.93, 0.99, 0.9, 0.98, 0.96, 0.97, 0.9, 0.85]
    return diffusers.MagCacheConfig(
        threshold=0.2, max_skip_steps=2, retention_ratio=0.2, num_inference_steps=STEPS, mag_ratios=ratios
    )


CACHES = {
    "FirstBlockCache": first_block,
    "PyramidAttentionBroadcast": pyramid,
    "FasterCache": partial(faster, is_guidance_distilled=True),
    "TaylorSeer": taylor,
    "MagCache": magnitude,
}
APPLY = {  # for networks without `enable_cache`
    "PyramidAttentionBroadcast": diffusers.hooks.apply_pyramid_attention_broadcast,
    "FasterCache": diffusers.hooks.apply_faster_cache,
    "MagCache": diffusers.hooks.apply_mag_cache,
}
# What runs on the stock pipelines.
PAIRS = {
    LTX: CACHES,
    COGVIDEOX: CACHES,
    MOCHI: CACHES,
    WAN: CACHES,
    FLUX: CACHES,
    QWEN: CACHES,
    HUNYUAN: ("FirstBlockCache", "TaylorSeer", "MagCache"),
    ALLEGRO: ("PyramidAttentionBroadcast", "FasterCache"),
    LATTE: ("PyramidAttentionBroadcast", "FasterCache"),
    LTX_2: ("PyramidAttentionBroadcast", "FasterCache", "TaylorSeer"),
    PIXART: ("PyramidAttentionBroadcast", "FasterCache", "MagCache"),
    SD3: ("PyramidAttentionBroadcast", "FasterCache", "MagCache"),
    SANA: ("PyramidAttentionBroadcast", "FasterCache"),
    COSMOS: ("PyramidAttentionBroadcast", "FasterCache"),
}
each_pair = pytest.mark.parametrize(
    ("name", "cache"), [(name, cache) for name, ones in PAIRS.items() for cache in ones]
)


def build(name, cache=None):
    pipe = seeded(ENTRIES[name].build)
    if cache is not None:
        enable(pipe.transformer, cache)
    return pipe


def enable(transformer, cache):
    clock = Clock()
    transformer.register_forward_pre_hook(clock.look, with_kwargs=True)
    config = CACHES[cache](clock)
    if hasattr(transformer, "enable_cache"):
        transformer.enable_cache(config)
    else:
        APPLY[cache](transformer, config)


def call(name, pictures=(0, 1)):
    return ENTRIES[name].call(list(pictures)) | {"num_inference_steps": STEPS}


def gated(pipe, name, config=CONFIG, pictures=(0, 1)):
    with apply_tgate(pipe, config) as tgate:
        return pipe(**call(name, pictures), **({"callback_on_step_end": tgate} if takes_callback(pipe) else {}))[0]


class Work:
    """The multiply-accumulates of a network's Linear layers."""

    def __init__(self, network):
        self.macs = 0
        layers = [module for module in network.modules() if isinstance(module, torch.nn.Linear)]
        self.hooks = [layer.register_forward_hook(self.add) for layer in layers]

    def add(self, layer, args, output):
        self.macs += args[0].numel() * layer.out_features

    def stop(self):
        for hook in self.hooks:
            hook.remove()
        return self.macs


def worked(pipe, run):
    work = Work(pipe.transformer)
    result = run()
    return result, work.stop()


@lru_cache
def work_of_the_gate_alone(name):
    pipe = build(name)
    return worked(pipe, lambda: gated(pipe, name))[1]


@each_pair
def test_a_gate_that_never_closes_changes_nothing_beside_a_cache(name, cache):
    stock = build(name, cache)(**call(name))[0]
    assert torch.equal(gated(build(name, cache), name, TGateConfig(gate_step=STEPS)), stock)


@each_pair
def test_a_pair_saves_more_than_the_gate_and_repeats_itself(name, cache):
    """Also after a run that failed in the middle, and on a pipeline that another run has left its state on."""
    pipe = build(name, cache)
    first, both = worked(pipe, lambda: gated(pipe, name))
    if (name, cache) != (QWEN, "FirstBlockCache"):  # which never finds its blocks alike
        assert both < work_of_the_gate_alone(name)
    forward, calls = pipe.transformer.forward, []

    def fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == GATE:
            raise MemoryError
        return forward(*args, **kwargs)

    pipe.transformer.forward = fails
    with pytest.raises(MemoryError):
        gated(pipe, name)
    pipe.transformer.forward = forward
    assert torch.equal(gated(pipe, name), first)


@pytest.mark.parametrize(
    ("name", "cache"),
    [(FRAMEPACK, "PyramidAttentionBroadcast"), (HELIOS, "PyramidAttentionBroadcast"), (HELIOS, "TaylorSeer")],
)
def test_a_loop_goes_on_with_what_the_one_before_it_kept(name, cache):
    """A call of theirs has several loops, and a run of the gate is one of them."""
    stock = build(name, cache)(**call(name))[0]
    assert torch.equal(gated(build(name, cache), name, TGateConfig(gate_step=STEPS)), stock)
    pipe = build(name, cache)
    first = gated(pipe, name)
    assert torch.equal(gated(pipe, name), first)


def reference(name, cache):
    """The stock pipeline, which from the gate on is answered by a copy of its denoiser that has a cache of its own.

    The copy is given the positive branch alone, cut out by hand.
    """
    pipe = build(name, cache)
    fresh = copy.deepcopy(build(name).transformer)
    enable(fresh, cache)
    calls = 2 if FAMILIES[class_of(name)].guidance is Guidance.CALLS else 1
    forward, count, first = pipe.transformer.forward, [0], []

    def answer(*args, **kwargs):
        step, number = divmod(count[0], calls)
        count[0] += 1
        if step < GATE:
            return forward(*args, **kwargs)
        if number:
            return first[-1]
        context = "cond" if calls == 2 else "cond_uncond"
        with fresh.cache_context(context):
            if calls == 1:
                args = [second(one) for one in args]
                kwargs = {key: one if key == "image_rotary_emb" else second(one) for key, one in kwargs.items()}
            output = fresh(*args, **kwargs)
        first.append(output if calls == 2 else tuple(torch.cat([one, one]) for one in output))
        return first[-1]

    pipe.transformer.forward = answer
    return pipe(**call(name, [0]))[0]


def second(value):
    """The second row of two."""
    return value[1:] if isinstance(value, torch.Tensor) and value.ndim > 0 and value.shape[0] == 2 else value


@pytest.mark.parametrize(
    ("name", "cache"),
    [(name, cache) for name in (COGVIDEOX, MOCHI, QWEN, FLUX) for cache in ("FirstBlockCache", "TaylorSeer")]
    # with a call for each branch it keeps one state for both, which the copy has not seen
    + [(name, "PyramidAttentionBroadcast") for name in (COGVIDEOX, MOCHI)],
)
def test_after_the_gate_a_cache_begins_anew(name, cache):
    assert not cross_attention_layers(build(name).transformer)
    expected = reference(name, cache)
    latents = gated(build(name, cache), name, pictures=[0])
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [LTX, WAN, COGVIDEOX, QWEN])
@pytest.mark.parametrize("cache", CACHES)
def test_looks_beside_a_cache(name, cache):
    """The batch changes there and back at each."""
    config = TGateConfig(gate_step=4, look_interval=3)
    pipe = build(name, cache)
    first = gated(pipe, name, config)
    assert torch.isfinite(first).all()
    assert torch.equal(gated(pipe, name, config), first)


@pytest.mark.parametrize("name", [LTX, WAN, SANA])
def test_fastercache_that_drops_guidance_itself_is_refused(name):
    """However it was put there, before or after the gate."""
    config = faster(
        Clock(),
        is_guidance_distilled=False,
        unconditional_batch_timestep_skip_range=(-1, 900),
        unconditional_batch_skip_range=3,
        tensor_format="BCHW" if name == SANA else "BCFHW",
    )
    message = "must not have FasterCache enabled on its .* with T-GATE: FasterCache leaves out the negative branch"
    pipe = build(name)
    tgate = apply_tgate(pipe, CONFIG)
    diffusers.hooks.apply_faster_cache(pipe.transformer, config)
    with pytest.raises(StateError, match=message):
        pipe(**call(name), callback_on_step_end=tgate)
    tgate.remove()
    with pytest.raises(StateError, match=message):
        apply_tgate(pipe, CONFIG)


# cache-dit


@pytest.fixture
def dit():
    """Enables cache-dit on a pipeline, and takes it off again: it is put on the class."""
    cache_dit = pytest.importorskip("cache_dit", minversion="1.5")
    on = []

    def enable(pipe, **more):
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=0.9,
            max_warmup_steps=2,
            max_continuous_cached_steps=2,
            **more,
        )
        cache_dit.enable_cache(pipe, cache_config=config)
        on.append(pipe)
        return pipe

    yield enable
    for pipe in on:
        cache_dit.disable_cache(pipe)


@pytest.mark.parametrize("name", [PIXART, SANA, SD3, WAN, QWEN])
def test_cache_dit(name, dit):
    gate_alone = work_of_the_gate_alone(name)  # cache-dit is put on the class
    pipe = dit(build(name))
    stock = pipe(**call(name))[0]
    assert torch.equal(gated(pipe, name, TGateConfig(gate_step=STEPS)), stock)
    latents, both = worked(pipe, lambda: gated(pipe, name))
    assert both < gate_alone
    assert torch.equal(gated(pipe, name), latents)
    (context, *_) = pipe.transformer._context_manager._cached_context_manager.values()
    assert context.executed_steps == STEPS  # it counts the steps as they are, though calls were left out


def test_cache_dit_that_is_told_when_to_reuse_is_not_told_so_at_the_gate(dit):
    """The sixth step stores cross-attention, and the seventh is the first of one branch: both are computed whole."""
    mask = [1, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1]
    settings = {"num_inference_steps": STEPS, "steps_computation_mask": mask, "steps_computation_policy": "static"}
    pipe = dit(build(PIXART), **settings)
    seen = []
    blocks = pipe.transformer.transformer_blocks
    hooks_of_blocks = [block.register_forward_hook(lambda *_: seen.append(1)) for block in blocks]
    assert torch.isfinite(gated(pipe, PIXART)).all()
    for hook in hooks_of_blocks:
        hook.remove()
    assert len(seen) == 9 * len(blocks) + 3  # the first block is computed in each step
    assert mask == [1, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1]


def table():
    """What the pairs of `PAIRS` compute, as parts of the stock pipeline's work, for docs/composing.md."""
    rows = [["network", "gate alone", *CACHES], ["---"] * (2 + len(CACHES))]
    for name, caches in PAIRS.items():
        stock_pipe, gated_pipe = build(name), build(name)
        stock = worked(stock_pipe, partial(stock_pipe, **call(name)))[1]
        row = [
            type(stock_pipe.transformer).__name__,
            f"{worked(gated_pipe, partial(gated, gated_pipe, name))[1] / stock:.2f}",
        ]
        for cache in CACHES:
            if cache not in caches:
                row.append("")
                continue
            alone, both = build(name, cache), build(name, cache)
            parts = worked(alone, partial(alone, **call(name)))[1], worked(both, partial(gated, both, name))[1]
            row.append(" to ".join(f"{part / stock:.2f}" for part in parts))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    print(table())
