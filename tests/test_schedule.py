"""The schedule: the papers' table, and its laws for every configuration."""

import ast
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tgate_processors.schedule
from tgate_processors import ConfigError, TGateConfig
from tgate_processors._clock import StepClock
from tgate_processors._modes import AttentionMode, Phase, StepMode
from tgate_processors.schedule import Schedule


COMPUTES = set(AttentionMode) - {AttentionMode.REUSE}
STORES = {AttentionMode.STORE, AttentionMode.STORE_MEAN, AttentionMode.STORE_HALF}

configs = st.builds(
    TGateConfig,
    gate_step=st.integers(1, 40),
    sp_interval=st.integers(1, 7),
    fi_interval=st.integers(1, 7),
    warm_up=st.integers(0, 10),
)
looking = st.builds(
    TGateConfig,
    gate_step=st.one_of(st.integers(1, 40), st.floats(0.01, 0.99)),
    look_interval=st.integers(2, 9),
    fi_interval=st.integers(1, 3),
)
schedules = st.builds(lambda c, n, g: Schedule(c, n, guidance=g), configs, st.integers(1, 40), st.booleans())
looking_schedules = st.builds(lambda c, n, g: Schedule(c, n, guidance=g), looking, st.integers(1, 40), st.booleans())


def self_modes(schedule):
    return [mode.self_attention for mode in schedule.modes]


def cross_modes(schedule):
    return [mode.cross_attention for mode in schedule.modes]


@given(st.one_of(schedules, looking_schedules))
def test_nothing_is_reused_before_it_is_stored(schedule):
    for modes in (self_modes(schedule), cross_modes(schedule)):
        stored = False
        for mode in modes:
            assert stored or mode is not AttentionMode.REUSE
            stored = stored or mode in STORES


@given(st.one_of(schedules, looking_schedules))
def test_every_store_is_read(schedule):
    for modes in (self_modes(schedule), cross_modes(schedule)):
        for step, mode in enumerate(modes):
            if mode in STORES:
                assert modes[step + 1] is AttentionMode.REUSE


@given(schedules)
def test_what_is_reused_was_stored_for_the_same_batch(schedule):
    """Before the gate the whole batch is stored, at the gate of a guided run its mean, after it the one branch."""
    for modes in (self_modes(schedule), cross_modes(schedule)):
        last_store = None
        for step, mode in enumerate(modes):
            if mode in STORES:
                last_store = step
            if mode is AttentionMode.REUSE and schedule[step].phase is Phase.FIDELITY and schedule.guidance:
                crosses_the_gate = schedule[last_store].phase is Phase.PLANNING
                assert (modes[last_store] is AttentionMode.STORE_MEAN) == crosses_the_gate


@given(schedules)
def test_the_gate_closes_once_at_its_step(schedule):
    phases = [mode.phase for mode in schedule.modes]
    gate = min(schedule.config.gate_step, len(schedule))
    assert phases == [Phase.PLANNING] * gate + [Phase.FIDELITY] * (len(schedule) - gate)
    assert all((mode is AttentionMode.REUSE) == (step >= gate) for step, mode in enumerate(cross_modes(schedule)))


@given(schedules)
def test_self_attention_follows_the_second_papers_table(schedule):
    c = schedule.config
    for step, mode in enumerate(self_modes(schedule)):
        if step >= c.gate_step:
            computes = step % c.fi_interval == 0
        else:
            computes = step <= c.warm_up or step == c.gate_step - 1 or step % c.sp_interval == 0
        assert (mode in COMPUTES) == computes


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 9))
def test_the_first_version_is_the_second_with_intervals_of_one(gate_step, steps, warm_up):
    first = TGateConfig(gate_step=gate_step)
    second = TGateConfig(gate_step=gate_step, sp_interval=1, fi_interval=1, warm_up=warm_up)
    assert first.schedule(steps).modes == second.schedule(steps).modes
    assert set(self_modes(first.schedule(steps))) == {AttentionMode.COMPUTE}


def test_the_schedule_prints_as_a_table():
    assert str(TGateConfig(gate_step=10).schedule(25)) == (
        "steps  phase               cross-attention                        self-attention  branches\n"
        "0-8    semantics-planning  compute                                compute         2\n"
        "9      semantics-planning  compute, store the mean of the halves  compute         2\n"
        "10-24  fidelity-improving  reuse                                  compute         1"
    )


def test_an_illegal_state_cannot_be_written():
    with pytest.raises(ValueError, match="not a valid StepMode"):
        StepMode((Phase.PLANNING, AttentionMode.REUSE, AttentionMode.COMPUTE))


