"""What `summary()` counts is what really happens, multiplication by multiplication; what it cannot count, it says."""

from dataclasses import replace
from functools import partial
from itertools import count

import every  # noqa: F401  # registers its pipelines
import pytest
import tomesd
import torch
import zoo_unets
from adapters import load_ip_adapters, lora, with_images
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SDCFGCutoffCallback
from diffusers.models import attention_processor as zoo_of_processors
from diffusers.models.transformers.transformer_wan import WanAttention
from tiny import fingerprint, left_behind
from zoo import ENTRIES, STEPS, seeded

from tgate_processors import TGateConfig, apply_tgate
from tgate_processors import _deepcache as deepcache
from tgate_processors._layers import attention_layers, cross_attention_layers
from tgate_processors._pipelines import denoisers_of, side_networks_of, takes_callback
from tgate_processors.measure.quality import _counting


GATE = 2
CONFIG = TGateConfig(gate_step=GATE)
SELF_ATTENTION_TOO = TGateConfig(gate_step=3, sp_interval=2, fi_interval=2)
SD, CONTROLNET, WAN = "StableDiffusionPipeline", "StableDiffusionControlNetPipeline", "WanPipeline"


def tiny(name=SD):
    return seeded(ENTRIES[name].build), ENTRIES[name].call([0])


def networks_of(pipe):
    return list({id(network): network for network in [*denoisers_of(pipe), *side_networks_of(pipe)]}.values())


def happens(pipe, kwargs, callback=None):
    """The multiply-accumulates that a run really does, seen from its networks' calls."""
    with _counting(networks_of(pipe)) as counted:
        pipe(**kwargs, **({} if callback is None else {"callback_on_step_end": callback}))
    return sum(counted)


def gated(pipe, kwargs, config=CONFIG, mine=None, beside=None, helper=None):
    """What a gated run really does, and its summary.

    Args:
        mine: A callback that the handle is given.
        beside: A callback that stands beside the handle.
        helper: Of DeepCache.
    """
    with apply_tgate(pipe, config, callback_on_step_end=mine, deepcache=helper) as tgate:
        callback = tgate if beside is None else MultiPipelineCallbacks([tgate, beside])
        return happens(pipe, kwargs, callback if takes_callback(pipe) else None), tgate.summary()


def is_exact(pipe, kwargs, config=CONFIG, mine=None, beside=None):
    """Whether a gated run and its stock run are counted as they happen; gives the summary."""
    stock = happens(pipe, kwargs, mine or beside)
    really, summary = gated(pipe, kwargs, config, mine, beside)
    assert (summary.stock_macs, summary.cost.macs) == (stock, really)
    assert 0 < really < stock
    return summary


# Of the pipelines one of each kind; all 98 entries of the zoo were found to be exact.
@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPAGPipeline",
        "StableDiffusionXLPAGPipeline",
        "PixArtSigmaPAGPipeline",
        "SanaPAGPipeline",
        "StableDiffusionControlNetXSPipeline",
        "HunyuanDiTControlNetPipeline",
        "StableDiffusionControlNetPipeline (guess mode)",
        "StableVideoDiffusionPipeline",
        "WanPipeline",
        "WanPipeline (two denoisers)",
        "AnimateDiffPipeline",
        "Kandinsky3Pipeline",
        "LTXPipeline",
        "LuminaPipeline",
    ],
)
def test_what_is_counted_is_what_happens(name):
    assert is_exact(*tiny(name), SELF_ATTENTION_TOO).notes == ()


@pytest.mark.parametrize("name", ["ZImagePipeline", "Lumina2Pipeline", "QwenImagePipeline", "HunyuanVideoPipeline"])
def test_telling_writes_to_nothing_of_the_network(name):
    """Some keep their positions in objects that are no modules."""
    pipe, kwargs = tiny(name)
    stock = pipe(**kwargs)[0]
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        tgate.summary()
    assert torch.equal(pipe(**kwargs)[0], stock)


# What changes within a run


def test_latents_that_grow():
    def grows(pipe, step, timestep, kwargs):
        if step == GATE:
            kwargs["latents"] = torch.nn.functional.interpolate(kwargs["latents"], scale_factor=2)
        return kwargs

    pipe, kwargs = tiny()
    assert is_exact(pipe, kwargs | {"num_inference_steps": 6}, mine=grows).notes == ()
    tomesd.apply_patch(pipe, sx=2, sy=2, use_rand=False)  # it notes the size in a hook
    assert is_exact(pipe, kwargs | {"num_inference_steps": 6}, mine=grows).notes == ()


