"""The gate that closes itself: when, for which pictures, in which networks, and at what cost."""

import diffusers
import pytest
import torch
from tiny import fingerprint, left_behind, tiny
from torch._dynamo.utils import counters
from zoo_unets import one_block

from tgate_processors import ConfigError, Gate, TGateConfig, apply_tgate, gated_processors
from tgate_processors._watch import Watch, has_converged, watched_layers


AUTO = TGateConfig(gate_step="auto", tolerance=0.999)  # the tiny models' attention is random, and changes much
STEPS = 9


def closing_at(step, steps=STEPS):
    """A configuration with which the tiny pipeline closes its gate at this step, by its own changes."""
    subject = tiny("sd")
    with apply_tgate(subject.pipe, TGateConfig(gate_step="auto", tolerance=1e-9)) as tgate:
        subject(tgate, num_inference_steps=steps)
        changes = tgate.summary().changes
    patience = 2
    for tolerance in sorted(change * 1.001 for change in changes):
        if not 0 < tolerance < 1:
            continue
        under = [all(c < tolerance for c in changes[i - patience + 1 : i + 1]) for i in range(1, len(changes))]
        if True in under and under.index(True) + 4 == step:
            return TGateConfig(gate_step="auto", tolerance=tolerance)
    raise AssertionError(changes)


# Watching


def test_a_change_is_relative_and_of_the_sample_that_changed_most():
    watch = Watch(num_steps=25)
    before = torch.ones(4, 3, 2)
    watch.compare([before], 4)
    now = before.clone()
    now[1] *= 1.5
    now[2] *= 0.9
    watch.compare([now], 4)
    assert watch.changes == [[pytest.approx(0.5)]]
    watch.compare([now * 2], 2)  # of two samples with two rows each
    assert watch.changes[1] == [pytest.approx(1.0)]


def test_changes_are_of_a_twenty_fifth_of_the_run():
    for steps, factor in ((25, 1.0), (50, 2.0), (10, 0.4)):
        watch = Watch(steps)
        watch.compare([torch.ones(1, 2)], 1)
        watch.compare([torch.full((1, 2), 1.1)], 1)
        assert watch.changes == [[pytest.approx(0.1 * factor, rel=1e-5)]]


def test_a_layer_that_was_passed_over_is_not_looked_at():
    watch = Watch(25)
    kept, other = torch.ones(1, 2), torch.ones(1, 2)
    watch.compare([kept, other], 1)
    watch.compare([kept, other * 2], 1)
    assert watch.changes == [[pytest.approx(1.0)]]
    watch.compare([None, None], 1)
    assert len(watch.changes) == 1


def test_nothing_that_stays_nothing_has_not_changed():
    watch = Watch(25)
    watch.compare([torch.zeros(1, 2)], 1)
    watch.compare([torch.zeros(1, 2)], 1)
    assert watch.changes == [[0.0]]


@pytest.mark.parametrize(
    ("changes", "steps", "converged"),
    [
        ([0.05], 10, False),  # one step under the tolerance is none
        ([0.05, 0.05], 10, True),
        ([0.05, 0.11, 0.05], 10, False),
        ([0.05, 0.05, 0.05], 25, False),
        ([0.2, 0.05, 0.09, 0.05, 0.09], 25, True),
        ([0.05] * 7, 50, False),  # twice the steps, twice as many
        ([0.05] * 8, 50, True),
    ],
)
def test_it_has_converged_when_it_stays_under_the_tolerance(changes, steps, converged):
    assert has_converged([[change, change] for change in changes], steps, 0.1) is converged


def test_what_decides_is_the_mean_over_layers():
    assert has_converged([[0.0, 0.18], [0.0, 0.18]], 10, 0.1)
    assert not has_converged([[0.0, 0.21], [0.0, 0.21]], 10, 0.1)


def test_what_is_not_a_number_never_converges():
    nan = float("nan")
    assert not has_converged([[0.01, 0.01], [nan, 0.01]], 10, 0.1)
    assert not has_converged([[nan, 0.01], [0.01, 0.01]], 10, 0.1)
    watch = Watch(25)
    for value in (1.0, nan, nan, 1.0):
        watch.compare([torch.full((1, 2), value)], 1)
    assert [change != change for [change] in watch.changes] == [True, True, True]


def test_watched_layers_are_spread():
    assert watched_layers(7) == [0, 2, 4, 6]
    assert watched_layers(70) == [8, 26, 43, 61]
    assert watched_layers(2) == [0, 1]


# In a run


