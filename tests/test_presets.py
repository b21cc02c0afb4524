"""Presets: the documentation's settings, by name, which of them suit a pipeline, and what a run says of them."""

import copy
import logging
import warnings

import diffusers
import every  # noqa: F401  # registers its pipelines
import pytest
import torch
from tiny import fingerprint, tiny, widen
from zoo import ENTRIES, STEPS, seeded
from zoo_modular import MODULAR

from tgate_processors import ConfigError, TGateConfig, TgateSDXLLoader, UnsupportedPipelineError, _advice, apply_tgate
from tgate_processors import preset as preset_of
from tgate_processors._pipelines import denoisers_of
from tgate_processors.measure.samplers import sampler_on
from tgate_processors.presets import PRESETS, suitable_preset


@pytest.mark.parametrize(
    ("name", "steps", "gate_step", "sp_interval", "warm_up"),
    [
        ("sd-1.5", 25, 10, 1, 0),
        ("sd-2.1", 25, 10, 1, 0),
        ("sdxl", 25, 10, 1, 0),
        ("sdxl-v2", 25, 10, 5, 2),
        ("pixart-alpha", 25, 15, 1, 0),
        ("pixart-alpha-v2", 25, 15, 3, 2),
        ("pixart-sigma-v2", 25, 15, 3, 2),
        ("svd", 25, 10, 1, 0),
        ("lcm-sdxl", 4, 1, 1, 0),
        ("lcm-pixart", 4, 1, 1, 0),
    ],
)
def test_presets_are_the_documentations(name, steps, gate_step, sp_interval, warm_up):
    config = preset_of(name)
    assert config.schedule(steps).gate_step == gate_step
    assert (config.sp_interval, config.fi_interval, config.warm_up) == (sp_interval, 1, warm_up)


def test_each_has_a_source():
    assert all(len(known.source) > 20 for known in PRESETS.values())


@pytest.mark.parametrize("name", ["SDXL", "Sdxl", "sdxl"])
def test_a_name_in_any_case_of_letters(name):
    assert preset_of(name) is PRESETS["sdxl"].config
    with apply_tgate(tiny("sdxl").pipe, name) as tgate:
        assert (tgate.preset, tgate.config) == ("sdxl", PRESETS["sdxl"].config)


@pytest.mark.parametrize("name", ["flux", "", 10])
def test_a_name_that_is_none(name):
    with pytest.raises(ConfigError, match=rf"`name` must be one of sd-1.5, .*, auto, got {name!r}. Pass one of these"):
        preset_of(name)


def test_an_unknown_name_installs_nothing():
    subject = tiny("sd")
    before = fingerprint(subject.denoiser)
    with pytest.raises(ConfigError, match=r"`config` must be one of sd-1.5, .*, auto, got 'flux'. Pass one of these"):
        apply_tgate(subject.pipe, "flux")
    assert fingerprint(subject.denoiser) == before


# Which preset suits a pipeline


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("sd", "sd-1.5"),
        ("sd-img2img", "sd-1.5"),
        ("sdxl", "sdxl"),
        ("sdxl-inpaint", "sdxl"),
        ("pixart-alpha", "pixart-alpha"),
        ("pixart-sigma", "pixart-sigma"),
        ("svd", "svd"),
        ("lcm-sdxl", "lcm-sdxl"),
        ("lcm-pixart", "lcm-pixart"),
    ],
)
def test_without_settings_the_preset_of_the_pipelines_kind_is_taken(family, name):
    subject = tiny(family)
    with apply_tgate(subject.pipe) as tgate:
        subject(tgate)
        summary = tgate.summary()
    assert tgate.config is PRESETS[name].config
    assert summary.settings == f"preset {name} ({tgate.config})"
    assert str(summary).splitlines()[0].split(maxsplit=1) == ["settings", summary.settings]
    assert summary.gate_closed_at == max(1, round(tgate.config.gate_step * subject.num_steps()))


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        ("StableDiffusionXLPAGPipeline", "sdxl"),
        ("StableDiffusionXLControlNetXSPipeline", "sdxl"),
        ("StableDiffusionPipelineSafe", "sd-1.5"),
        ("LatentConsistencyModelImg2ImgPipeline", "lcm-sdxl"),
        ("PixArtSigmaPAGPipeline", "pixart-sigma"),
        ("AnimateDiffPipeline", "other-unet"),  # has a mixin of Stable Diffusion's
        ("KolorsPipeline", "other-unet"),  # and one of SDXL's
        ("StableCascadePriorPipeline", "other-unet"),
        ("StableDiffusionLatentUpscalePipeline", "other-unet"),  # has `time_cond_proj_dim`, and is no LCM
        ("KandinskyV22PriorPipeline", "other-transformer"),  # has a mixin of UNets
        ("WanPipeline", "other-transformer"),
        ("StableDiffusion3Pipeline", "other-transformer"),  # guidance alone is left out
    ],
)
def test_other_classes_take_the_share_of_what_they_are_like(entry, name):
    pipe = seeded(ENTRIES[entry].build)
    with apply_tgate(pipe) as tgate:
        assert (tgate.preset, tgate.config) == (name, PRESETS[name].config)
    assert PRESETS["other-unet"].config == PRESETS["sd-1.5"].config
    assert PRESETS["other-transformer"].config == PRESETS["pixart-alpha"].config


