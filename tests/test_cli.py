"""The command as a whole: its help, its exit codes, and Ctrl-C, after which what was done is there."""

import json
import pkgutil
import re
import sys
from importlib import metadata

import pytest

import tgate_processors
from tgate_processors.cli import main
from tgate_processors.measure.convergence import Convergence


COMMANDS = ["demo", "generate", "cost", "bench", "calibrate", "quality"]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(f"tgate-processors {tgate_processors.__version__} (torch 2.")
    assert metadata.version("tgate-processors") == tgate_processors.__version__


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_each_option_is(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    said = capsys.readouterr().out
    assert "default: None" not in said
    assert "default: False" not in said
    assert "--gate-step" in said or command in ("calibrate", "quality")
    assert "--steps" in said


def test_an_unknown_command_is_a_bad_argument(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["speed"])
    assert stopped.value.code == 2
    assert "invalid choice: 'speed'" in capsys.readouterr().err


def test_what_cannot_be_read_is_told_from_a_bad_argument(capsys):
    assert main(["generate", "a circle", "--model", "nowhere/at-all"]) == 1
    assert capsys.readouterr().err.startswith("tgate-processors generate: ")


def test_what_is_missing_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    assert main(["quality", "--count", "2", "--steps", "5"]) == 1
    assert "pip install 'tgate-processors[quality]'" in capsys.readouterr().err


def presses_ctrl_c(monkeypatch, function, after):
    """Ctrl-C in the call of `function` after so many."""
    whole = pkgutil.resolve_name(function)
    calls = iter(range(99))

    def interrupted(*args, **kwargs):
        if next(calls) == after:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(function, interrupted)


def test_quality_reports_the_ways_that_are_done(monkeypatch, capsys, tmp_path):
    presses_ctrl_c(monkeypatch, "tgate_processors.demo.quality.draw", after=2)
    picture = tmp_path / "q.png"
    arguments = ["quality", "--count", "2", "--steps", "5", "--only", "gate step", "--plot", str(picture)]
    assert main([*arguments, "--json"]) == 130
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert [row["name"] for row in report["rows"]] == ["stock", "gate step 1"]
    assert report["settings"]["interrupted"] is True
    assert "interrupted: this is of what was done" in said.err
    assert picture.is_file()


def test_bench_reports_the_rounds_that_are_done(monkeypatch, capsys):
    # of two contestants: a round that is not timed, two that are, and half of one
    presses_ctrl_c(monkeypatch, "tgate_processors.measure.bench._take_turn", after=7)
    arguments = ["bench", "--steps", "2", "--gate-step", "1", "--rounds", "4", "--only", "dropping", "--json"]
    assert main(arguments) == 130
    report = json.loads(capsys.readouterr().out)
    assert (report["settings"]["rounds"], report["settings"]["interrupted"]) == (2, True)
    assert [len(row["runs"]) for row in report["rows"]] == [2, 2]


def test_calibrate_records_the_prompts_that_are_done(monkeypatch, capsys, tmp_path):
    presses_ctrl_c(monkeypatch, "diffusers.StableDiffusionPipeline.encode_prompt", after=2)
    assert main(["calibrate", "--count", "9", "--steps", "5", "--out", str(tmp_path / "c.safetensors")]) == 130
    convergence = Convergence.load(tmp_path / "c.safetensors")
    assert len(convergence.changes) == len(convergence.settings["prompts"]) == 2
    assert convergence.settings["interrupted"] is True


def test_cost_prints_the_rows_that_are_done(monkeypatch, capsys):
    presses_ctrl_c(monkeypatch, "tgate_processors.measure.run_cost.table_row", after=1)
    assert main(["cost", "--table", "--json"]) == 130
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["SD-1.5"]


def test_generate_keeps_whole_pictures(monkeypatch, capsys, tmp_path):
    arguments = [
        "generate",
        "a red circle",
        "a blue square",
        "--steps",
        "2",
        "--gate-step",
        "1",
        "--out",
        str(tmp_path),
    ]
    with monkeypatch.context() as pressed:
        presses_ctrl_c(pressed, "tgate_processors.cli.generate._draw", after=1)
        assert main(arguments) == 130
    (first,) = tmp_path.iterdir()
    made_at = first.stat().st_mtime_ns
    assert main(arguments) == 0
    assert len(list(tmp_path.iterdir())) == 2
    assert first.stat().st_mtime_ns == made_at


def test_nothing_done_is_nothing_reported(monkeypatch, capsys):
    presses_ctrl_c(monkeypatch, "tgate_processors.measure.run_cost.table_row", after=0)
    assert main(["cost", "--table"]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.endswith("tgate-processors cost: interrupted\n")


def test_no_colours(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["cost"]) == 0
    assert not re.search("\x1b\\[[0-9;]*m", capsys.readouterr().out)
