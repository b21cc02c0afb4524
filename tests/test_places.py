"""Where a gated pipeline runs: offloaded, in other precisions, compiled, in threads, two on one denoiser."""

import copy
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import diffusers
import pytest
import torch
import zoo_motion  # noqa: F401  # registers its pipelines
import zoo_transformers  # noqa: F401  # registers its pipelines
from diffusers.hooks import apply_group_offloading
from seen import Seen
from test_tricks import CONFIG, GATE, gated, holds, tiny
from tiny import fingerprint, left_behind
from torch._dynamo.utils import counters
from zoo import ENTRIES, STEPS
from zoo_unets import one_block

from tgate_processors import TGateConfig, apply_tgate
from tgate_processors._layers import cross_attention_layers
from tgate_processors.processors import GatedProcessor


# Offload. Here weights go from the host to the host, by the same hooks.


def offload_by_hooks(pipe):
    """What `enable_model_cpu_offload` puts on a model, which itself asks for an accelerator."""
    from accelerate import cpu_offload_with_hook

    cpu_offload_with_hook(pipe.unet, torch.device("cpu"))


def offload_sequentially(pipe):
    """What `enable_sequential_cpu_offload` puts on a model: weights wait elsewhere, layer by layer."""
    from accelerate import cpu_offload

    for part in (pipe.vae, pipe.unet):
        cpu_offload(part, torch.device("cpu"), offload_buffers=True)


def offload_groups(pipe):
    cpu = torch.device("cpu")
    apply_group_offloading(pipe.unet, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def dispatch(pipe):
    """What `device_map` puts on a model."""
    from accelerate import dispatch_model

    dispatch_model(pipe.unet, {"": "cpu"}, force_hooks=True)


NEEDS_TORCH = pytest.mark.skipif(torch.__version__ < "2.7", reason="torch 2.6 asks for an accelerator")
OFFLOADS = [offload_by_hooks, offload_sequentially, pytest.param(offload_groups, marks=NEEDS_TORCH), dispatch]


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_before(offload):
    pipe, kwargs = tiny()
    expected = gated(pipe, kwargs)
    offload(pipe)
    assert torch.equal(holds(pipe, kwargs), expected)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_offload_while_gated(offload):
    pipe, kwargs = tiny()
    expected, stock = gated(pipe, kwargs), pipe(**kwargs)[0]
    with apply_tgate(pipe, CONFIG) as tgate:
        offload(pipe)
        for _ in range(2):
            assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], expected)
    assert torch.equal(pipe(**kwargs)[0], stock)


@pytest.mark.parametrize("offload", OFFLOADS)
def test_a_summary_of_an_offloaded_run(offload):
    pipe, kwargs = tiny()
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        expected = str(tgate.summary())
        offload(pipe)
        pipe(**kwargs, callback_on_step_end=tgate)
        assert str(tgate.summary()) == expected


# Precision and layout


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_half_precision(name, dtype):
    pipe, kwargs = tiny(name)
    pipe.to(dtype)
    kwargs = {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    stored = []
    hook = pipe.unet.register_forward_hook(lambda *_: stored.extend(stored_in(pipe.unet)))
    assert holds(pipe, kwargs).dtype is dtype
    hook.remove()
    assert stored
    assert {output.dtype for output in stored} == {dtype}


def stored_in(unet):
    """The outputs that its layers may reuse in the evaluation that is going on."""
    gated = [p for p in unet.attn_processors.values() if isinstance(p, GatedProcessor)]
    return [output for processor in gated for output in processor.state.stored]


def test_channels_last():
    pipe, kwargs = tiny()
    pipe.unet.to(memory_format=torch.channels_last)
    holds(pipe, kwargs)


def test_layerwise_casting():
    pipe, kwargs = tiny()
    pipe.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    holds(pipe, kwargs)


def test_gradients():
    """With gradients on, after the gate they flow through the cached output to nothing that is kept."""
    pipe, kwargs = tiny()
    pipe.unet.requires_grad_(True)
    expected = gated(pipe, kwargs)
    call = type(pipe).__call__.__wrapped__  # without the pipeline's `no_grad`
    with apply_tgate(pipe, CONFIG) as tgate:
        latents = call(pipe, **kwargs, callback_on_step_end=tgate)[0]
        assert tgate.gate.cache_bytes == 0
    assert torch.equal(latents, expected)
    latents.sum().backward()
    assert pipe.unet.conv_in.weight.grad.any()


# Compiling


def compile_around(pipe):
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)


def compile_in_place(pipe):
    pipe.unet.compile(backend="eager", fullgraph=True)


CROSS_ATTENTION_ONLY = (CONFIG, 3)  # planning, closing, fidelity
SELF_ATTENTION_TOO = (TGateConfig(gate_step=5, sp_interval=3, warm_up=1), 5)  # and its storing and reusing


@pytest.mark.parametrize(
    ("compiles", "when", "config", "graphs"),
    [
        (compile_around, "after", *CROSS_ATTENTION_ONLY),
        (compile_in_place, "before", *CROSS_ATTENTION_ONLY),
        (compile_in_place, "after", *CROSS_ATTENTION_ONLY),
        (compile_around, "before", *SELF_ATTENTION_TOO),
    ],
)
def test_compiled_graphs(compiles, when, config, graphs):
    torch._dynamo.reset()
    pipe, kwargs = one_block()
    kwargs["num_inference_steps"] = 7
    eager = gated(pipe, kwargs, config)
    before = fingerprint(pipe.unet)
    counters.clear()
    if when == "before":
        compiles(pipe)
        before = fingerprint(pipe.unet)
    with apply_tgate(pipe, config) as tgate:
        if when == "after":
            compiles(pipe)
        for run in range(3):
            assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], eager)
            assert counters["stats"]["unique_graphs"] == graphs, f"in run {run}"
    assert not counters["graph_break"]
    if when == "before":
        assert left_behind(before, pipe.unet) == {}
    assert torch.equal(pipe(**kwargs)[0], one_block()[0](**kwargs)[0])