def test_stable_diffusion_2_is_known_by_the_width_of_its_text():
    pipe = tiny("sd").pipe
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, "cross_attention_dim": 1024})
    with apply_tgate(pipe) as tgate:
        assert tgate.preset == "sd-2.1"


@pytest.mark.parametrize(("family", "name"), [("sdxl", "lcm-sdxl"), ("pixart-sigma", "lcm-pixart")])
def test_the_scheduler_of_latent_consistency_models_says_what_they_are(family, name):
    pipe = tiny(family).pipe
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    assert suitable_preset(pipe, denoisers_of(pipe)[0]) == name


def test_a_unet_that_embeds_its_guidance_is_a_latent_consistency_model_under_any_scheduler():
    pipe = tiny("sdxl").pipe
    pipe.unet.register_to_config(time_cond_proj_dim=8)
    assert suitable_preset(pipe, pipe.unet) == "lcm-sdxl"


def test_a_class_of_ones_own_and_a_compiled_network_are_taken_to_be_what_they_are_made_of():
    pipe = tiny("sdxl").pipe
    pipe.__class__ = type("Mine", (type(pipe),), {})
    assert suitable_preset(pipe, torch.compile(pipe.unet, backend="eager")) == "sdxl"
    pipe = seeded(ENTRIES["KolorsPipeline"].build)
    assert suitable_preset(pipe, torch.compile(pipe.unet, backend="eager")) == "other-unet"


def test_a_modular_pipeline():
    entry = MODULAR["StableDiffusionXL"]
    pipe = seeded(entry.build)
    with apply_tgate(pipe) as tgate:
        pipe(**entry.call([0]))
        assert "preset sdxl (gate_step=0.4)" in str(tgate.summary())
        assert tgate.summary().gate_closed_at == round(0.4 * STEPS)


def test_what_cannot_be_gated_says_so_without_settings_too():
    with pytest.raises(UnsupportedPipelineError, match="must be a diffusers pipeline with a `unet`"):
        apply_tgate(torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedPipelineError, match="got FluxFillPipeline: it does no guidance in its loop"):
        apply_tgate(type("FluxFillPipeline", (), {})())


def test_two_pictures_in_half_precision_under_another_sampler():
    subject = tiny("sdxl")
    subject.pipe.to(torch.bfloat16)
    kwargs = subject.kwargs(num_inference_steps=5)
    tensors = {name: widen(value).bfloat16() for name, value in kwargs.items() if isinstance(value, torch.Tensor)}
    with sampler_on(subject.pipe, "unipc"), apply_tgate(subject.pipe) as tgate:
        subject(tgate, **kwargs | tensors)
        assert tgate.summary().batches == (4, 4, 2, 2, 2)


def test_a_copy_and_a_second_handle_choose_anew():
    subject = tiny("sdxl")
    first = apply_tgate(subject.pipe)
    twin = copy.deepcopy(subject.pipe)
    twin.scheduler = diffusers.LCMScheduler.from_config(twin.scheduler.config)
    with apply_tgate(twin) as its:
        assert (first.preset, its.preset) == ("sdxl", "lcm-sdxl")
    first.remove()
    with apply_tgate(subject.pipe, "looks") as second:
        assert second.preset == "looks"
    with apply_tgate(subject.pipe, TGateConfig(gate_step=2)) as third:
        assert third.preset is None
        assert third.summary().settings == "gate_step=2"