def test_a_text_that_becomes_shorter():
    def shortens(pipe, step, timestep, kwargs):
        return {"prompt_embeds": kwargs["prompt_embeds"][:, :3]} if step == 0 else kwargs

    pipe, kwargs = tiny()
    inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert is_exact(pipe, kwargs | inputs, mine=shortens).notes == ()


def test_branches_that_are_calls_with_texts_of_two_lengths():
    pipe, kwargs = tiny(WAN)
    kwargs["negative_prompt_embeds"] = torch.cat([kwargs["negative_prompt_embeds"]] * 2, 1)
    assert is_exact(pipe, kwargs).notes == ()


def test_guidance_that_another_callback_cuts():
    cut = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    assert is_exact(*tiny(), TGateConfig(gate_step=3), beside=cut).notes == ()


def test_an_adapter_that_another_callback_silences_is_said():
    """A silent one is not computed, and which steps it was in nobody has noted."""
    pipe, kwargs = tiny()
    load_ip_adapters(pipe)
    cut = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    really, summary = gated(pipe, with_images(kwargs), beside=cut)
    assert summary.notes == ("the scale of an IP-Adapter is 0 now: the whole run is counted without it",)
    assert summary.cost.macs < really
    assert is_exact(pipe, with_images(kwargs)).notes == summary.notes  # and now it is


# Runs that do not end


class Stop(Exception):
    pass


def raises(at):
    calls = count()

    def hook(*_):
        if next(calls) == at:
            raise Stop

    return hook


@pytest.mark.parametrize(("at", "done"), [(1, 1), (2, 2), (3, None)])
def test_a_run_that_fails_in_the_denoiser(at, done):
    """The call in which it failed counts for nobody. The last step alone may have been done for all that is known."""
    pipe, kwargs = tiny()
    hook = pipe.unet.register_forward_pre_hook(raises(at))
    with apply_tgate(pipe, CONFIG) as tgate:
        with pytest.raises(Stop):
            pipe(**kwargs, callback_on_step_end=tgate)
        summary = tgate.summary()
    hook.remove()
    stock = happens(*tiny()) // STEPS
    assert summary.stock_macs == at * stock
    assert (summary.macs_saved == 0) is (at <= GATE)
    assert summary.gate_closed_at == (GATE if at > GATE else None)
    assert summary.notes == (() if done is None else (f"{done} of {STEPS} steps are done",))


def test_a_run_that_fails_where_branches_are_calls():
    pipe, kwargs = tiny(WAN)
    hook = pipe.transformer.register_forward_pre_hook(raises(3))
    with apply_tgate(pipe, CONFIG) as tgate:
        with pytest.raises(Stop):
            pipe(**kwargs, callback_on_step_end=tgate)
        assert tgate.summary().notes == (f"1 of {STEPS} steps are done",)
    hook.remove()


def test_a_summary_from_within_a_run_changes_nothing():
    pipe, kwargs = tiny()
    with apply_tgate(pipe, CONFIG) as tgate:
        expected = pipe(**kwargs, callback_on_step_end=tgate)[0]
        whole, said, random = str(tgate.summary()), [], torch.get_rng_state()

        def asks(pipe, step, timestep, kwargs):
            said.append(tgate.summary())
            return kwargs

        tgate.callback_on_step_end = asks
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], expected)
        assert str(tgate.summary()) == str(said[-1]) == whole
    assert torch.equal(torch.get_rng_state(), random)
    assert [one.notes for one in said[:2]] == [(f"{step} of {STEPS} steps are done",) for step in (1, 2)]
    assert [len(one.evaluations) for one in said] == [1, 2, 3, 4]
    assert [one.gate_closed_at for one in said] == [None, None, GATE, GATE]


# What is on the pipeline


def merged_lora(pipe, kwargs):
    pipe.load_lora_weights(lora(pipe))
    pipe.fuse_lora()


def ip_adapters(pipe, kwargs):
    load_ip_adapters(pipe, 2)
    kwargs |= with_images(kwargs, 2)


