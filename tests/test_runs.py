"""Runs one after another: what raised, was interrupted or was another size leaves nothing to the next."""

import diffusers
import pytest
import torch
import zoo_transformers  # noqa: F401  # registers its pipelines
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback
from tiny import FAMILIES, TEXT_TO_IMAGE, Observed, live_bytes, tiny, widen
from zoo import ENTRIES, seeded

from tgate_processors import StateError, TGateConfig, apply_tgate


CONFIG = TGateConfig(gate_step=2, sp_interval=2, fi_interval=2)


def fresh(family, config=CONFIG, **changes):
    subject = tiny(family)
    return subject(apply_tgate(subject.pipe, config), **changes)


class Stop(Exception):
    pass


def raise_at(evaluation):
    """A hook that raises at the given evaluation of the denoiser, once."""
    calls = iter(range(100))

    def hook(*_):
        if next(calls) == evaluation:
            raise Stop

    return hook


@pytest.mark.parametrize("evaluation", [0, 1, 2, 3])
@pytest.mark.parametrize("family", TEXT_TO_IMAGE)
def test_a_run_after_one_that_raised_in_the_denoiser(family, evaluation):
    subject = tiny(family)
    tgate = apply_tgate(subject.pipe, CONFIG)
    last = next(module for name, module in subject.denoiser.named_modules() if name in ("conv_out", "proj_out"))
    hook = last.register_forward_pre_hook(raise_at(evaluation))
    with pytest.raises(Stop):
        subject(tgate)
    hook.remove()
    assert torch.equal(subject(tgate), fresh(family))


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_run_after_one_that_raised_in_a_callback(step):
    def raises(pipe, step_index, timestep, kwargs):
        if step_index == step:
            raise Stop
        return kwargs

    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, CONFIG, callback_on_step_end=raises)
    with pytest.raises(Stop):
        subject(tgate)
    tgate.callback_on_step_end = None
    assert torch.equal(subject(tgate), fresh("sd"))


@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_a_run_after_one_that_was_interrupted(step):
    def interrupts(pipe, step_index, timestep, kwargs):
        pipe._interrupt = step_index == step
        return kwargs

    subject = tiny("sdxl")
    tgate = apply_tgate(subject.pipe, CONFIG, callback_on_step_end=interrupts)
    interrupted = subject(tgate)
    assert len(tgate.summary().evaluations) == step + 1
    assert tgate.gate.cache_bytes == 0
    tgate.callback_on_step_end = None
    whole = fresh("sdxl")
    assert torch.equal(subject(tgate), whole)
    assert not torch.equal(interrupted, whole)