@pytest.mark.parametrize("gate_step", [4, 5, 8])
def test_a_run_that_closes_itself_is_the_run_with_that_gate_step(gate_step):
    config = closing_at(gate_step)
    subject = tiny("sd")
    with apply_tgate(subject.pipe, TGateConfig(gate_step=gate_step)) as tgate:
        expected = subject(tgate, num_inference_steps=STEPS)
    before = fingerprint(subject.denoiser)
    with apply_tgate(subject.pipe, config) as tgate:
        for _ in range(2):  # the second run begins with nothing of the first
            assert torch.equal(subject(tgate, num_inference_steps=STEPS), expected)
            summary = tgate.summary()
            assert summary.gate_closed_at == gate_step
            assert len(summary.changes) == gate_step - 2
            assert max(summary.changes[-2:]) < config.tolerance
            assert tgate.gate.cache_bytes == 0
    assert f"gate closed before step {gate_step}" in str(summary)
    assert f"{summary.changes[-1]:.3f}: under {config.tolerance:g}" in str(summary)
    assert left_behind(before, subject.denoiser) == {}


def test_a_run_knows_nothing_of_the_last_ones_decision():
    subject = tiny("sd")
    config = closing_at(5)
    with apply_tgate(subject.pipe, config) as tgate:
        subject(tgate, num_inference_steps=STEPS)
        assert (tgate.gate.closes_at, tgate.gate.gate_step) == (5, 5)
        at_the_start = []
        hook = subject.denoiser.register_forward_hook(lambda *_: at_the_start.append(tgate.gate.gate_step))
        subject(tgate, num_inference_steps=STEPS)
        hook.remove()
    assert at_the_start[0] == STEPS


def test_a_run_that_does_not_converge_is_the_stock_run():
    subject = tiny("sd")
    stock = subject(num_inference_steps=STEPS)
    with apply_tgate(subject.pipe, TGateConfig(gate_step="auto", tolerance=1e-9)) as tgate:
        with pytest.warns(UserWarning, match='got "auto": the gate never closed. Cross-attention had not converged'):
            assert torch.equal(subject(tgate, num_inference_steps=STEPS), stock)
        summary = tgate.summary()
    assert summary.gate_closed_at is None
    assert len(summary.changes) == STEPS - 1
    assert "gate never closed" in str(summary)
    assert "not all under 1e-09" in str(summary)


def test_the_device_is_waited_for_once_a_step(monkeypatch):
    looks = []
    look = Watch.compare
    monkeypatch.setattr(Watch, "compare", lambda self, *args: (looks.append(len(self.before)), look(self, *args)))
    waits = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (waits.append(self.shape), tolist(self))[1])
    subject = tiny("sd")
    with apply_tgate(subject.pipe, TGateConfig(gate_step="auto", tolerance=1e-9)) as tgate:
        subject(tgate, num_inference_steps=STEPS)
    assert len(looks) == STEPS
    assert len(waits) <= len(looks)
    assert max(looks) <= 4


@pytest.mark.parametrize("family", ["sdxl", "pixart-alpha", "svd", "lcm-sdxl"])
def test_every_family_decides(family):
    subject = tiny(family)
    with apply_tgate(subject.pipe, AUTO) as tgate:
        latents = subject(tgate, num_inference_steps=7)
        summary = tgate.summary()
    if summary.gate_closed_at is None:
        assert torch.equal(latents, subject(num_inference_steps=7))
    else:
        with apply_tgate(subject.pipe, TGateConfig(gate_step=summary.gate_closed_at)) as tgate:
            assert torch.equal(latents, subject(tgate, num_inference_steps=7))


def test_a_batch_waits_for_its_slowest_prompt():
    config = closing_at(5)
    subject = tiny("sd")
    names = ("prompt_embeds", "negative_prompt_embeds", "latents")
    one = {name: subject.kwargs()[name] for name in names}
    other = {name: tensor.flip(-1) for name, tensor in one.items()}
    both = {name: torch.cat([one[name], other[name]]) for name in names}
    with apply_tgate(subject.pipe, config) as tgate:
        changes = []
        for embeds in (one, other, both):
            subject(tgate, num_inference_steps=STEPS, **embeds)
            changes.append(tgate.summary().changes)
    shortest = min(map(len, changes))
    for step in range(shortest):
        assert changes[2][step] >= max(changes[0][step], changes[1][step]) - 1e-5
    assert len(changes[2]) >= max(len(changes[0]), len(changes[1]))