def joint_layers_beside(pipe, kwargs):
    """Blocks whose text joins self-attention: neither is ever reused there."""
    down, up = ("CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    pipe.unet = zoo_unets.unet(down_block_types=down, up_block_types=up, mid_block_type="UNetMidBlock2DCrossAttn")
    pipe.unet.eval().requires_grad_(False)


ON_PIPELINES = {
    "LoRA": lambda pipe, kwargs: pipe.load_lora_weights(lora(pipe)),
    "LoRA, merged": merged_lora,
    "IP-Adapters": ip_adapters,
    "projections as one": lambda pipe, kwargs: pipe.fuse_qkv_projections(),
    "sliced attention": lambda pipe, kwargs: pipe.enable_attention_slicing(1),
    "the first processors": lambda pipe, kwargs: pipe.unet.set_attn_processor(zoo_of_processors.AttnProcessor()),
    "tokens merged": lambda pipe, kwargs: tomesd.apply_patch(pipe, sx=2, sy=2),
    "half precision": lambda pipe, kwargs: pipe.to(torch.bfloat16),
    "joint layers beside": joint_layers_beside,
}


@pytest.mark.parametrize("name", ON_PIPELINES)
def test_what_is_on_a_pipeline(name):
    pipe, kwargs = tiny()
    ON_PIPELINES[name](pipe, kwargs)
    given = {k: v.to(pipe.unet.dtype) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    assert is_exact(pipe, given, SELF_ATTENTION_TOO).notes == ()


def test_a_cache_in_the_hosts_memory():
    assert is_exact(*tiny(), replace(SELF_ATTENTION_TOO, offload_cache=True)).notes == ()


@pytest.mark.parametrize("name", [SD, CONTROLNET])
def test_beside_deepcache(name):
    """The stock pipeline has no DeepCache; a ControlNet is not told of it."""
    pipe, kwargs = tiny(name)
    kwargs |= {"num_inference_steps": 8}
    stock, helper = happens(pipe, kwargs), deepcache.make_helper(pipe, 2, 0)
    with deepcache.enabled(helper):
        really, summary = gated(pipe, kwargs, SELF_ATTENTION_TOO, helper=helper)
    assert (summary.stock_macs, summary.cost.macs, summary.notes) == (stock, really, ())


def wrap_each_block(unet):
    for module in list(unet.modules()):
        if hasattr(module, "transformer_blocks"):
            blocks = [torch.compile(block, backend="eager") for block in module.transformer_blocks]
            module.transformer_blocks = torch.nn.ModuleList(blocks)
    return unet


def compile_in_place(unet):
    unet.compile(backend="eager")
    return unet


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # the counter has hooks on all modules
@pytest.mark.parametrize("compiles", [partial(torch.compile, backend="eager"), compile_in_place, wrap_each_block])
def test_compiled(compiles):
    """Without its graphs: what matters is what stands around, and a counter does not see into graphs."""
    pipe, kwargs = tiny()
    load_ip_adapters(pipe)
    pipe.unet = compiles(pipe.unet)
    with torch.compiler.set_stance("force_eager"):
        assert is_exact(pipe, with_images(kwargs)).notes == ()


def test_other_attention_backends_are_counted_as_torch_does_them():
    pipe, kwargs = tiny(WAN)
    stock = happens(pipe, kwargs)
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        for layer in attention_layers(pipe.transformer).values():
            layer.processor._attention_backend = "flash"  # which is not installed
        summary = tgate.summary()
    assert (summary.stock_macs, summary.notes) == (stock, ())


class StandInForXFormers:
    """Its one function, which needs values."""

    class ops:
        @staticmethod
        def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None):
            assert query.device.type != "meta"
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)


def test_xformers(monkeypatch):
    monkeypatch.setattr(zoo_of_processors, "xformers", StandInForXFormers)
    pipe, kwargs = tiny()
    pipe.unet.set_attn_processor(zoo_of_processors.XFormersAttnProcessor())
    said = "layers with XFormersAttnProcessor are counted as AttnProcessor2_0"
    assert is_exact(pipe, kwargs).notes == (said,)


# Quantized networks: counted as the layers whose arithmetic they replace


