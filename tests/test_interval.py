"""A guidance interval: steps before `guidance_start` denoise the positive branch alone, those up to the gate both."""

import pytest
import torch
from every import CALLS
from hypothesis import given
from hypothesis import strategies as st
from seen import Seen
from test_gate import STEPS as LOOP_STEPS
from test_gate import loop
from tiny import Observed, fingerprint, left_behind, tiny
from zoo import ENTRIES, STEPS, seeded

from tgate_processors import ConfigError, Gate, TGateConfig, apply_tgate, gated_processors
from tgate_processors import _deepcache as deepcache
from tgate_processors._installation import is_gated
from tgate_processors._kept import UNMEASURED
from tgate_processors._modes import AttentionMode, Phase, StepMode
from tgate_processors._pipelines import denoisers_of, side_networks_of, takes_callback


NEVER = 99
LATE = TGateConfig(gate_step=NEVER, guidance_start=2)  # both branches to the end
TWO_DENOISERS = "WanPipeline (two denoisers)"

# The schedule


@st.composite
def intervals(draw):
    """A configuration, and a number of steps that it fits."""
    start = draw(st.integers(0, 20))
    config = TGateConfig(
        gate_step=draw(st.integers(start + 1, 40)),
        sp_interval=draw(st.integers(1, 6)),
        fi_interval=draw(st.integers(1, 4)),
        warm_up=draw(st.integers(0, 10)),
        look_interval=draw(st.none() | st.integers(2, 6)),
        guidance_start=start,
    )
    return config, draw(st.integers(start + 1, 40))


def from_the_first_step(config, **changes):
    """The same configuration without `guidance_start`."""
    return TGateConfig(**vars(config) | {"guidance_start": 0} | changes)


def test_the_schedule_prints_the_steps_before_guidance():
    assert str(TGateConfig(gate_step=10, guidance_start=3).schedule(25)) == (
        "steps  phase               cross-attention                        self-attention  branches\n"
        "0-2    before guidance     compute                                compute         1\n"
        "3-8    semantics-planning  compute                                compute         2\n"
        "9      semantics-planning  compute, store the mean of the halves  compute         2\n"
        "10-24  fidelity-improving  reuse                                  compute         1"
    )


def test_guidance_in_one_step_alone():
    schedule = TGateConfig(gate_step=3, guidance_start=2).schedule(5)
    assert schedule.modes == (*[StepMode.UNGUIDED] * 2, StepMode.CLOSING, *[StepMode.FIDELITY] * 2)


@given(intervals())
def test_the_steps_before_guidance_are_unguided_and_no_others(case):
    config, steps = case
    modes = config.schedule(steps).modes
    assert [mode is StepMode.UNGUIDED for mode in modes] == [step < config.guidance_start for step in range(steps)]


@given(intervals())
def test_the_first_step_with_guidance_reuses_nothing(case):
    config, steps = case
    mode = config.schedule(steps)[config.guidance_start]
    assert AttentionMode.REUSE not in (mode.self_attention, mode.cross_attention)


@given(intervals())
def test_what_follows_is_the_schedule_without_it(case):
    """From the first step with guidance on where all self-attention is computed, else from the next."""
    config, steps = case
    start = config.guidance_start
    modes, others = config.schedule(steps).modes, from_the_first_step(config).schedule(steps).modes
    assert modes[start + 1 :] == others[start + 1 :]
    every = TGateConfig(**vars(config) | {"sp_interval": 1})
    assert every.schedule(steps).modes[start:] == from_the_first_step(every).schedule(steps).modes[start:]


@given(intervals())
def test_nothing_is_stored_in_vain_or_reused_unstored(case):
    config, steps = case
    for kind in ("self_attention", "cross_attention"):
        modes = [getattr(mode, kind) for mode in config.schedule(steps).modes]
        for before, mode in zip([AttentionMode.COMPUTE, *modes], modes, strict=False):
            assert mode is not AttentionMode.REUSE or before is not AttentionMode.COMPUTE
            assert not before.stores or mode is AttentionMode.REUSE
        assert not modes[-1].stores


@given(intervals())
def test_without_guidance_there_is_no_interval(case):
    config, steps = case
    without = from_the_first_step(config).schedule(steps, guidance=False)
    assert config.schedule(steps, guidance=False).modes == without.modes