@pytest.mark.parametrize("family", ["sd", "pixart-alpha", "svd"])
def test_runs_of_other_lengths(family):
    subject = tiny(family)
    tgate = apply_tgate(subject.pipe, CONFIG)
    for steps in (3, 7, 2, 4):
        assert torch.equal(subject(tgate, num_inference_steps=steps), fresh(family, num_inference_steps=steps))


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha"])
def test_runs_of_other_sizes(family):
    subject = tiny(family)
    tgate = apply_tgate(subject.pipe, CONFIG)
    for pixels in (16, 32, 16):
        changes = {"height": pixels, "width": pixels, "latents": torch.randn(1, 4, pixels // 2, pixels // 2)}
        assert torch.equal(subject(tgate, **changes), fresh(family, **changes))


def batch_of(family, times):
    """Inputs for several different pictures, and for each alone."""
    kwargs = tiny(family).kwargs()
    inputs = {k: v for k, v in kwargs.items() if isinstance(v, torch.Tensor)}
    batch = {
        k: v.expand(times, *v.shape[1:]) if v.dtype == torch.int64 else widen(v, times) for k, v in inputs.items()
    }
    if family == "svd":
        batch["image"] = batch["image"].clamp(0, 1)
    return batch, [{k: v[i : i + 1] for k, v in batch.items()} for i in range(times)]


@pytest.mark.parametrize("gate_step", [1, 2])
@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha", "pixart-sigma"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_every_picture_of_a_batch_is_its_own_run(family, guidance_scale, gate_step):
    config = TGateConfig(gate_step=gate_step, fi_interval=2)
    batch, singles = batch_of(family, 3)
    # negative prompts of a recording are left out where there is no guidance
    together = fresh(family, config, guidance_scale=guidance_scale, num_inference_steps=5, **batch)
    for picture, single in zip(together, singles, strict=True):
        alone = fresh(family, config, guidance_scale=guidance_scale, num_inference_steps=5, **single)
        torch.testing.assert_close(picture, alone[0], rtol=1e-4, atol=1e-5)  # kernels differ by batch


@pytest.mark.parametrize("family", ["lcm-pixart", "sd"])
def test_different_prompts_from_the_same_noise_without_guidance(family):
    """The halves of such a batch are equal at first, but it is no guidance."""
    config = TGateConfig(gate_step=1)
    batch, singles = batch_of(family, 2)
    latents = batch["latents"][:1]
    changes = {"guidance_scale": 1.0, "num_inference_steps": 4}
    two = {"generator": [torch.Generator().manual_seed(0) for _ in range(2)]}  # LCM adds noise in every step
    together = fresh(family, config, **changes, **batch | {"latents": latents.repeat(2, 1, 1, 1)} | two)
    for picture, single in zip(together, singles, strict=True):
        one = {"generator": torch.Generator().manual_seed(0)}
        alone = fresh(family, config, **changes, **single | {"latents": latents} | one)
        torch.testing.assert_close(picture, alone[0], rtol=1e-4, atol=1e-4)


def evaluations(gate, steps, order=1, warm_up=0):
    """Batches when `warm_up` evaluations come before the first step is over; the last step of order 2 has one."""
    total = warm_up + order * steps - (order - 1)
    closed = min(total, warm_up + order * gate)
    return [2] * closed + [1] * (total - closed)


ORDERS = {
    "HeunDiscreteScheduler": ({}, {"order": 2}),
    "KDPM2DiscreteScheduler": ({}, {"order": 2}),
    "PNDMScheduler": ({"skip_prk_steps": True}, {"warm_up": 1}),  # as Stable Diffusion sets it
    "DDIMScheduler": ({}, {}),
    "UniPCMultistepScheduler": ({}, {}),
    "EulerDiscreteScheduler": ({}, {}),
}


@pytest.mark.parametrize("gate_step", [1, 2, 3, 4])
@pytest.mark.parametrize("scheduler", ORDERS)
@pytest.mark.parametrize("family", ["sd", "pixart-alpha"])
def test_evaluations_of_one_step_are_in_one_phase(family, scheduler, gate_step):
    subject = tiny(family)
    settings, counts = ORDERS[scheduler]
    subject.pipe.scheduler = getattr(diffusers, scheduler)(**settings)
    seen = Observed(subject)
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=gate_step))
    subject(tgate, num_inference_steps=4)
    assert seen.batches == evaluations(gate_step, 4, **counts)
    assert tgate.gate.cache_bytes == 0


@pytest.mark.parametrize("family", [family for family in FAMILIES if "pixart" not in family])
def test_a_forgotten_callback_is_no_error_where_the_timesteps_say_the_step(family):
    subject = tiny(family)
    tgate = apply_tgate(subject.pipe, CONFIG)
    assert torch.equal(subject(), fresh(family))
    assert tgate.gate.is_over
    assert tgate.gate.cache_bytes == 0


def test_a_denoiser_put_in_later_is_an_error():
    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, CONFIG)
    subject.pipe.unet = tiny("sd").pipe.unet
    with pytest.raises(StateError, match="or the pipeline has another denoiser now, call `apply_tgate` again"):
        subject(tgate)


def test_a_handle_that_was_removed_is_no_callback():
    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, CONFIG)
    subject(tgate)
    tgate.remove()
    with pytest.raises(StateError, match="If the gate was removed"):
        subject(tgate)


def test_removing_in_the_middle_of_a_run():
    """The steps after it are the stock pipeline's."""

    def removes(pipe, step_index, timestep, kwargs):
        if step_index == 3:
            tgate.remove()
        return kwargs

    subject = tiny("sd")
    seen = Observed(subject)
    tgate = apply_tgate(subject.pipe, CONFIG, callback_on_step_end=removes)
    subject(tgate, num_inference_steps=6)
    assert seen.batches == [2, 2, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("scheduler", "batches"),
    [
        ("DDIMScheduler", [2, 2, 1, 1]),
        ("PNDMScheduler", [2, 2, 2, 1, 1]),
        ("HeunDiscreteScheduler", [2, 2, 2, 2, 1, 1, 1]),
    ],
)
def test_the_gate_counts_the_steps_that_are_run(scheduler, batches):
    """Half of 8 steps, and the gate after 2 of those."""
    subject = tiny("sd-img2img")
    subject.pipe.scheduler = getattr(diffusers, scheduler)(**ORDERS[scheduler][0])
    seen = Observed(subject)
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=2))
    subject(tgate, num_inference_steps=8, strength=0.5)
    assert seen.batches == batches


def test_a_callback_beside_the_handle():
    calls = []

    def mine(pipe, step_index, timestep, kwargs):
        calls.append((step_index, sorted(kwargs)))
        return {"latents": kwargs["latents"] * 1.5} if step_index == 1 else kwargs

    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, CONFIG, callback_on_step_end=mine)
    changed = subject(tgate, num_inference_steps=3)
    assert calls == [(0, ["latents"]), (1, ["latents"]), (2, ["latents"])]
    assert not torch.equal(changed, fresh("sd", num_inference_steps=3))


