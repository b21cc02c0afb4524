"""Beside what people put on a pipeline: each trick works as it does on the stock pipeline, gated or not.

`holds` is the contract: equal to stock when the gate never closes; when it closes, one branch and no cross-attention
after it; afterwards the network and its pictures are as before.
"""

import diffusers
import pytest
import tomesd
import torch
import zoo_motion  # noqa: F401  # registers its pipelines
import zoo_transformers  # noqa: F401  # registers its pipelines
import zoo_unets
from adapters import load_ip_adapters, lora, with_images
from diffusers.callbacks import IPAdapterScaleCutoffCallback, MultiPipelineCallbacks, SDXLCFGCutoffCallback
from diffusers.models import attention_processor as zoo_of_processors
from seen import Seen
from tiny import fingerprint, left_behind
from zoo import ENTRIES, STEPS, of_pictures, seeded

from tgate_processors import StateError, TGateConfig, UnsupportedPipelineError, apply_tgate
from tgate_processors._layers import cross_attention_layers
from tgate_processors._pipelines import takes_callback
from tgate_processors.demo import load_demo_pipeline
from tgate_processors.processors import GatedProcessor


GATE = 2
CONFIG = TGateConfig(gate_step=GATE)
NEVER = TGateConfig(gate_step=STEPS)


def tiny(name="StableDiffusionPipeline"):
    return seeded(ENTRIES[name].build), ENTRIES[name].call([0])


def gated(pipe, kwargs, config=CONFIG, **changes):
    with apply_tgate(pipe, config) as tgate:
        return pipe(**kwargs | changes, callback_on_step_end=tgate)[0]


def cached_and_folded(pipe, kwargs, branches=2, after=1):
    """The latents of a gated run, of which it was seen that it dropped what it should."""
    seen = Seen(pipe.unet)
    latents = gated(pipe, kwargs)
    seen.stop()
    assert seen.batches == [branches] * GATE + [after] * (STEPS - GATE)
    assert seen.computed == {"cross": len(seen.cross) * GATE, "self": seen.num_self * STEPS}
    return latents


def holds(pipe, kwargs, **counts):
    """The contract, for a pipeline with its tricks on."""
    stock, before = pipe(**kwargs)[0], fingerprint(pipe.unet)
    assert torch.equal(gated(pipe, kwargs, NEVER), stock)
    latents = cached_and_folded(pipe, kwargs, **counts)
    assert not torch.allclose(latents, stock, atol=1e-3)
    assert left_behind(before, pipe.unet) == {}
    assert torch.equal(pipe(**kwargs)[0], stock)
    return latents


# IP-Adapter


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
@pytest.mark.parametrize("adapters", [1, 2])
def test_ip_adapter_loaded_before(name, adapters):
    pipe, kwargs = tiny(name)
    load_ip_adapters(pipe, adapters)
    pipe.set_ip_adapter_scale([0.7] * adapters)
    holds(pipe, with_images(kwargs, adapters))


@pytest.mark.parametrize("runs_before", [False, True])
def test_ip_adapter_loaded_while_gated(runs_before):
    """The adapter makes every processor anew; the next run gates the new ones."""
    pipe, kwargs = tiny()
    load_ip_adapters(pipe)
    expected = gated(pipe, with_images(kwargs))

    pipe, kwargs = tiny()
    tgate = apply_tgate(pipe, CONFIG)
    if runs_before:
        pipe(**kwargs, callback_on_step_end=tgate)
    load_ip_adapters(pipe)
    assert torch.equal(pipe(**with_images(kwargs), callback_on_step_end=tgate)[0], expected)
    tgate.remove()
    kinds = {type(layer.processor) for layer in cross_attention_layers(pipe.unet).values()}
    assert kinds == {zoo_of_processors.IPAdapterAttnProcessor2_0}
    pipe.unload_ip_adapter()
    assert torch.equal(pipe(**kwargs)[0], tiny()[0](**kwargs)[0])