def test_a_controlnet_follows_the_denoiser():
    import zoo_unets  # noqa: F401  # registers its pipelines
    from zoo import ENTRIES
    from zoo import seeded as build

    entry = ENTRIES["StableDiffusionControlNetPipeline"]
    pipe = build(entry.build)
    with apply_tgate(pipe, AUTO) as tgate:
        pipe(**entry.call([0]) | {"num_inference_steps": 8}, callback_on_step_end=tgate)
        gate_step = tgate.summary().gate_closed_at
        summary = tgate.summary()
        denoiser, side = summary.evaluations, summary.side_evaluations[0]
    assert gate_step is not None
    assert [e.mode for e in denoiser] == [e.mode for e in side]
    assert sum(bool(part.watch.changes) for part in tgate.gate.parts.values()) == 1


def test_of_two_denoisers_the_second_may_decide():
    import zoo_transformers  # noqa: F401  # registers its pipelines
    from zoo import ENTRIES
    from zoo import seeded as build

    entry = ENTRIES["WanPipeline (two denoisers)"]
    pipe = build(entry.build)
    with apply_tgate(pipe, AUTO) as tgate:
        pipe(**entry.call([0]) | {"num_inference_steps": 12}, callback_on_step_end=tgate)
        decided = tgate.gate.closes_at
        modes = tgate.summary().schedule.modes
    assert decided is not None
    assert modes == TGateConfig(gate_step=decided).schedule(12).modes


def test_heun_evaluates_twice_and_is_looked_at_once():
    subject = tiny("sd")
    subject.pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(subject.pipe.scheduler.config)
    with apply_tgate(subject.pipe, TGateConfig(gate_step="auto", tolerance=1e-9)) as tgate:
        subject(tgate, num_inference_steps=6)
        assert len(tgate.summary().changes) == 5


def test_auto_beside_offloaded_caches_and_self_attention():
    config = closing_at(5)
    subject = tiny("sd")
    latents = []
    for changes in ({}, {"offload_cache": True}):
        with apply_tgate(subject.pipe, TGateConfig(gate_step="auto", tolerance=config.tolerance, **changes)) as tgate:
            latents.append(subject(tgate, num_inference_steps=STEPS))
    assert torch.equal(*latents)


def test_compiled_graphs_are_as_many_as_with_a_count():
    """Three: planning, the step that stores, fidelity."""
    pipe, kwargs = one_block()
    torch._dynamo.reset()
    counters.clear()
    pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)
    with apply_tgate(pipe, AUTO) as tgate:
        for _ in range(3):
            pipe(**kwargs | {"num_inference_steps": STEPS}, callback_on_step_end=tgate)
            assert tgate.summary().gate_closed_at is not None
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 3


def test_in_a_loop_of_ones_own():
    config = closing_at(5)
    subject = tiny("sd")
    unet, scheduler = subject.denoiser, subject.pipe.scheduler
    kwargs = subject.kwargs()
    gate = Gate(config)
    unet.set_attn_processor(gated_processors(unet, gate))
    run = gate.start(STEPS, guidance=True)
    scheduler.set_timesteps(STEPS)
    latents = kwargs["latents"]
    embeds = torch.cat([kwargs["negative_prompt_embeds"], kwargs["prompt_embeds"]])
    closed = []
    for t in scheduler.timesteps:
        closed.append(run.closed)
        output = unet(run.fold(torch.cat([latents] * 2)), t, encoder_hidden_states=run.fold(embeds))[0]
        negative, positive = run.unfold(output).chunk(2)
        noise = negative + kwargs["guidance_scale"] * (positive - negative)
        latents = scheduler.step(noise, t, latents)[0]
        run.advance()
    assert closed.index(True) == 5


# Bad input


def test_a_run_too_short_to_measure_leaves_the_pipeline_usable():
    subject = tiny("sd")
    with apply_tgate(subject.pipe, AUTO) as tgate:
        with pytest.raises(ConfigError, match="`num_inference_steps` must be at least 5 with"):
            subject(tgate, num_inference_steps=4)
        subject(tgate, num_inference_steps=6)
    assert torch.equal(subject(num_inference_steps=4), tiny("sd")(num_inference_steps=4))


def test_a_loop_that_never_calls_the_callback():
    """The timesteps say the step."""
    config = closing_at(5)
    subject = tiny("sd")
    with apply_tgate(subject.pipe, config) as tgate:
        expected = subject(tgate, num_inference_steps=STEPS)
        assert torch.equal(subject(num_inference_steps=STEPS), expected)


def test_what_is_counted_without_a_run_needs_a_known_step():
    from tgate_processors.measure.architectures import architecture
    from tgate_processors.measure.run_cost import run_cost

    with pytest.raises(
        ConfigError, match='`gate_step` must be a count or a fraction where nothing is run, got "auto"'
    ):
        run_cost(architecture("sd-1.5"), AUTO)
