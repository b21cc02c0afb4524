"""Counting: by hand on a small layer, the published table, and the command."""

import json

import pytest
import torch
from tiny import tiny

from tgate_processors import ConfigError, TGateConfig, UnsupportedPipelineError, apply_tgate
from tgate_processors._copying import meta_copy
from tgate_processors._cost import Cost, NetworkCost
from tgate_processors._folding import map_tensors
from tgate_processors._modes import StepMode
from tgate_processors._record import Evaluation, to_meta
from tgate_processors.cli import main
from tgate_processors.measure.architectures import ARCHITECTURES, Architecture, architecture
from tgate_processors.measure.run_cost import run_cost


def test_a_transformer_block_by_hand():
    """PixArt with one layer: what reuse leaves out is the layer's four projections and two products."""
    subject = tiny("pixart-alpha")
    model = meta_copy(subject.denoiser)
    inputs = map_tensors(
        to_meta,
        (
            (torch.empty(2, 4, 8, 8),),
            {
                "encoder_hidden_states": torch.empty(2, 7, 24),
                "encoder_attention_mask": torch.empty(2, 7),
                "timestep": torch.empty(2),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            },
        ),
    )
    kinds = [StepMode.PLANNING, StepMode.CLOSING_UNGUIDED, StepMode.FIDELITY]
    evaluations = [Evaluation(kind, 2) for kind in kinds]
    network = NetworkCost(model, [inputs])
    planning, closing, fidelity = (network.of([evaluation]) for evaluation in evaluations)
    layers, batch, pixels, tokens = len(model.transformer_blocks), 2, 16, 7
    width = model.inner_dim
    projections = batch * (2 * pixels + 2 * tokens) * width * width  # queries and outputs, keys and values
    products = batch * 2 * pixels * tokens * width  # scores, and their sum over values
    assert planning.macs - fidelity.macs == layers * (projections + products)
    assert planning.linear_and_conv_macs - fidelity.linear_and_conv_macs == layers * projections
    assert closing == planning
    assert (fidelity.cross_computed, fidelity.cross_reused) == (0, layers)
    assert (fidelity.self_computed, fidelity.self_reused) == (layers, 0)


def test_costs_add_up():
    assert Cost(macs=1, cross_reused=2) + Cost(macs=3, self_computed=4) == Cost(4, 0, 0, 2, 4, 0)


@pytest.mark.parametrize(
    ("name", "parameters", "without", "mebibytes"),
    [
        ("sd-1.5", 859_520_964, 815_558_404, 22.03125),
        ("sd-2.1", 865_910_724, 815_558_404, 49.5703125),
        ("sdxl", 2_567_463_684, 2_021_793_284, 200),
        ("pixart-alpha", 611_349_152, 462_584_480, 252),
    ],
)
def test_parameters_and_cache(name, parameters, without, mebibytes):
    cost = run_cost(architecture(name), TGateConfig(gate_step=10))
    assert (cost.parameters, cost.parameters_without_gated) == (parameters, without)
    assert cost.cache_bytes == mebibytes * 2**20


def test_a_run_and_its_architecture_count_alike():
    config = TGateConfig(gate_step=3, sp_interval=2, fi_interval=3)
    subject = tiny("sd")
    tgate = apply_tgate(subject.pipe, config)
    subject(tgate)
    summary = tgate.summary()
    known = Architecture("UNet2DConditionModel", subject.denoiser.config, 16, 16, tokens=7, steps=12, scale=2)
    counted = run_cost(known, config)
    assert (summary.stock_macs, summary.cost.macs) == (counted.stock_macs, counted.gated_macs)
    assert summary.cache_bytes == 2 * counted.cache_bytes  # single precision, and half


def test_the_command_prints_json(capsys):
    assert main(["cost", "--model", "sd-1.5", "--gate-step", "5", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["gated_linear_and_conv_macs"] == pytest.approx(9.875e12, rel=5e-4)
    assert printed["parameters"] == 859_520_964
    assert printed["ratio"] == printed["stock_macs"] / printed["gated_macs"]


def test_the_command_prints_a_table(capsys):
    assert main(["cost", "--model", "lcm-pixart", "--gate-step", "2", "--steps", "4", "--height", "512"]) == 0
    assert "4 steps, one picture" in capsys.readouterr().out


def test_a_pipeline_on_disk(tmp_path, capsys):
    subject = tiny("sd")
    subject.pipe.save_pretrained(tmp_path)
    assert main(["cost", "--model", str(tmp_path), "--gate-step", "5", "--steps", "12", "--json"]) == 0
    parameters = sum(weight.numel() for weight in subject.denoiser.parameters())
    assert json.loads(capsys.readouterr().out)["parameters"] == parameters


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "flux"],
            f"`--model` must be one of {', '.join(ARCHITECTURES)}, or the folder of a saved pipeline",
        ),
        (["--model", "sdxl", "--gate-step", "0"], "`--gate-step` must be a whole number of at least 1, a fraction"),
        (["--model", "sdxl", "--height", "100"], "`--height` must be a multiple of 8, got 100"),
        (["--model", "sdxl", "--cache-interval", "0"], "`--cache-interval` must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["cost", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_pipeline_of_an_unknown_denoiser(tmp_path):
    (tmp_path / "model_index.json").write_text('{"transformer": ["diffusers", "FluxTransformer2DModel"]}')
    with pytest.raises(UnsupportedPipelineError, match=r"must have a UNet2DConditionModel or a .*, got Flux"):
        architecture(str(tmp_path))


def test_an_unknown_architecture():
    with pytest.raises(ConfigError, match=r"`model` must be one of sd-1\.5, sd-2\.1"):
        architecture("sd-3")
