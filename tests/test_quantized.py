"""Quantized denoisers as their packages make them: gated right, left alone, counted as what they stand for."""

import copy
from collections import defaultdict
from functools import cache, partial

import every  # noqa: F401  # registers its pipelines
import pytest
import torch
from at_hand import IS_OLDER
from diffusers import BitsAndBytesConfig, GGUFQuantizationConfig, QuantoConfig, TorchAoConfig
from diffusers.models.model_loading_utils import load_gguf_checkpoint
from diffusers.quantizers.bitsandbytes import bnb_quantizer
from seen import Seen
from tiny import fingerprint, left_behind
from zoo import ENTRIES, STEPS, of_pictures, seeded, wake

from tgate_processors import TGateConfig, apply_tgate
from tgate_processors._layers import cross_attention_layers
from tgate_processors._pipelines import denoisers_of, takes_callback


# diffusers' own, of what it will drop
pytestmark = pytest.mark.filterwarnings(
    "ignore:`QuantoConfig` is deprecated", "ignore:`QuantoQuantizer` is deprecated"
)
GATE = 2
CONFIG = TGateConfig(gate_step=GATE)
SD, PIXART, SD3, WAN = "StableDiffusionPipeline", "PixArtSigmaPipeline", "StableDiffusion3Pipeline", "WanPipeline"
WIDTH = 64  # of the text and of the layers: what is quantized in blocks has 32 or 64 to a block
HEADS = {"num_attention_heads": 2, "attention_head_dim": WIDTH // 2}
SIZES = {
    SD: {"block_out_channels": (WIDTH, WIDTH), "cross_attention_dim": WIDTH},
    PIXART: HEADS | {"cross_attention_dim": WIDTH, "caption_channels": WIDTH},
    SD3: HEADS | dict.fromkeys(("joint_attention_dim", "caption_projection_dim", "pooled_projection_dim"), WIDTH),
    WAN: HEADS | {"text_dim": WIDTH, "freq_dim": WIDTH, "ffn_dim": WIDTH},
}


def tiny(name):
    """The zoo's pipeline with layers that are wide enough, and a call of it."""
    pipe, kwargs = seeded(ENTRIES[name].build), ENTRIES[name].call([0])
    (narrow,) = denoisers_of(pipe)
    replace(pipe, wake(type(narrow).from_config({**narrow.config, **SIZES[name]})).eval().requires_grad_(False))
    for kind, key in enumerate(key for key in kwargs if key.endswith("embeds")):
        kwargs[key] = of_pictures([0], *kwargs[key].shape[1:-1], WIDTH, kind=kind)
    return pipe, kwargs


def replace(pipe, network):
    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", network)


# What is made of a network that lies in a folder


def loaded(network, folder, config, **how):
    return type(network).from_pretrained(folder, quantization_config=config, torch_dtype=torch.float32, **how)


def torchao(kind, network, folder):
    quantize = getattr(pytest.importorskip("torchao.quantization"), kind)
    try:
        return loaded(network, folder, TorchAoConfig(quantize()))
    except RuntimeError as error:
        if "requires a CUDA" in str(error):  # older ones
            pytest.skip(str(error))
        raise


def quanto(network, folder):
    pytest.importorskip("optimum.quanto")
    return loaded(network, folder, QuantoConfig(weights_dtype="int8"))


def bitsandbytes(settings, network, folder):
    """diffusers asks for a GPU, though the package has its kernels for the CPU too."""
    pytest.importorskip("bitsandbytes")
    with pytest.MonkeyPatch.context() as patch:
        for cls in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
            patch.setattr(cls, "validate_environment", lambda *args, **kwargs: None)
        return loaded(network, folder, BitsAndBytesConfig(**settings), device_map={"": "cpu"})


def gguf(kind, network, folder):
    """From a file, as diffusers loads it; PixArt cannot be loaded from one, and is given the same layers."""
    package = pytest.importorskip("gguf")
    if IS_OLDER and type(network).__name__ == "WanTransformer3DModel":
        pytest.skip("an older diffusers casts its timesteps to the type of the packed weights")
    layers = pytest.importorskip("diffusers.quantizers.gguf.utils")  # which imports it
    path, kind = folder / "network.gguf", package.GGMLQuantizationType[kind]
    linear = {f"{name}.weight" for name, layer in network.named_modules() if isinstance(layer, torch.nn.Linear)}
    writer = package.GGUFWriter(path, "toy")
    for name, tensor in network.state_dict().items():
        if name in linear:
            writer.add_tensor(name, package.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if hasattr(network, "from_single_file"):
        config = GGUFQuantizationConfig(compute_dtype=torch.float32)
        return type(network).from_single_file(
            str(path), config=str(folder), quantization_config=config, torch_dtype=torch.float32
        )
    state, biases = load_gguf_checkpoint(path), dict(network.named_parameters())
    layers._replace_with_gguf_linear(network, torch.float32, state)
    for name, layer in network.named_modules():
        if isinstance(layer, layers.GGUFLinear):
            layer.weight, layer.bias = state[f"{name}.weight"], biases[f"{name}.bias"]
    return network


def cast(network, folder):
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return network


KINDS = {
    "torchao int8": partial(torchao, "Int8WeightOnlyConfig"),
    "torchao int8 dynamic": partial(torchao, "Int8DynamicActivationInt8WeightConfig"),
    "quanto int8": quanto,
    "bitsandbytes int8": partial(bitsandbytes, {"load_in_8bit": True}),
    "bitsandbytes 4 bit": partial(bitsandbytes, {"load_in_4bit": True, "llm_int8_skip_modules": ["proj_out"]}),
    "gguf 4 bit": partial(gguf, "Q4_0"),
    "layerwise casting": cast,
}
# Activations too: where kernels differ by a rounding error, an activation may be rounded to its other neighbour.
DYNAMIC = {"torchao int8 dynamic", "bitsandbytes int8"}
# The other packages' networks cannot be copied: not without a gate either.
COPIED = ["torchao int8", "torchao int8 dynamic", "bitsandbytes int8", "bitsandbytes 4 bit"]
every_kind = pytest.mark.parametrize("kind", KINDS)
every_pipeline = pytest.mark.parametrize("name", SIZES)


def quantized(name, kind, folder):
    """A pipeline whose denoiser is quantized, and a call of it."""
    pipe, kwargs = tiny(name)
    (network,) = denoisers_of(pipe)
    network.save_pretrained(folder)
    replace(pipe, KINDS[kind](network, folder))
    return pipe, kwargs


def gated(pipe, kwargs, config=CONFIG):
    with apply_tgate(pipe, config) as tgate:
        return pipe(**kwargs, **({"callback_on_step_end": tgate} if takes_callback(pipe) else {}))[0], tgate


@cache
def unquantized(name):
    """The stock latents of what is quantized, and the summary of a gated run."""
    pipe, kwargs = tiny(name)
    return pipe(**kwargs)[0], gated(pipe, kwargs)[1].summary()


def tensors_of(network):
    return dict(network.named_parameters()) | dict(network.named_buffers())


@every_kind
@every_pipeline
def test_a_gate_that_never_closes_is_the_quantized_stock_pipeline(name, kind, tmp_path):
    pipe, kwargs = quantized(name, kind, tmp_path)
    stock, (plain, _) = pipe(**kwargs)[0], unquantized(name)
    assert 0 < (stock - plain).norm() < 0.5 * plain.norm()
    assert torch.equal(gated(pipe, kwargs, TGateConfig(gate_step=STEPS))[0], stock)
    assert torch.equal(pipe(**kwargs)[0], stock)


def by_hand(name, pipe, kwargs):
    """T-GATE from without: all is computed; from the gate on layers and network answer with what was kept."""
    (network,), kept, outputs = denoisers_of(pipe), defaultdict(list), []
    calls = 2 if name == WAN else 1

    def attend(layer, args, output):
        step = len(outputs) // calls
        if step == GATE - 1:
            kept[layer].append(output)
        return torch.stack(torch.cat(kept[layer]).chunk(2)).mean(0).expand_as(output) if step >= GATE else None

    def answer(network, args, output):
        outputs.append(output[0])
        step = (len(outputs) - 1) // calls
        if step < GATE:
            return None
        if calls == 2:
            return (outputs[step * calls],)
        return (outputs[-1].chunk(2)[name == SD3].repeat(2, 1, 1, 1),)  # there the positive branch goes on

    hooks = [layer.register_forward_hook(attend) for layer in cross_attention_layers(network).values()]
    hooks.append(network.register_forward_hook(answer))
    latents = pipe(**kwargs)[0]
    for hook in hooks:
        hook.remove()
    return latents


@every_kind
@every_pipeline
def test_a_closed_gate_is_t_gate_by_hand_and_leaves_no_trace(name, kind, tmp_path):
    pipe, kwargs = quantized(name, kind, tmp_path)
    (network,) = denoisers_of(pipe)
    stock = pipe(**kwargs)[0]
    before, tensors = fingerprint(network), tensors_of(network)
    seen = Seen(network)
    latents, tgate = gated(pipe, kwargs)
    seen.stop()
    summary = tgate.summary()
    assert left_behind(before, network) == {}
    assert tensors_of(network).keys() == tensors.keys()
    assert all(tensors_of(network)[key] is tensor for key, tensor in tensors.items())
    assert torch.equal(pipe(**kwargs)[0], stock)

    expected = by_hand(name, pipe, kwargs)
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-2 if kind in DYNAMIC else 2e-4)
    assert not torch.allclose(latents, stock, atol=0.1)
    batches = [1] * (2 * GATE) if name == WAN else [2] * GATE
    assert seen.batches == batches + [1] * (STEPS - GATE)
    assert seen.computed["cross"] == len(seen.cross) * len(batches)
    assert summary.batches == tuple(seen.batches)
    assert summary.notes == ()
    _, plain = unquantized(name)
    assert (summary.stock_macs, summary.cost) == (plain.stock_macs, plain.cost)
    assert summary.macs_saved > 0


@pytest.mark.parametrize("kind", COPIED)
def test_a_copy_is_stock(kind, tmp_path):
    pipe, kwargs = quantized(PIXART, kind, tmp_path)
    stock = pipe(**kwargs)[0]
    closed, _ = gated(pipe, kwargs)
    with apply_tgate(pipe, CONFIG):
        network = copy.deepcopy(pipe.transformer)
    assert type(network) is type(pipe.transformer)
    replace(pipe, network)
    assert torch.equal(pipe(**kwargs)[0], stock)
    assert torch.equal(gated(pipe, kwargs)[0], closed)