def test_ip_adapter_scale_set_while_gated():
    """`set_ip_adapter_scale` finds gated processors, and what it sets outlives the gate."""
    pipe, kwargs = tiny()
    load_ip_adapters(pipe)
    kwargs = with_images(kwargs)
    pipe.set_ip_adapter_scale(0.3)
    expected = gated(pipe, kwargs)
    pipe.set_ip_adapter_scale(0.9)
    with apply_tgate(pipe, CONFIG) as tgate:
        other = pipe(**kwargs, callback_on_step_end=tgate)[0]
        pipe.set_ip_adapter_scale(0.3)
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], expected)
    assert not torch.allclose(other, expected, atol=1e-3)
    assert torch.equal(gated(pipe, kwargs), expected)


def test_ip_adapter_image_matters_after_the_gate_as_the_cache_says():
    """Its output is part of what is stored: another image is another picture, another scale after the gate is none."""
    pipe, kwargs = tiny()
    load_ip_adapters(pipe)
    one, other = (gated(pipe, with_images(kwargs, kind=kind)) for kind in (20, 30))
    assert not torch.allclose(one, other, atol=1e-3)

    def silences(pipe, step_index, timestep, callback_kwargs):
        if step_index + 1 == GATE:
            pipe.set_ip_adapter_scale(0.0)
        return callback_kwargs

    with apply_tgate(pipe, CONFIG, callback_on_step_end=silences) as tgate:
        assert torch.equal(pipe(**with_images(kwargs), callback_on_step_end=tgate)[0], one)


def test_ip_adapter_masks():
    pipe, kwargs = tiny()
    load_ip_adapters(pipe)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    kwargs = with_images(kwargs)
    masked = holds(pipe, kwargs | {"cross_attention_kwargs": {"ip_adapter_masks": [mask]}})
    assert not torch.allclose(masked, gated(pipe, kwargs), atol=1e-3)


def test_ip_adapter_unloaded_while_gated():
    pipe, kwargs = tiny()
    expected = gated(pipe, kwargs)
    load_ip_adapters(pipe)
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**with_images(kwargs), callback_on_step_end=tgate)
        pipe.unload_ip_adapter()
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], expected)
    assert not any(isinstance(p, GatedProcessor) for p in pipe.unet.attn_processors.values())


def test_ip_adapter_of_several_pictures():
    """diffusers repeats the image's embeddings for each prompt; folding takes its half of them."""
    pipe, _ = tiny()
    load_ip_adapters(pipe)
    calls = [with_images(ENTRIES["StableDiffusionPipeline"].call(pictures)) for pictures in ([0, 1], [0], [1])]
    both, one, other = (gated(pipe, kwargs) for kwargs in calls)
    torch.testing.assert_close(both, torch.cat([one, other]), rtol=1e-3, atol=1e-4)


def test_ip_adapter_cut_off_by_a_callback_of_diffusers():
    pipe, kwargs = tiny()
    load_ip_adapters(pipe)
    kwargs = with_images(kwargs)
    cut_off = IPAdapterScaleCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    stock = pipe(**kwargs, callback_on_step_end=cut_off)[0]
    pipe.set_ip_adapter_scale(1.0)
    with apply_tgate(pipe, NEVER) as tgate:
        latents = pipe(**kwargs, callback_on_step_end=MultiPipelineCallbacks([cut_off, tgate]))[0]
    assert torch.equal(latents, stock)


# Processors


def test_fused_projections():
    pipe, kwargs = tiny()
    pipe.fuse_qkv_projections()
    stock = pipe(**kwargs)[0]
    before = fingerprint(pipe.unet)
    assert torch.equal(gated(pipe, kwargs, NEVER), stock)
    assert not torch.allclose(gated(pipe, kwargs), stock, atol=1e-3)
    assert left_behind(before, pipe.unet) == {}


@pytest.mark.parametrize("unfuses_first", [True, False])
def test_projections_fused_while_gated(unfuses_first):
    pipe, kwargs = tiny()
    before = pipe.unet.attn_processors
    tgate = apply_tgate(pipe, CONFIG)
    expected = pipe(**kwargs, callback_on_step_end=tgate)[0]
    pipe.fuse_qkv_projections()
    fused = pipe(**kwargs, callback_on_step_end=tgate)[0]
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=1e-4)  # one product instead of three
    kinds = {type(layer.processor).__mro__[2] for layer in cross_attention_layers(pipe.unet).values()}
    assert kinds == {zoo_of_processors.FusedAttnProcessor2_0}
    undo = [pipe.unfuse_qkv_projections, tgate.remove]
    for step in undo if unfuses_first else reversed(undo):
        step()
    assert pipe.unet.attn_processors == before