# What a run says at its end


def quietly(subject, tgate, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject(tgate, **changes)


NEVER = "`gate_step` should be below the number of steps, got"


def ends(error):
    """A callback that ends a run after its last step but one, by an error or by the pipeline's interruption."""

    def end(pipe, step, timestep, kwargs):
        if step == STEPS - 2:
            if error:
                raise RuntimeError("out of memory")
            pipe._interrupt = True
        return kwargs

    return end


@pytest.mark.parametrize("gate_step", [STEPS, "auto"])
@pytest.mark.parametrize("fails", [True, False])
def test_a_gate_that_never_closed_is_said_of_a_run_that_came_to_its_end(fails, gate_step):
    subject = tiny("sd")
    steps = STEPS + (gate_step == "auto")
    config = TGateConfig(gate_step=gate_step, tolerance=1e-9)
    said = (
        NEVER if gate_step == STEPS else '`gate_step` should be a count or a fraction for this run of 5 steps, got "a'
    )
    with apply_tgate(subject.pipe, config, callback_on_step_end=ends(fails)) as tgate:
        if fails:
            with pytest.raises(RuntimeError, match="out of memory"):
                quietly(subject, tgate, num_inference_steps=steps)
        else:
            quietly(subject, tgate, num_inference_steps=steps)
        subject.pipe._interrupt, tgate.callback_on_step_end = False, None
        with pytest.warns(UserWarning, match=said) as warned:
            subject(tgate, num_inference_steps=steps)
        assert len(warned) == 1
        quietly(subject, tgate, num_inference_steps=steps)


def test_a_gate_that_never_closed_is_said_beside_other_savings_and_of_a_loader():
    subject = tiny("sdxl")
    with apply_tgate(subject.pipe, TGateConfig(gate_step=9, sp_interval=2)) as tgate:
        with pytest.warns(UserWarning, match=f"{NEVER} 9 of 4: the gate never closed. Pass `gate_step=0.4`"):
            subject(tgate, num_inference_steps=4)
        assert tgate.summary().macs_saved > 0
    pipe = TgateSDXLLoader(subject.pipe, gate_step=9)
    with pytest.warns(UserWarning, match=f"{NEVER} 9 of 4"):
        pipe.tgate(**subject.kwargs(num_inference_steps=4))


def test_one_step_is_too_few_for_any_gate():
    subject = tiny("sd")
    with (
        apply_tgate(subject.pipe) as tgate,
        pytest.warns(UserWarning, match=f"{NEVER} 0.4 of 1: the gate never closed. Take more steps, or run without"),
    ):
        subject(tgate, num_inference_steps=1)


def test_a_gate_that_closed_and_saved_nothing_is_said_once():
    """Without guidance, and latents that grow before the only step after the gate."""
    subject = tiny("sd")

    def grows(pipe, step, timestep, kwargs):
        if step == STEPS - 2:
            kwargs["latents"] = torch.nn.functional.interpolate(kwargs["latents"], scale_factor=2)
        return kwargs

    settings = {"guidance_scale": 1.0, "num_inference_steps": STEPS}
    with apply_tgate(subject.pipe, TGateConfig(gate_step=STEPS - 1), callback_on_step_end=grows) as tgate:
        with pytest.warns(
            UserWarning, match="`gate_step` should be past the steps in which the latents change"
        ) as said:
            subject(tgate, **settings)
        assert len(said) == 1
        assert tgate.summary().macs_saved == 0
        quietly(subject, tgate, **settings)


def test_few_steps_are_said_once_to_gain_little(caplog):
    _advice._say_that_few_steps_gain_little.cache_clear()
    subject = tiny("lcm-sdxl")
    with apply_tgate(subject.pipe, TGateConfig(gate_step=2)) as tgate, caplog.at_level(logging.WARNING):
        subject(tgate, num_inference_steps=9)
        assert not caplog.records
        for _ in range(2):
            subject(tgate, num_inference_steps=8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a run of 8 steps or fewer that drops no guidance gains little from T-GATE" in caplog.text


@pytest.mark.parametrize(
    "config",
    [
        TGateConfig(gate_step=2, fi_interval=2),  # self-attention is reused too, which is more
        TGateConfig(gate_step=8),  # it never closes, which is said instead
    ],
)
def test_few_steps_are_not_said_to_gain_little_where_that_is_not_the_matter(config, caplog):
    _advice._say_that_few_steps_gain_little.cache_clear()
    subject = tiny("lcm-sdxl")
    with apply_tgate(subject.pipe, config) as tgate, caplog.at_level(logging.WARNING):
        subject(tgate, num_inference_steps=4)
    assert not caplog.records


def test_few_steps_with_guidance_that_is_kept_are_not_told_that_there_is_none(caplog):
    _advice._say_that_few_steps_gain_little.cache_clear()
    entry = ENTRIES["StableDiffusionPAGPipeline"]
    pipe = seeded(entry.build)
    with apply_tgate(pipe) as tgate, caplog.at_level(logging.WARNING):
        pipe(**entry.call([0]), callback_on_step_end=tgate)
        assert tgate.summary().gate_closed_at == round(0.4 * STEPS)
    assert not caplog.records


@pytest.mark.parametrize("family", ["sd", "pixart-alpha"])
def test_few_steps_with_guidance_save_as_many_do(family, caplog):
    _advice._say_that_few_steps_gain_little.cache_clear()
    subject = tiny(family)
    with apply_tgate(subject.pipe, TGateConfig(gate_step=2)) as tgate, caplog.at_level(logging.WARNING):
        subject(tgate, num_inference_steps=4)
        assert tgate.summary().macs_saved > 0.2
    assert not caplog.records


@pytest.mark.parametrize(
    ("sampler", "config", "message"),
    [
        (
            "euler-a",
            TGateConfig(gate_step=3, guidance_start=1),
            "`guidance_start` should be 0 with EulerAnc",
        ),
        (
            "dpm++-2m-sde-karras",
            TGateConfig(gate_step=3),
            "`look_interval` should be given with an SDE",
        ),
        (
            "dpm++-2m-karras",
            TGateConfig(gate_step="auto"),
            "`gate_step` should be a count or a fraction with this D",
        ),
        ("euler-a", TGateConfig(gate_step="auto"), "`gate_step` should be a count or a fraction with this EulerAnc"),
    ],
)
def test_a_setting_that_costs_more_under_the_sampler_is_told(sampler, config, message):
    """Under another sampler, or with another setting, nothing is said: a warning is an error in these tests."""
    subject = tiny("sd")
    with sampler_on(subject.pipe, sampler), pytest.warns(UserWarning, match=message) as said:
        apply_tgate(subject.pipe, config).remove()
    assert [one.filename for one in said] == [__file__]
    with sampler_on(subject.pipe, "euler"):
        apply_tgate(subject.pipe, config).remove()
    with sampler_on(subject.pipe, sampler):
        apply_tgate(subject.pipe, "looks").remove()


@pytest.mark.filterwarnings("error:`look_interval` should be given")
def test_a_transformer_is_told_that_its_gate_costs_more_under_euler_ancestral():
    """Neither a transformer under its own sampler nor a UNet is told: a warning is an error here."""
    pixart, unet = tiny("pixart-alpha").pipe, tiny("sd").pipe
    apply_tgate(pixart).remove()
    with sampler_on(pixart, "euler-a"):
        with pytest.warns(UserWarning, match="should be given with EulerAncestral.* on a transformer") as said:
            apply_tgate(pixart).remove()
        apply_tgate(pixart, TGateConfig(gate_step=0.24, look_interval=6)).remove()
    assert [one.filename for one in said] == [__file__]
    with sampler_on(unet, "euler-a"):
        apply_tgate(unet).remove()


def test_a_transformer_is_told_that_auto_was_found_on_a_unet():
    """A UNet with the same settings is told nothing: a warning is an error in these tests."""
    with pytest.warns(UserWarning, match="a count or a fraction for a transformer, as PixArtAlpha") as said:
        apply_tgate(tiny("pixart-alpha").pipe, TGateConfig(gate_step="auto")).remove()
    assert [one.filename for one in said] == [__file__]
    apply_tgate(tiny("sd").pipe, TGateConfig(gate_step="auto")).remove()