class Packed(torch.nn.Module):
    """A quantized layer as packages have them: its weights are packed, and cannot be read without values."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (layer.weight / scale).round().to(torch.int8).reshape(-1, 1))
        self.register_buffer("scale", scale)
        self.bias = layer.bias

    def forward(self, states):
        assert self.packed.any(), "it needs values"
        weight = self.packed.reshape(self.out_features, self.in_features) * self.scale
        return torch.nn.functional.linear(states, weight, self.bias)


class PackedConv(torch.nn.Conv2d):
    """The same of a convolution, which is one."""

    def forward(self, states):
        assert self.weight.any(), "it needs values"
        return super().forward(states)


def pack(network):
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear:
                setattr(parent, name, Packed(child))
            elif type(child) is torch.nn.Conv2d:
                child.__class__ = PackedConv


def quantize_dynamically(network):
    torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)


quantized = pytest.mark.parametrize("quantize", [quantize_dynamically, pack])
# PyTorch's quantization is deprecated for torchao's
ignored = pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore::UserWarning:torch.ao")


@quantized
@ignored
@pytest.mark.parametrize("name", [SD, "PixArtAlphaPipeline"])
def test_a_quantized_network_is_counted_as_the_network(name, quantize):
    pipe, kwargs = tiny(name)
    _, expected = gated(pipe, kwargs, SELF_ATTENTION_TOO)
    quantize(denoisers_of(pipe)[0])
    _, summary = gated(pipe, kwargs, SELF_ATTENTION_TOO)
    assert (summary.stock_macs, summary.cost) == (expected.stock_macs, expected.cost)
    assert summary.notes == ()


def by_hand(unet, kwargs):
    """T-GATE written out for one picture: both branches, the mean of their cross-attention, then one branch."""
    scheduler = zoo_unets.scheduler()
    scheduler.set_timesteps(STEPS)
    stored, mode = {}, ["compute"]

    def look(layer, args, output):
        if mode[0] == "store":
            stored[layer] = output.chunk(2)[0] / 2 + output.chunk(2)[1] / 2
        return stored[layer] if mode[0] == "reuse" else output

    hooks = [layer.register_forward_hook(look) for layer in cross_attention_layers(unet).values()]
    latents, negative = kwargs["latents"], kwargs["negative_prompt_embeds"]
    text = torch.cat([negative, kwargs["prompt_embeds"]])
    for step, timestep in enumerate(scheduler.timesteps):
        mode[0] = "reuse" if step >= GATE else "store" if step == GATE - 1 else "compute"
        if step < GATE:
            first, second = unet(torch.cat([latents] * 2), timestep, text).sample.chunk(2)
            noise = first + kwargs["guidance_scale"] * (second - first)
        else:
            noise = unet(latents, timestep, negative).sample
        latents = scheduler.step(noise, timestep, latents).prev_sample
    for hook in hooks:
        hook.remove()
    return latents


@quantized
@ignored
@torch.no_grad()
def test_the_picture_of_a_quantized_network(quantize):
    pipe, kwargs = tiny()
    plain = by_hand(pipe.unet, kwargs)
    quantize(pipe.unet)
    stock, before = pipe(**kwargs)[0], fingerprint(pipe.unet)
    expected = by_hand(pipe.unet, kwargs)
    with apply_tgate(pipe, TGateConfig(gate_step=STEPS)) as tgate:
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], stock)
    with apply_tgate(pipe, CONFIG) as tgate:
        torch.testing.assert_close(pipe(**kwargs, callback_on_step_end=tgate)[0], expected, rtol=1e-5, atol=1e-5)
        tgate.summary()
    assert not torch.allclose(expected, stock, atol=1e-3)
    assert not torch.equal(expected, plain)
    assert left_behind(before, pipe.unet) == {}
    assert torch.equal(pipe(**kwargs)[0], stock)


# A user's own


class Plain:
    """A processor of somebody's own, of no class of diffusers."""

    def __init__(self):
        self.scale = 2.0

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        plain = zoo_of_processors.AttnProcessor2_0()
        return plain(attn, hidden_states, encoder_hidden_states, attention_mask) * self.scale


class Counts(zoo_of_processors.AttnProcessor2_0):
    """One that keeps something from call to call."""

    made = 0

    def __new__(cls):
        cls.made += 1
        return super().__new__(cls)

    def __init__(self):
        super().__init__()
        self.calls, self.shapes, self.of_layers = 0, [], {"calls": [0]}

    def __call__(self, attn, hidden_states, *args, **kwargs):
        self.calls += 1
        self.of_layers["calls"][0] += 1
        self.shapes.append(hidden_states.shape)
        return super().__call__(attn, hidden_states, *args, **kwargs)