@pytest.mark.parametrize("when", ["before", "after"])
def test_sliced_attention(when):
    pipe, kwargs = tiny()
    if when == "before":
        pipe.enable_attention_slicing(1)
        holds(pipe, kwargs)
        return
    with apply_tgate(pipe, CONFIG) as tgate:
        expected = pipe(**kwargs, callback_on_step_end=tgate)[0]
        pipe.enable_attention_slicing(1)
        latents = pipe(**kwargs, callback_on_step_end=tgate)[0]
        kinds = {type(layer.processor).__mro__[2] for layer in cross_attention_layers(pipe.unet).values()}
    assert kinds == {zoo_of_processors.SlicedAttnProcessor}
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)


class StandInForXFormers:
    """Its one function, of torch: xFormers itself needs a GPU."""

    class ops:
        @staticmethod
        def memory_efficient_attention(query, key, value, attn_bias=None, op=None, scale=None):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_bias, scale=scale)


def test_xformers(monkeypatch):
    monkeypatch.setattr(zoo_of_processors, "xformers", StandInForXFormers)
    pipe, kwargs = tiny()
    pipe.unet.set_attn_processor(zoo_of_processors.XFormersAttnProcessor())
    holds(pipe, kwargs)


def test_custom_diffusion():
    pipe, kwargs = tiny()
    processors = {}
    for name in pipe.unet.attn_processors:
        attn = pipe.unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = zoo_of_processors.CustomDiffusionAttnProcessor2_0(
            train_kv=attn.is_cross_attention,
            hidden_size=attn.query_dim,
            cross_attention_dim=attn.cross_attention_dim if attn.is_cross_attention else None,
        )
    pipe.unet.set_attn_processor(processors)
    pipe.unet.requires_grad_(False)
    stock, before = pipe(**kwargs)[0], fingerprint(pipe.unet)
    assert torch.equal(gated(pipe, kwargs, NEVER), stock)
    assert not torch.allclose(gated(pipe, kwargs), stock, atol=1e-3)
    assert left_behind(before, pipe.unet) == {}


def test_one_processor_for_all_layers():
    pipe, kwargs = tiny()
    pipe.unet.set_attn_processor(zoo_of_processors.AttnProcessor2_0())
    holds(pipe, kwargs)