def test_among_the_callbacks_of_diffusers():
    """diffusers' own cut-off ends guidance at step 1; the gate, closing later, finds one branch and folds nothing."""
    subject = tiny("sd")
    seen = Observed(subject)
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=3))
    cut_off = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    subject(MultiPipelineCallbacks([tgate, cut_off]), num_inference_steps=5)
    assert seen.batches == [2, 2, 1, 1, 1]


def test_the_branch_that_goes_on():
    """After the gate the result depends on the branch; with equal prompts it does not."""
    negative = fresh("sd", TGateConfig(gate_step=2, branch="negative"))
    positive = fresh("sd", TGateConfig(gate_step=2, branch="positive"))
    assert torch.equal(negative, fresh("sd", TGateConfig(gate_step=2)))
    # cross-attention is reused, and Stable Diffusion's text enters nowhere else
    assert torch.equal(negative, positive)
    sdxl = [fresh("sdxl", TGateConfig(gate_step=2, branch=branch)) for branch in ("negative", "positive")]
    assert not torch.equal(*sdxl)


def test_the_denoiser_can_be_evaluated_after_a_run():
    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, CONFIG)
    subject(tgate)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    gated = [subject.denoiser(sample, 5, text).sample for _ in range(3)]
    tgate.remove()
    assert all(torch.equal(out, subject.denoiser(sample, 5, text).sample) for out in gated)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_run_needs_its_cache_and_nothing_else(family):
    """Beside the stock run's tensors, at every step: what arithmetic says is stored."""
    subject = tiny(family)
    gate_step = 2

    def measured(config):
        seen = []

        def look(pipe, step_index, timestep, kwargs):
            seen.append(live_bytes())
            return kwargs

        with apply_tgate(subject.pipe, config, callback_on_step_end=look) as tgate:
            subject(tgate, num_inference_steps=4)
        return seen, tgate.summary().cache_bytes

    never, nothing = measured(TGateConfig(gate_step=100))
    gated, cache = measured(TGateConfig(gate_step=gate_step))
    extra = [one - other for one, other in zip(gated, never, strict=True)]
    base = extra[0]  # processors' own constants, if any
    assert nothing == 0
    assert cache > 0
    assert all(grown - base <= 1.05 * cache for grown in extra)
    assert all(grown - base >= cache for grown in extra[gate_step:-1])
    assert extra[-1] - base <= 0


@pytest.mark.parametrize("family", ["sd", "sdxl", "pixart-alpha", "svd"])
def test_a_run_keeps_no_tensor_alive(family):
    subject = tiny(family)
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=2, fi_interval=2))
    subject(tgate)
    before = live_bytes()
    subject(tgate)
    assert live_bytes() == before


@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_a_run_of_calls_for_each_branch_is_over_with_its_last_one(guidance_scale):
    """Also where no callback says so."""
    pipe = seeded(ENTRIES["WanPipeline"].build)
    with apply_tgate(pipe, TGateConfig(gate_step=2)) as tgate:
        pipe(**ENTRIES["WanPipeline"].call([0]) | {"guidance_scale": guidance_scale})
        assert tgate.gate.is_over
        assert tgate.gate.cache_bytes == 0


def test_a_run_of_one_step_is_over_where_no_callback_says_so():
    subject = tiny("sd")
    with apply_tgate(subject.pipe, TGateConfig(gate_step=1)) as tgate:
        subject(num_inference_steps=1)
        assert tgate.gate.is_over


def test_a_second_denoiser_that_is_called_first_in_the_last_step_makes_all_its_calls():
    pipe = seeded(ENTRIES["WanPipeline (two denoisers)"].build)
    pipe.register_to_config(boundary_ratio=0.0)
    timesteps = []

    def look(module, args, kwargs):
        timesteps.append(kwargs["timestep"])

    hook = pipe.transformer.register_forward_pre_hook(look, with_kwargs=True)
    pipe(**ENTRIES["WanPipeline (two denoisers)"].call([0]))
    hook.remove()
    last, before = float(timesteps[-1].max()), float(timesteps[-3].max())
    pipe.register_to_config(boundary_ratio=(last + before) / 2 / pipe.scheduler.config.num_train_timesteps)
    calls = []
    pipe.transformer_2.register_forward_pre_hook(lambda *_: calls.append(1))
    with apply_tgate(pipe, TGateConfig(gate_step=99)) as tgate:
        pipe(**ENTRIES["WanPipeline (two denoisers)"].call([0]), callback_on_step_end=tgate)
        assert len(calls) == 2
        assert len(tgate.summary().batches) == len(timesteps)