@given(st.floats(0.01, 0.99), st.integers(1, 60))
def test_a_fraction_rounds_as_the_gates_does(fraction, steps):
    start = round(fraction * steps)
    config = TGateConfig(gate_step=NEVER, guidance_start=fraction)
    if start == steps:  # guidance would begin after the end
        with pytest.raises(ConfigError, match="guidance would never begin"):
            config.schedule(steps)
    else:
        schedule = config.schedule(steps)
        assert schedule.guidance_start == start
        assert max(1, schedule.guidance_start) == TGateConfig(gate_step=fraction).schedule(steps).gate_step
        assert schedule.modes.count(StepMode.UNGUIDED) == start


# Pipelines whose branches are one batch


def with_the_positive_branch_alone(denoiser, steps=2, *, positive=1):
    """A stock denoiser whose first evaluations, one for each step, put out the positive branch in both halves."""
    forward, evaluations = denoiser.forward, iter(range(NEVER))

    def one_branch(*args, **kwargs):
        (sample, *rest) = forward(*args, **kwargs, **{} if "return_dict" in kwargs else {"return_dict": False})
        if next(evaluations) < steps:
            sample = torch.cat([sample.chunk(2)[positive]] * 2)
        return sample, *rest

    denoiser.forward = one_branch


def are_close(latents, expected):
    """Kernels differ by batch."""
    return torch.allclose(latents, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "branch"), [("sd", None), ("sd", "positive"), ("sdxl", None), ("svd", "negative"), ("sd-inpaint", None)]
)
def test_before_guidance_the_positive_branch_alone_is_denoised(family, branch):
    """Whichever branch goes on after the gate."""
    subject, other = tiny(family), tiny(family)
    stock = subject()
    before = fingerprint(subject.denoiser)
    with_the_positive_branch_alone(other.denoiser)
    seen = Seen(subject.denoiser)
    with apply_tgate(subject.pipe, TGateConfig(gate_step=NEVER, guidance_start=2, branch=branch)) as tgate:
        latents = subject(tgate)
        steps = tgate.gate.clock.num_steps
    seen.stop()
    whole = seen.batches[-1]
    assert seen.batches == [whole // 2] * 2 + [whole] * (steps - 2)
    assert are_close(latents, other())
    assert not torch.allclose(latents, stock, rtol=0, atol=1e-4)
    assert left_behind(before, subject.denoiser) == {}
    assert torch.equal(subject(), stock)


def run(name, config=None, prepare=None, **changes):
    """The latents, the batches that reached each network, the handle, removed, and the pipeline."""
    pipe = seeded(ENTRIES[name].build)
    if prepare is not None:
        prepare(pipe)
    kwargs = ENTRIES[name].call([0]) | changes
    seen = list(map(Seen, [*denoisers_of(pipe), *side_networks_of(pipe)]))
    if config is None:
        latents, tgate = pipe(**kwargs)[0], None
    else:
        with apply_tgate(pipe, config) as tgate:
            if takes_callback(pipe):
                kwargs["callback_on_step_end"] = tgate
            latents = pipe(**kwargs)[0]
    for one in seen:
        one.stop()
    return latents, [one.batches for one in seen], tgate, pipe


def test_a_batch_that_begins_with_the_positive_branch():
    name = "LuminaPipeline"
    latents, batches, *_ = run(name, LATE)
    expected, *_ = run(name, prepare=lambda pipe: with_the_positive_branch_alone(pipe.transformer, positive=0))
    assert batches == [[1] * 2 + [2] * (STEPS - 2)]
    assert are_close(latents, expected)


@pytest.mark.parametrize("name", ["PixArtAlphaPipeline", "TextToVideoSDPipeline", "StableAudioPipeline"])
def test_a_pipeline_that_does_not_say_whether_it_does_guidance(name):
    _, (batches,), *_ = run(name, LATE)
    assert batches == [1] * 2 + [2] * (STEPS - 2)


def test_a_controlnet_is_given_the_positive_branch_too():
    name = "StableDiffusionControlNetPipeline"
    latents, batches, tgate, pipe = run(name, LATE)
    expected, *_ = run(name, prepare=lambda pipe: with_the_positive_branch_alone(pipe.unet))
    assert batches == [[1] * 2 + [2] * (STEPS - 2)] * 2
    assert are_close(latents, expected)
    assert [e.batch for e in tgate.summary().side_evaluations[0]] == batches[1]
    assert not any(map(is_gated, [pipe.unet, pipe.controlnet]))
    _, closed, *_ = run(name, TGateConfig(gate_step=3, guidance_start=2))
    assert closed == [[1, 1, 2, 1]] * 2


@pytest.mark.parametrize("changes", [{}, {"sp_interval": 2, "fi_interval": 2}])
def test_two_branches_between_one_and_one(changes):
    subject = tiny("sd")
    seen = Seen(subject.denoiser)
    with apply_tgate(subject.pipe, TGateConfig(gate_step=5, guidance_start=2, **changes)) as tgate:
        latents = subject(tgate, num_inference_steps=9)
    summary = tgate.summary()
    assert seen.batches == [1, 1, 2, 2, 2, 1, 1, 1, 1]
    assert summary.batches == tuple(seen.batches)
    assert summary.gate_closed_at == 5
    assert summary.cost.cross_computed == seen.computed["cross"] == 5 * len(seen.cross)
    assert summary.cost.self_computed == seen.computed["self"]
    assert [mode.phase for mode in summary.schedule.modes[1:3]] == [Phase.UNGUIDED, Phase.PLANNING]
    assert torch.isfinite(latents).all()
    with apply_tgate(subject.pipe, TGateConfig(gate_step=5, **changes)) as tgate:
        subject(tgate, num_inference_steps=9)
    assert 0 < tgate.summary().macs_saved < summary.macs_saved


def test_steps_without_guidance_alone_are_counted_as_savings():
    """Of 10 evaluations of one branch two are left out, and nothing else: the gate does not close."""
    subject = tiny("sd")
    with apply_tgate(subject.pipe, LATE) as tgate:
        subject(tgate, num_inference_steps=5)
    summary = tgate.summary()
    assert summary.gate_closed_at is None
    assert summary.macs_saved == pytest.approx(0.2, abs=1e-3)
    assert summary.cost.cross_reused == 0


def test_a_batch_of_two_pictures_is_each_alone():
    subject = tiny("sd")
    config = TGateConfig(gate_step=3, guidance_start=1, sp_interval=2)
    embeds = {name: subject.kwargs()[name] for name in ("prompt_embeds", "negative_prompt_embeds", "latents")}
    other = {name: tensor.flip(-1) for name, tensor in embeds.items()}
    both = {name: torch.cat([embeds[name], other[name]]) for name in embeds}
    latents = []
    with apply_tgate(subject.pipe, config) as tgate:
        for inputs in (both, embeds, other):
            latents.append(subject(tgate, num_inference_steps=6, **inputs))
            assert set(tgate.summary().batches) == {len(inputs["latents"]), 2 * len(inputs["latents"])}
    together, *alone = latents
    assert torch.allclose(together, torch.cat(alone), rtol=0, atol=1e-4)
    assert not torch.allclose(*alone, rtol=0, atol=1e-2)


def test_a_run_without_guidance_has_no_interval():
    subject = tiny("sd")
    latents = []
    for start in (0, 2):
        with apply_tgate(subject.pipe, TGateConfig(gate_step=4, guidance_start=start)) as tgate:
            latents.append(subject(tgate, num_inference_steps=9, guidance_scale=1.0))
        assert set(tgate.summary().batches) == {1}
    assert torch.equal(*latents)


def test_looks_keep_the_guidance_of_guided_steps(monkeypatch):
    """Before the first look both halves are equal; after it they differ by what it saw, and by no step before."""
    subject = tiny("sd")
    differences = {}
    seen = Seen(subject.denoiser)
    with apply_tgate(subject.pipe, TGateConfig(gate_step=3, guidance_start=2, look_interval=3)) as tgate:
        call = type(subject.denoiser).__call__

        def noted(self, *args, **kwargs):
            step, output = tgate.gate.step, call(self, *args, **kwargs)
            negative, positive = output[0].chunk(2)
            differences[step] = positive - negative
            return output

        monkeypatch.setattr(type(subject.denoiser), "__call__", noted)
        subject(tgate, num_inference_steps=9)
    assert seen.batches == [1, 1, 2, 1, 1, 2, 1, 1, 2]
    assert not differences[0].any()
    assert not differences[1].any()
    assert differences[2].any()
    size = float(differences[2].abs().max())
    for step in (3, 4):
        faded = differences[2] * UNMEASURED ** (step - 2)
        assert torch.allclose(differences[step], faded, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("start", [0, 3, 5])
def test_a_gate_that_decides_itself_waits_for_guidance(start):
    """It needs two changes of steps with guidance, which tell nothing of the steps before."""
    subject = tiny("sd")
    seen = Seen(subject.denoiser)
    with apply_tgate(
        subject.pipe, TGateConfig(gate_step="auto", tolerance=0.9, guidance_start=start, look_interval=None)
    ) as tgate:
        subject(tgate, num_inference_steps=12)
    summary = tgate.summary()
    assert summary.gate_closed_at == start + 4
    assert len(summary.changes) == 2
    assert seen.batches == [1] * start + [2] * 4 + [1] * (8 - start)
    assert summary.batches == tuple(seen.batches)


def test_deepcache_begins_anew_where_guidance_begins():
    subject = tiny("sd")
    seen = Observed(subject)
    helper = deepcache.make_helper(subject.pipe, 2, 0)
    config = TGateConfig(gate_step=6, guidance_start=3)
    with deepcache.enabled(helper), apply_tgate(subject.pipe, config, deepcache=helper) as tgate:
        subject(tgate, num_inference_steps=8)
        summary = tgate.summary()
    assert seen.batches == [1, 1, 1, 2, 2, 2, 1, 1]
    assert [step for step, one in enumerate(summary.evaluations) if not one.shallow] == [0, 2, 3, 5, 6]


# Pipelines whose branches are calls


@pytest.mark.parametrize("name", CALLS)
def test_a_call_for_the_positive_branch_alone_then_two_then_one(name):
    latents, batches, tgate, _ = run(name, TGateConfig(gate_step=3, guidance_start=1))
    if name == TWO_DENOISERS:  # the second is first called in a step with guidance
        assert batches[0][:2] == [1, 1]
        assert sum(map(len, batches)) < 2 * STEPS - 1
    else:
        assert len(batches[0]) == 1 + 2 + 2 + 1
    assert len(tgate.summary().batches) == sum(map(len, batches))
    assert tgate.summary().macs_saved > 0
    assert torch.isfinite(latents).all()


@pytest.mark.parametrize("name", CALLS)
def test_before_guidance_the_second_call_is_answered_with_the_first(name):
    def prepare(pipe):
        evaluations, first = iter(range(NEVER)), []
        for denoiser in denoisers_of(pipe):

            def one_branch(*args, forward=denoiser.forward, **kwargs):
                number, output = next(evaluations), forward(*args, **kwargs)
                first[number % 2 :] = [output]
                return first[0] if number < 4 else output

            denoiser.forward = one_branch

    latents, batches, *_ = run(name, LATE)
    expected, *_ = run(name, prepare=prepare)
    assert are_close(latents, expected)
    assert sum(map(len, batches)) == 2 * STEPS - 2


@pytest.mark.parametrize("name", ["WanPipeline", "CosmosTextToWorldPipeline"])
def test_looks_and_an_interval_in_calls(name):
    config = TGateConfig(gate_step=2, guidance_start=1, look_interval=2)
    _, batches, *_ = run(name, config, num_inference_steps=7)
    assert len(batches[0]) == sum(2 if step in (1, 3, 5) else 1 for step in range(7))


# In a loop of one's own


@pytest.mark.parametrize(("branch", "rows"), [("negative", [0, 1]), ("positive", [2, 3]), (None, [0, 1])])
def test_a_loop_of_ones_own_folds_to_the_positive_half_before_guidance(branch, rows):
    unet = tiny("sd").denoiser
    gate = Gate(TGateConfig(gate_step=2, guidance_start=1, branch=branch))
    unet.set_attn_processor(gated_processors(unet, gate))
    run = gate.start(4, guidance=True)
    folded = []
    for _ in range(3):
        folded.append(run.fold(torch.arange(4)).tolist())
        output = unet(run.fold(torch.randn(4, 4, 8, 8)), 5, run.fold(torch.randn(4, 7, 32))).sample
        assert len(run.unfold(output)) == 4
        run.advance()
    assert folded == [[2, 3], [0, 1, 2, 3], rows]


@pytest.mark.parametrize(
    "config",
    [
        LATE,
        TGateConfig(gate_step=4, guidance_start=2, sp_interval=2),
        TGateConfig(gate_step=3, guidance_start=2, look_interval=3),
        TGateConfig(gate_step="auto", guidance_start=2, tolerance=0.9),
    ],
    ids=str,
)
def test_a_loop_of_ones_own_is_as_a_pipelines(config):
    subject = tiny("sd")
    with apply_tgate(subject.pipe, config) as tgate:
        expected = subject(tgate, num_inference_steps=LOOP_STEPS)
    latents, batches = loop(subject, config)
    assert torch.equal(latents, expected)
    assert batches == list(tgate.summary().batches)
    assert batches[:3] == [1, 1, 2]


# Errors


@pytest.mark.parametrize("value", [-1, True, 1.5, 1.0, -0.1, float("nan"), "x", None])
def test_what_is_no_start_is_refused(value):
    message = rf"`guidance_start` must be a whole number of at least 0, or a fraction .*, got {value!r}\. Pass"
    with pytest.raises(ConfigError, match=message):
        TGateConfig(gate_step=10, guidance_start=value)


@pytest.mark.parametrize(("start", "gate"), [(5, 5), (6, 5), (0.5, 0.5), (0.6, 0.5)])
def test_guidance_that_begins_at_the_gate_is_refused_at_once(start, gate):
    message = f"`guidance_start` must be below `gate_step`, got {start} with the gate at {gate}: guidance would never"
    with pytest.raises(ConfigError, match=message):
        TGateConfig(gate_step=gate, guidance_start=start)


@pytest.mark.parametrize(
    ("start", "gate", "steps", "at"),
    [
        (0.9, 3, 10, "9 with the gate at 3"),
        (5, 0.4, 10, "5 with the gate at 4"),
        (6, "auto", 6, "6 with the gate at 6"),
    ],
)
def test_guidance_that_begins_at_the_gate_of_a_run_is_refused_with_its_steps(start, gate, steps, at):
    config = TGateConfig(gate_step=gate, guidance_start=start)
    with pytest.raises(ConfigError, match=f"`guidance_start` must be below `gate_step`, got {at}: guidance would"):
        config.schedule(steps)


def test_a_fraction_below_a_count_is_fine():
    schedule = TGateConfig(gate_step=3, guidance_start=0.5).schedule(4)
    assert schedule.modes == (StepMode.UNGUIDED, StepMode.UNGUIDED, StepMode.CLOSING, StepMode.FIDELITY)


def test_a_run_that_is_too_short_says_so_and_leaves_nothing():
    subject = tiny("sd")
    stock = subject()
    with apply_tgate(subject.pipe, TGateConfig(gate_step="auto", guidance_start=6)) as tgate:
        with pytest.raises(ConfigError, match="`guidance_start` must be below `gate_step`, got 6 with the gate at 5"):
            subject(tgate, num_inference_steps=5)
        subject(tgate, num_inference_steps=12)
        assert tgate.summary().batches[:7] == (1,) * 6 + (2,)
    assert torch.equal(subject(), stock)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("SanaSprintPipeline", "which does no guidance"),
        ("StableDiffusionInstructPix2PixPipeline", "which denoises more than the two branches of guidance"),
        ("StableDiffusionPAGPipeline", "which denoises more than the two branches of guidance"),
    ],
)
def test_a_pipeline_of_other_branches_is_refused(name, why):
    pipe = seeded(ENTRIES[name].build)
    (denoiser,) = denoisers_of(pipe)
    before = fingerprint(denoiser)
    for start in (2, 0.1):
        config = TGateConfig(gate_step=NEVER, guidance_start=start)
        with pytest.raises(ConfigError, match=rf"`guidance_start` must be 0 for {name}, {why}, got {start}\. Leave"):
            apply_tgate(pipe, config)
    assert not is_gated(denoiser)
    assert left_behind(before, denoiser) == {}
    apply_tgate(pipe, TGateConfig(gate_step=2, guidance_start=0)).remove()