class Doubles(zoo_of_processors.AttnProcessor2_0):
    """A user's own processor."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return super().__call__(attn, hidden_states, *args, **kwargs) * 2


def test_a_users_own_processor():
    pipe, kwargs = tiny()
    plain = gated(pipe, kwargs)
    pipe.unet.set_attn_processor(Doubles())
    assert not torch.allclose(holds(pipe, kwargs), plain, atol=1e-3)


def test_attention_backends():
    """A backend is an attribute of the processors: what is chosen while gated stays."""
    pipe, kwargs = tiny("WanPipeline")
    expected = gated(pipe, kwargs)
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe.transformer.set_attention_backend("_native_math")
        latents = pipe(**kwargs, callback_on_step_end=tgate)[0]
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-4)
    backends = {layer.processor._attention_backend for layer in cross_attention_layers(pipe.transformer).values()}
    assert [backend.value for backend in backends] == ["_native_math"]


# Weights and features


@pytest.mark.parametrize("fused", [False, True])
def test_lora_loaded_before(fused):
    pipe, kwargs = tiny()
    plain = pipe(**kwargs)[0]
    pipe.load_lora_weights(lora(pipe))
    if fused:
        pipe.fuse_lora()
    assert not torch.allclose(pipe(**kwargs)[0], plain, atol=1e-3)
    stock, before = pipe(**kwargs)[0], fingerprint(pipe.unet)
    assert torch.equal(gated(pipe, kwargs, NEVER), stock)
    gated(pipe, kwargs)
    assert left_behind(before, pipe.unet) == {}


@pytest.mark.parametrize("fused", [False, True])
def test_lora_loaded_while_gated(fused):
    pipe, kwargs = tiny()
    pipe.load_lora_weights(lora(pipe))
    if fused:
        pipe.fuse_lora()
    expected = gated(pipe, kwargs)

    pipe, kwargs = tiny()
    plain = pipe(**kwargs)[0]
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        pipe.load_lora_weights(lora(pipe))
        if fused:
            pipe.fuse_lora()
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], expected)
        if fused:
            pipe.unfuse_lora()
        pipe.unload_lora_weights()
    torch.testing.assert_close(pipe(**kwargs)[0], plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "after"])
def test_freeu(when):
    pipe, kwargs = tiny()
    settings = {"s1": 0.9, "s2": 0.2, "b1": 1.5, "b2": 1.6}
    for block in pipe.unet.up_blocks:
        block.resolution_idx = 0  # FreeU knows the blocks of the models of full width
    if when == "before":
        pipe.enable_freeu(**settings)
        holds(pipe, kwargs)
        return
    with apply_tgate(pipe, CONFIG) as tgate:
        plain = pipe(**kwargs, callback_on_step_end=tgate)[0]
        pipe.enable_freeu(**settings)
        latents = pipe(**kwargs, callback_on_step_end=tgate)[0]
        pipe.disable_freeu()
        assert torch.equal(pipe(**kwargs, callback_on_step_end=tgate)[0], plain)
    pipe.enable_freeu(**settings)
    assert torch.equal(gated(pipe, kwargs), latents)


@pytest.mark.parametrize("when", ["before", "after"])
def test_token_merging(when):
    """tomesd gives blocks another class and merges tokens around their self-attention."""
    pipe, kwargs = tiny()
    kwargs |= {"height": 32, "width": 32, "latents": of_pictures([0], 4, 16, 16)}
    plain = gated(pipe, kwargs)
    merging = {"ratio": 0.5, "sx": 2, "sy": 2, "use_rand": False}
    if when == "before":
        tomesd.apply_patch(pipe, **merging)
        merged = holds(pipe, kwargs)
    else:
        with apply_tgate(pipe, CONFIG) as tgate:
            pipe(**kwargs, callback_on_step_end=tgate)
            tomesd.apply_patch(pipe, **merging)
            merged = pipe(**kwargs, callback_on_step_end=tgate)[0]
            tgate.summary()
    assert not torch.allclose(merged, plain, atol=1e-3)
    tomesd.remove_patch(pipe)
    assert torch.equal(gated(pipe, kwargs), plain)


def test_token_merging_around_cross_attention_is_refused():
    """Which tokens are merged changes from step to step, so what is stored fits no later step."""
    pipe, kwargs = tiny()
    tomesd.apply_patch(pipe, ratio=0.5, merge_crossattn=True)
    with pytest.raises(UnsupportedPipelineError, match="`merge_crossattn` must be False with T-GATE"):
        apply_tgate(pipe, CONFIG)
    tomesd.remove_patch(pipe)
    with apply_tgate(pipe, CONFIG) as tgate:
        tomesd.apply_patch(pipe, ratio=0.5, merge_crossattn=True)
        with pytest.raises(UnsupportedPipelineError, match="`merge_crossattn` must be False with T-GATE"):
            pipe(**kwargs, callback_on_step_end=tgate)


def test_textual_inversion():
    """A new word is of the text encoder alone."""
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    kwargs = {"num_inference_steps": STEPS, "output_type": "latent", "return_dict": False}
    word = torch.randn(pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"thing": word}, token="thing")

    def call(prompt):
        return kwargs | {"prompt": prompt, "generator": torch.Generator().manual_seed(0)}

    stock = pipe(**call("a red thing"))[0]
    assert not torch.equal(pipe(**call("a red circle"))[0], stock)
    assert torch.equal(gated(pipe, call("a red thing"), NEVER), stock)
    assert not torch.equal(gated(pipe, call("a red thing")), gated(pipe, call("a red circle")))


def test_gligen_boxes_matter_after_the_gate():
    """GLIGEN's attention to its boxes is self-attention beside them, and goes on; its arguments are folded."""
    name = "StableDiffusionGLIGENPipeline"
    pipe, kwargs = tiny(name)
    given = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["cross_attention_kwargs"]["gligen"]["boxes"].shape[0]),
        with_kwargs=True,
    )
    with apply_tgate(pipe, CONFIG):
        latents = pipe(**kwargs)[0]
    hook.remove()
    assert given == [2] * GATE + [1] * (STEPS - GATE)
    moved = tiny(name)[1] | {"gligen_boxes": [[0.0, 0.0, 0.2, 0.2]] * len(kwargs["gligen_boxes"])}
    with apply_tgate(pipe, CONFIG):
        assert not torch.allclose(pipe(**moved)[0], latents, atol=1e-4)