@pytest.mark.parametrize(
    ("clock", "steps"),
    [
        (StepClock(4), [0, 1, 2, 3]),
        (StepClock(7, order=2), [0, 0, 1, 1, 2, 2, 3]),  # Heun: 4 steps, the last of one evaluation
        (StepClock(5, num_warmup_evaluations=1), [0, 0, 1, 2, 3]),  # PNDM: 4 steps, 5 evaluations
        (StepClock(1), [0]),
    ],
)
def test_evaluations_belong_to_steps(clock, steps):
    assert [clock.step(evaluation) for evaluation in range(clock.num_evaluations)] == steps
    assert clock.num_steps == steps[-1] + 1


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.0, 2.5, float("nan"), "5", None, True])
def test_the_gate_step_is_a_count_a_fraction_or_auto(value):
    message = f'`gate_step` must be a whole number of at least 1, a fraction between 0 and 1, or "auto", got {value!r}'
    with pytest.raises(ConfigError, match=re.escape(message)):
        TGateConfig(gate_step=value)


@given(st.floats(0.001, 0.999), st.integers(1, 60))
def test_a_fraction_is_of_the_steps_that_are_run(fraction, steps):
    gate_step = TGateConfig(gate_step=fraction).schedule(steps).gate_step
    assert gate_step == max(1, gate_step)
    assert abs(gate_step - fraction * steps) <= 0.5 or gate_step == 1
    assert TGateConfig(gate_step=0.4).schedule(25).modes == TGateConfig(gate_step=10).schedule(25).modes


def test_auto_plans_until_it_has_decided():
    config = TGateConfig(gate_step="auto")
    assert set(config.schedule(25).modes) == {StepMode.PLANNING}
    assert Schedule(config, 25, closes_at=7).modes == TGateConfig(gate_step=7).schedule(25).modes


def test_auto_needs_steps_to_measure_in():
    with pytest.raises(ConfigError, match='`num_inference_steps` must be at least 5 with `gate_step="auto"`, got 4'):
        TGateConfig(gate_step="auto").schedule(4)


@pytest.mark.parametrize("value", [0.0, 1.0, 1, -0.1, "0.1", None])
def test_a_tolerance_lies_between_0_and_1(value):
    with pytest.raises(ConfigError, match=f"`tolerance` must be a number between 0 and 1, got {value!r}"):
        TGateConfig(gate_step="auto", tolerance=value)


@pytest.mark.parametrize("value", [1, 0, 2.0, True])
def test_looks_leave_steps_between_them(value):
    with pytest.raises(ConfigError, match=f"`look_interval` must be a whole number of at least 2, got {value!r}"):
        TGateConfig(gate_step=3, look_interval=value)


def test_looks_are_steps_of_both_branches():
    schedule = TGateConfig(gate_step=3, look_interval=4).schedule(12)
    assert [mode.phase is Phase.PLANNING for mode in schedule.modes] == [s in (0, 1, 2, 6, 10) for s in range(12)]
    assert [step for step, mode in enumerate(schedule.modes) if mode is StepMode.LOOKING] == [2, 6, 10]


def test_a_look_in_the_last_step_stores_nothing():
    assert TGateConfig(gate_step=1, look_interval=2).schedule(3).modes[-1] is StepMode.PLANNING


@pytest.mark.parametrize("value", [0, -1, 2.0, 0.4, "5", None, True])
@pytest.mark.parametrize("name", ["sp_interval", "fi_interval"])
def test_counts_must_be_whole_and_at_least_one(name, value):
    with pytest.raises(
        ConfigError, match=f"`{name}` must be a whole number of at least 1, got {value!r}. Pass an int"
    ):
        TGateConfig(**({"gate_step": 5} | {name: value}))


@pytest.mark.parametrize("value", [-1, 1.5, None])
def test_warm_up_must_not_be_negative(value):
    with pytest.raises(ValueError, match=f"`warm_up` must be a whole number of at least 0, got {value!r}"):
        TGateConfig(gate_step=5, warm_up=value)


def test_branch_must_have_a_name():
    with pytest.raises(
        ConfigError, match=r'`branch` must be "negative", "positive" or None, got .both.\. Leave it out'
    ):
        TGateConfig(gate_step=5, branch="both")


def test_a_schedule_needs_a_step():
    with pytest.raises(ConfigError, match="`num_inference_steps` must be a whole number of at least 1, got 0"):
        TGateConfig(gate_step=5).schedule(0)


def test_a_configuration_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        TGateConfig(gate_step=5).gate_step = 6
    with pytest.raises(TypeError):
        TGateConfig(5)


def test_the_schedule_needs_no_torch():
    source = ast.parse(Path(tgate_processors.schedule.__file__).read_text())
    imported = {node.module.split(".")[0] for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name for node in ast.walk(source) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= set(sys.stdlib_module_names) | {"tgate_processors"}