def test_stored_outputs_survive_a_replay():
    """With `mode="reduce-overhead"` a graph's outputs are memory of the graphs, and the next replay takes it back."""
    given_out = []

    def replayed(graph, inputs):
        """A compiler that does to outputs what CUDA graphs do to theirs."""

        def replay(*args):
            for tensor in given_out:
                tensor.fill_(float("nan"))
            given_out[:] = [tensor for tensor in graph(*args) if isinstance(tensor, torch.Tensor)]
            return tuple(given_out)

        return replay

    torch._dynamo.reset()
    pipe, kwargs = one_block()
    expected = gated(pipe, kwargs)
    pipe.unet.compile(backend=replayed)
    with apply_tgate(pipe, CONFIG) as tgate:
        for _ in range(2):
            assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], expected)


def test_a_cache_in_the_hosts_memory():
    """On a CPU it is there anyway: the same pictures, and the outputs are asked of the host."""
    pipe, kwargs = tiny()
    config = TGateConfig(gate_step=GATE, offload_cache=True)
    moved = []
    to = torch.Tensor.to

    def seen(tensor, *args, **kwargs):
        moved.append(args)
        return to(tensor, *args, **kwargs)

    expected = gated(pipe, kwargs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", seen)
        assert torch.equal(gated(pipe, kwargs, config), expected)
    layers = len(cross_attention_layers(pipe.unet))
    assert moved.count(("cpu",)) == layers
    assert moved.count((torch.device("cpu"),)) >= layers * (STEPS - GATE)


def test_compiled_repeated_blocks():
    torch._dynamo.reset()
    pipe, kwargs = one_block()
    expected = gated(pipe, kwargs)
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe.unet.compile_repeated_blocks(backend="eager", fullgraph=True)
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], expected)


# Two pipelines


def test_two_gated_pipelines_on_one_denoiser():
    """Each keeps its own gate, turn about; either may be removed first."""
    pipe, kwargs = tiny()
    before = fingerprint(pipe.unet)
    image_call = partial(ENTRIES["StableDiffusionImg2ImgPipeline"].call, [0])  # its generator is drawn from
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(
        pipe, scheduler=type(pipe.scheduler).from_config(pipe.scheduler.config)
    )
    other.set_progress_bar_config(disable=True)
    assert other.unet is pipe.unet
    config = TGateConfig(gate_step=3)
    expected, expected_of_other = gated(pipe, kwargs), gated(other, image_call(), config)

    first, second = apply_tgate(pipe, CONFIG), apply_tgate(other, config)
    seen = Seen(pipe.unet)
    for _ in range(2):
        assert torch.equal(pipe(**kwargs, callback_on_step_end=first)[0], expected)
        assert torch.equal(other(**image_call(), callback_on_step_end=second)[0], expected_of_other)
    seen.stop()
    assert seen.batches == ([2] * GATE + [1] * (STEPS - GATE) + [2] * 3 + [1] * (STEPS - 3)) * 2
    first.remove()
    assert torch.equal(other(**image_call(), callback_on_step_end=second)[0], expected_of_other)
    second.remove()
    assert left_behind(before, pipe.unet) == {}


def test_two_gated_pipelines_on_one_denoiser_and_one_scheduler():
    """`from_pipe` shares the scheduler. Which pipeline is running says the stack."""
    pipe, kwargs = tiny()
    image_call = partial(ENTRIES["StableDiffusionImg2ImgPipeline"].call, [0])
    before = fingerprint(pipe.unet)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert other.scheduler is pipe.scheduler
    config = TGateConfig(gate_step=3)
    expected, expected_of_other = gated(pipe, kwargs), gated(other, image_call(), config)
    with apply_tgate(pipe, CONFIG) as first, apply_tgate(other, config) as second:
        for _ in range(2):
            assert torch.equal(pipe(**kwargs, callback_on_step_end=first)[0], expected)
            assert torch.equal(other(**image_call(), callback_on_step_end=second)[0], expected_of_other)
    assert left_behind(before, pipe.unet) == {}


def test_two_pipelines_in_two_threads():
    names = ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]
    pipes = [tiny(name) for name in names]
    expected = [gated(pipe, kwargs) for pipe, kwargs in pipes]
    with ThreadPoolExecutor(2) as threads:
        for _ in range(3):
            found = threads.map(lambda pair: gated(*pair), pipes)
            assert all(map(torch.equal, found, expected))


def test_a_gated_denoiser_is_saved_and_copied_as_what_it_is(tmp_path):
    pipe, kwargs = tiny()
    stock = pipe(**kwargs)[0]
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe.unet.save_pretrained(tmp_path)
        twin = copy.deepcopy(pipe.unet)
        twin(torch.randn(2, 4, 8, 8), 5, torch.randn(2, 7, 12))
        assert "none yet" in str(tgate.summary())  # the copy's call was none of the gate's
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path).eval()
    for unet in (loaded, twin):
        pipe.unet = unet
        assert torch.equal(pipe(**kwargs)[0], stock)