class Weighs(torch.nn.Module):
    """One with weights, which is a module beside."""

    made = 0

    def __new__(cls):
        cls.made += 1
        return super().__new__(cls)

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((), 2.0))
        self.calls = 0

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        self.calls += 1
        plain = zoo_of_processors.AttnProcessor2_0()
        return plain(attn, hidden_states, encoder_hidden_states, attention_mask) * self.gain


def attributes(processor):
    """What is in a processor: which objects, and what these print as."""
    within = vars(processor) | {"made": getattr(type(processor), "made", 0)}
    return {name: (id(value), repr(value)) for name, value in within.items()}


@pytest.mark.parametrize("kind", [Plain, Counts, Weighs])
def test_a_users_own_processor_is_neither_called_nor_changed(kind):
    pipe, kwargs = tiny()
    plain = happens(pipe, kwargs)
    pipe.unet.set_attn_processor({name: kind() for name in pipe.unet.attn_processors})
    own = list(pipe.unet.attn_processors.values())
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        before, network = list(map(attributes, own)), fingerprint(pipe.unet)
        summary = tgate.summary()
        assert list(map(attributes, own)) == before
        assert left_behind(network, pipe.unet) == {}
    assert {parameter.device.type for parameter in pipe.unet.parameters()} == {"cpu"}
    assert summary.notes == (f"layers with {kind.__name__} are counted as AttnProcessor2_0",)
    assert summary.stock_macs == plain


def test_what_tomesd_keeps_is_not_changed():
    """The generator that it draws tokens with is the user's: the next picture would be another one."""
    pipe, kwargs = tiny()
    tomesd.apply_patch(pipe, sx=2, sy=2)
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        kept = pipe.unet._tome_info
        before, generator = repr(kept), kept["args"]["generator"]
        state = generator.get_state()
        tgate.summary()
    assert repr(kept) == before
    assert torch.equal(generator.get_state(), state)


class Notes(torch.nn.Module):
    """A module of somebody's own that writes down what it sees."""

    def __init__(self, block):
        super().__init__()
        self.block, self.seen, self.by_shape = block, [], {"all": []}

    def forward(self, hidden_states, *args, **kwargs):
        self.seen.append(hidden_states.shape)
        self.by_shape["all"].append(hidden_states.shape)
        return self.block(hidden_states, *args, **kwargs)


def test_what_a_users_own_module_writes_down_is_not_changed():
    pipe, kwargs = tiny()
    notes = pipe.unet.conv_in = Notes(pipe.unet.conv_in)
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        tgate.summary()
    assert len(notes.seen) == len(notes.by_shape["all"]) == STEPS


# Bad luck


class NeedsValues(Notes):
    def forward(self, hidden_states, *args, **kwargs):
        if hidden_states.device.type == "meta":
            raise RuntimeError("no values\nhere")
        return super().forward(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("part", ["unet", "controlnet"])
def test_a_network_that_needs_values_is_not_counted_and_all_else_is_said(part):
    pipe, kwargs = tiny(CONTROLNET)
    _, expected = gated(pipe, kwargs)
    network = getattr(pipe, part)
    network.conv_in = NeedsValues(network.conv_in)
    _, summary = gated(pipe, kwargs)
    assert summary.notes == ("the arithmetic could not be counted: RuntimeError: no values",)
    assert (summary.stock_macs, summary.cost.macs) == (0, 0)
    kept = ("evaluations", "side_evaluations", "cache_bytes", "gate_closed_at", "batches")
    assert all(getattr(summary, name) == getattr(expected, name) for name in kept)
    assert ["arithmetic", "not counted"] in [line.split(maxsplit=1) for line in str(summary).splitlines()]


def test_a_layer_without_a_default_processor(monkeypatch):
    pipe, kwargs = tiny(WAN)
    for layer in attention_layers(pipe.transformer).values():
        layer.set_processor(type("Own", (type(layer.processor),), {"__module__": "users"})())
    monkeypatch.delattr(WanAttention, "_default_processor_cls")
    _, summary = gated(pipe, kwargs)
    reason = "UnsupportedPipelineError: WanAttention has no default processor that could be counted"
    assert summary.notes == (f"the arithmetic could not be counted: {reason}",)
    assert summary.batches == (1,) * (2 * GATE + STEPS - GATE)
