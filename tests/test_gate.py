"""The gate for a loop of one's own: safe to use wrongly, and as a pipeline's where it is used right."""

import pytest
import torch
from tiny import fingerprint, left_behind, tiny

from tgate_processors import (
    ConfigError,
    Gate,
    StateError,
    TGateConfig,
    apply_tgate,
    gated_processors,
    ungated_processors,
)


STEPS = 9


def loop(subject, config, *, guidance_scale=5.0):
    """A denoising loop of one's own over a tiny pipeline's parts, and the batches that the network was given."""
    unet, scheduler, kwargs = subject.denoiser, subject.pipe.scheduler, subject.kwargs()
    batches = []
    hook = unet.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    gate = Gate(config)
    unet.set_attn_processor(gated_processors(unet, gate))
    scheduler.set_timesteps(STEPS)
    latents = kwargs["latents"] * scheduler.init_noise_sigma
    guided = guidance_scale > 1
    names = ["negative_prompt_embeds", "prompt_embeds"] if guided else ["prompt_embeds"]
    text = torch.cat([kwargs[name] for name in names])
    run = gate.start(STEPS, guidance=guided)
    for t in scheduler.timesteps:
        output = unet(run.fold(torch.cat([latents] * len(names))), t, run.fold(text)).sample
        noise, *positive = run.unfold(output).chunk(len(names))
        if positive:
            noise = noise + guidance_scale * (positive[0] - noise)
        latents = scheduler.step(noise, t, latents).prev_sample
        run.advance()
    hook.remove()
    unet.set_attn_processor(ungated_processors(unet))
    return latents, batches


@pytest.mark.parametrize(
    "config",
    [
        TGateConfig(gate_step=3),
        TGateConfig(gate_step=1, branch="positive"),
        TGateConfig(gate_step=2, look_interval=3),
        TGateConfig(gate_step=2, look_interval=2, branch="negative"),
        TGateConfig(gate_step=4, sp_interval=2, fi_interval=2),
        TGateConfig(gate_step=3, offload_cache=True),
        TGateConfig(gate_step=99),
    ],
    ids=str,
)
def test_a_loop_of_ones_own_is_as_a_pipelines(config):
    subject = tiny("sd")
    with apply_tgate(subject.pipe, config) as tgate:
        expected = subject(tgate, num_inference_steps=STEPS)
        batches = list(tgate.summary().batches)
    before = fingerprint(subject.denoiser)
    latents, seen = loop(subject, config)
    assert torch.equal(latents, expected)
    assert seen == batches
    assert left_behind(before, subject.denoiser) == {}


def test_without_guidance_the_batch_stays():
    subject = tiny("sd")
    with apply_tgate(subject.pipe, TGateConfig(gate_step=3)) as tgate:
        expected = subject(tgate, num_inference_steps=STEPS, guidance_scale=1.0)
    latents, batches = loop(subject, TGateConfig(gate_step=3), guidance_scale=1.0)
    assert torch.equal(latents, expected)
    assert batches == [1] * STEPS


@pytest.mark.parametrize(("branch", "rows"), [("negative", [0, 1]), ("positive", [2, 3]), (None, [0, 1])])
def test_the_branch_that_is_named_goes_on(branch, rows):
    unet = tiny("sd").denoiser
    gate = Gate(TGateConfig(gate_step=1, branch=branch))
    unet.set_attn_processor(gated_processors(unet, gate))
    run = gate.start(4, guidance=True)
    assert run.fold(torch.arange(4)).tolist() == [0, 1, 2, 3]
    unet(torch.randn(4, 4, 8, 8), 5, torch.randn(4, 7, 32))
    run.advance()
    assert run.fold(torch.arange(4)).tolist() == rows