def test_attention_maps_that_are_read_in_every_step_are_refused():
    """LEDITS++ makes masks of cross-attention, unless it is told not to."""
    pipe, kwargs = tiny("LEditsPPPipelineStableDiffusion")
    kwargs |= {"use_cross_attn_mask": True}
    tgate = apply_tgate(pipe, CONFIG)
    message = "Pass `use_cross_attn_mask=False, use_intersect_mask=False` to the pipeline"
    with pytest.raises(UnsupportedPipelineError, match=message):
        pipe(**kwargs, callback_on_step_end=tgate)
    with pytest.warns(UserWarning, match="were replaced while the pipeline was gated"):
        tgate.remove()


def test_a_part_of_an_inverted_run():
    """LEDITS++ may leave out the first of its scheduler's timesteps; only its denoising is counted."""
    pipe, kwargs = tiny("LEditsPPPipelineStableDiffusion")
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    pipe.invert(image=picture, num_inversion_steps=STEPS, skip=0.5)
    with apply_tgate(pipe, CONFIG) as tgate:
        pipe(**kwargs, callback_on_step_end=tgate)
        assert len(tgate.summary().schedule) == STEPS
        assert len(tgate.summary().evaluations) == STEPS
        with pytest.raises(StateError, match="`callback_on_step_end` must be the handle"):
            pipe.invert(image=picture, num_inversion_steps=STEPS)


# The loop


def test_a_callback_of_diffusers_that_drops_guidance_of_sdxl():
    pipe, kwargs = tiny("StableDiffusionXLPipeline")
    cut_off = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=GATE)
    seen = Seen(pipe.unet)
    with apply_tgate(pipe, TGateConfig(gate_step=1)) as tgate:
        pipe(**kwargs, callback_on_step_end=MultiPipelineCallbacks([tgate, cut_off]))
    assert seen.batches == [2, 1, 1, 1]


def test_a_callback_that_changes_embeddings():
    """Before the gate they matter, after it the cached output does."""

    def changes(at):
        def callback(pipe, step_index, timestep, callback_kwargs):
            if step_index == at:
                callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"] * 2
            return callback_kwargs

        return callback

    pipe, kwargs = tiny()
    plain = gated(pipe, kwargs)
    inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    for at, matters in ((0, True), (GATE, False)):
        with apply_tgate(pipe, CONFIG, callback_on_step_end=changes(at)) as tgate:
            latents = pipe(**kwargs, **inputs, callback_on_step_end=tgate)[0]
        assert torch.equal(latents, plain) is not matters


