"""The demo: the embedded model, gated, from the command to the picture."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from tgate_processors import TGateConfig
from tgate_processors.cli import main
from tgate_processors.demo import load_demo_pipeline, parse
from tgate_processors.demo.compare import compare
from tgate_processors.demo.embedded import EMBEDDED, embedded_architecture
from tgate_processors.measure.architectures import resized
from tgate_processors.measure.run_cost import run_cost


PROMPT = "a large red circle left of a small blue square on a yellow background"


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_command_draws_and_tells(name, tmp_path, capsys):
    out = tmp_path / "pair.png"
    arguments = ["demo", PROMPT, "--model", name, "--steps", "4", "--rounds", "1", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    gate = {"sd": "0.4", "pixart": "0.6"}.get(name, "0.25")  # the papers'
    assert f"{name}: 4 steps, gate_step={gate}, " in printed
    for line in (
        "arithmetic, GMACs a picture",
        "faster",
        "attributes correct",
        "pictures fully correct",
        "dB",
        str(out),
    ):
        assert line in printed
    with Image.open(out) as picture:
        assert picture.width == 16 + 80 + 192 + 16
        assert picture.height > 2 * 192


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a large red fox on a white background"], "got the unknown 'fox'"),
        (["--gate-step", "0"], "`--gate-step` must be a whole number of at least 1, a fraction"),
        (["--steps", "0"], "`--steps` must be a whole number of at least 1, got 0"),
        (["--count", "-1"], "`--count` must be a whole number of at least 1, got -1"),
        (["--model", "sdxl"], "`--model` must be one of sd, lcm, pixart, pixart-lcm, got 'sdxl'"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_module_to_run():
    shown = subprocess.run(
        [sys.executable, "-m", "tgate_processors", "--help"], capture_output=True, text=True, check=True
    )
    assert "demo" in shown.stdout


def comparison(pipe, gate_step):
    config, call = TGateConfig(gate_step=gate_step), {"num_inference_steps": 4, "guidance_scale": 5.0}
    return compare(pipe, [parse(PROMPT)] * 2, config, seed=3, rounds=1, call=call)


def test_both_start_from_the_same_noise(pipe):
    same = comparison(pipe, gate_step=4)
    assert torch.equal(same.stock.pictures, same.gated.pictures)
    assert same.summary.macs_saved == 0
    gated = comparison(pipe, gate_step=1)
    assert torch.equal(same.stock.pictures, gated.stock.pictures)
    assert gated.summary.macs_saved > 0.3
    assert (gated.psnr < 40).all()


@pytest.mark.parametrize("name", EMBEDDED)
def test_the_cost_of_an_embedded_model_is_its_runs(name):
    config, call = TGateConfig(gate_step=1), {**EMBEDDED[name].call, "num_inference_steps": 4}
    pipe = load_demo_pipeline(name)
    summary = compare(pipe, [parse(PROMPT)] * 2, config, seed=3, rounds=1, call=call).summary
    counted = run_cost(resized(embedded_architecture(name), steps=4, height=None, width=None), config)
    assert (summary.stock_macs, summary.cost.macs) == (2 * counted.stock_macs, 2 * counted.gated_macs)


def test_the_likeness_by_hand(pipe):
    pair = comparison(pipe, gate_step=4)
    pair.gated.pictures = pair.stock.pictures + 0.2  # of a range of 2: a tenth, 20 dB
    torch.testing.assert_close(pair.psnr, torch.full((2,), 20.0))