def test_a_network_that_is_not_called_in_the_step_that_closes_the_gate_closes_in_the_next():
    unet = tiny("sd").denoiser
    gate = Gate(TGateConfig(gate_step=1))
    unet.set_attn_processor(gated_processors(unet, gate))
    run = gate.start(4, guidance=True)
    run.advance()
    both = torch.randn(2, 4, 8, 8)
    assert torch.equal(run.fold(both), both)
    unet(both, 5, torch.randn(2, 7, 32))
    run.advance()
    assert torch.equal(run.fold(both), both[:1])


def test_starting_without_layers():
    with pytest.raises(StateError, match=r"`start` was called before any layer was gated\. Call `unet.set_attn_proc"):
        Gate(TGateConfig(gate_step=2)).start(4, guidance=True)


def test_guidance_must_be_said():
    with pytest.raises(TypeError, match="guidance"):
        Gate(TGateConfig(gate_step=2)).start(4)
    with pytest.raises(ConfigError, match=r"`guidance` must be True or False, got 7\.5"):
        Gate(TGateConfig(gate_step=2)).start(4, guidance=7.5)


def test_bad_settings():
    with pytest.raises(ConfigError, match="`config` must be a TGateConfig, got 10"):
        Gate(10)
    with pytest.raises(ConfigError, match="`num_inference_steps` must be a whole number of at least 1, got 0"):
        Gate(TGateConfig(gate_step=2)).start(0, guidance=True)


def test_a_run_ends_with_its_last_step_or_with_the_next_start():
    unet = tiny("sd").denoiser
    gate = Gate(TGateConfig(gate_step=1))
    unet.set_attn_processor(gated_processors(unet, gate))
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    own = unet(sample, 5, text).sample
    first = gate.start(2, guidance=False)
    unet(sample, 5, text)
    first.advance()
    assert first.closed
    assert first.cache_bytes > 0
    second = gate.start(2, guidance=False)  # as after a loop that failed
    assert first.is_over
    assert first.cache_bytes == 0
    with pytest.raises(StateError, match=r"`advance` was called after the end of the run\. Call `gate.start`"):
        first.advance()
    second.advance()
    second.advance()
    assert second.is_over
    assert torch.equal(unet(sample, 5, text).sample, own)


def test_what_they_are_is_shown_in_a_line():
    unet = tiny("sd").denoiser
    gate = Gate(TGateConfig(gate_step=2))
    assert repr(gate) == "Gate(gate_step=2): 0 layers, no run"
    unet.set_attn_processor(gated_processors(unet, gate))
    run = gate.start(4, guidance=True)
    assert repr(run) == "LoopRun(gate_step=2): step 0 of 4, semantics-planning"
    assert repr(gate) == f"Gate(gate_step=2): 7 layers, {run!r}"
    run.stop()
    assert repr(run) == "LoopRun(gate_step=2): over, 4 steps"
    schedule = TGateConfig(gate_step=2).schedule(4)
    assert repr(schedule) == "Schedule(gate_step=2): 4 steps, gate step 2"
    assert len(str(schedule).splitlines()) == 4


def test_the_handle_and_its_summary_are_shown_in_a_line_and_print_as_tables():
    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, TGateConfig(gate_step=2))
    assert repr(tgate) == "TGate on StableDiffusionPipeline: gate_step=2; run none yet"
    assert str(tgate).splitlines() == [
        "gate      on StableDiffusionPipeline",
        "settings  gate_step=2",
        "networks  UNet2DConditionModel, 7 gated layers",
        "run       none yet",
    ]
    assert repr(tgate.summary()) == "Summary(no run yet)"
    subject(tgate)
    summary = tgate.summary()
    saved = f"{summary.macs_saved:.1%} of the arithmetic saved"
    assert repr(summary) == f"Summary(12 steps, gate closed before step 2, {saved})"
    assert len(str(summary).splitlines()) <= 8
    tgate.remove()
    assert repr(tgate) == "TGate removed from StableDiffusionPipeline: gate_step=2; run over, 12 steps"
