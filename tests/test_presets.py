"""Presets: the documentation's settings, by name."""

import logging

import pytest
from tiny import tiny

from tgate_processors import ConfigError, TGateConfig, _loop, apply_tgate, preset
from tgate_processors.measure.samplers import sampler_on
from tgate_processors.presets import PRESETS


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
    config = preset(name)
    assert config.schedule(steps).gate_step == gate_step
    assert (config.sp_interval, config.fi_interval, config.warm_up) == (sp_interval, 1, warm_up)


def test_each_has_a_source():
    assert all(len(known.source) > 20 for known in PRESETS.values())


def test_a_name_that_is_none():
    with pytest.raises(ConfigError, match=r"`name` must be one of sd-1.5, .*, got 'flux'"):
        preset("flux")


def test_few_steps_are_said_once_to_gain_little(caplog):
    _loop._say_that_few_steps_gain_little.cache_clear()
    subject = tiny("lcm-sdxl")
    with apply_tgate(subject.pipe, TGateConfig(gate_step=2)) as tgate, caplog.at_level(logging.WARNING):
        subject(tgate, num_inference_steps=9)
        assert not caplog.records
        for _ in range(2):
            subject(tgate, num_inference_steps=8)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "a run of 8 steps or fewer that drops no guidance gains little from T-GATE" in caplog.text


@pytest.mark.parametrize("family", ["sd", "pixart-alpha"])
def test_few_steps_with_guidance_save_as_many_do(family, caplog):
    _loop._say_that_few_steps_gain_little.cache_clear()
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
        apply_tgate(subject.pipe, preset("looks")).remove()