def test_base_and_refiner():
    """Each runs a part of the steps, with a gate of its own."""
    base, kwargs = tiny("StableDiffusionXLPipeline")
    refiner = diffusers.StableDiffusionXLImg2ImgPipeline(**base.components | {"unet": zoo_unets.unet(**zoo_unets.XL)})
    refiner.unet.eval().requires_grad_(False)
    refiner.scheduler = type(base.scheduler).from_config(base.scheduler.config)
    refiner.set_progress_bar_config(disable=True)
    text = {name: value for name, value in kwargs.items() if name not in ("height", "width", "latents")}

    def both(config, config_of_refiner):
        seen = Seen(base.unet), Seen(refiner.unet)
        steps = {"num_inference_steps": 10}
        with apply_tgate(base, config) as first, apply_tgate(refiner, config_of_refiner) as second:
            middle = base(**kwargs | steps, denoising_end=0.5, callback_on_step_end=first)[0]
            end = refiner(**text | steps, image=middle, denoising_start=0.5, callback_on_step_end=second)[0]
        [one.stop() for one in seen]
        return end, seen[0].batches, seen[1].batches

    never, *_ = both(TGateConfig(gate_step=10), TGateConfig(gate_step=10))
    middle = base(**kwargs | {"num_inference_steps": 10}, denoising_end=0.5)[0]
    assert torch.equal(never, refiner(**text | {"num_inference_steps": 10}, image=middle, denoising_start=0.5)[0])
    _, of_base, of_refiner = both(TGateConfig(gate_step=2), TGateConfig(gate_step=3))
    assert of_base == [2] * 2 + [1] * 3
    assert of_refiner == [2] * 3 + [1] * 2


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionXLPipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLInstructPix2PixPipeline",
    ],
)
def test_the_part_of_a_run_up_to_denoising_end_is_the_whole_loop(name):
    """Some of these say another number of timesteps, or none."""
    pipe, kwargs = tiny(name)
    kwargs |= {"num_inference_steps": 8, "denoising_end": 0.5}
    with apply_tgate(pipe, TGateConfig(gate_step=0.5)) as tgate:
        pipe(**kwargs, **({"callback_on_step_end": tgate} if takes_callback(pipe) else {}))
        assert tgate.gate.is_over
        assert (len(tgate.summary().schedule), tgate.summary().gate_closed_at) == (4, 2)


@pytest.mark.parametrize(
    "spacing",
    [{"timesteps": [900, 500, 300, 100, 0]}, {"sigmas": [10.0, 5.0, 2.0, 1.0, 0.5, 0.0]}],
    ids=["timesteps", "sigmas"],
)
def test_timesteps_and_sigmas_of_ones_own(spacing):
    pipe, kwargs = tiny("StableDiffusionXLPipeline")
    pipe.scheduler = diffusers.EulerDiscreteScheduler()
    stock = pipe(**kwargs | spacing)[0]
    assert torch.equal(gated(pipe, kwargs, TGateConfig(gate_step=5), **spacing), stock)
    seen = Seen(pipe.unet)
    gated(pipe, kwargs, **spacing)
    assert seen.batches == [2, 2, 1, 1, 1]


def test_control_in_guess_mode_is_not_lost_after_the_gate():
    """In guess mode the negative branch is given no control; the branch that goes on is given the positive's."""
    pipe, kwargs = tiny("StableDiffusionControlNetPipeline (guess mode)")
    given = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["mid_block_additional_residual"]), with_kwargs=True
    )
    gated(pipe, kwargs)
    hook.remove()
    assert [len(residual) for residual in given] == [2, 2, 1, 1]
    assert all(not residual[0].any() and residual[1].any() for residual in given[:GATE])
    assert all(residual[0].any() for residual in given[GATE:])
    without = gated(pipe, kwargs, controlnet_conditioning_scale=0.0)
    assert not torch.allclose(gated(pipe, kwargs), without, atol=1e-3)


def test_a_control_that_ends_before_the_gate_and_one_that_begins_after_it():
    for interval in ({"control_guidance_end": 0.25}, {"control_guidance_start": 0.75}):
        pipe, kwargs = tiny("StableDiffusionControlNetPipeline")
        stock = pipe(**kwargs | interval)[0]
        assert torch.equal(gated(pipe, kwargs, NEVER, **interval), stock)
        assert not torch.allclose(gated(pipe, kwargs, **interval), gated(pipe, kwargs), atol=1e-3)


def test_leaving_the_handle_of_another_pipeline_to_a_run_is_an_error():
    pipe, kwargs = tiny()
    other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    tgate = apply_tgate(pipe, CONFIG)
    with pytest.raises(StateError, match="must be the handle of the pipeline that runs, got that of another"):
        other(**kwargs, callback_on_step_end=tgate)
