"""The command as a whole: its help, its exit codes, and Ctrl-C, after which what was done is there."""

import errno
import json
import pkgutil
import re
import subprocess
import sys
import warnings
from importlib import metadata
from pathlib import Path

import pytest

import tgate_processors
from tgate_processors import ConfigError, cli
from tgate_processors.cli import main, options, running
from tgate_processors.measure.convergence import Convergence
from tgate_processors.measure.samplers import SAMPLERS


COMMANDS = ["demo", "generate", "cost", "bench", "table", "calibrate", "quality", "tune", "explore"]


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
    assert "--gate-step" in said or command in ("table", "calibrate", "quality", "tune", "explore")
    assert "--steps" in said or command == "table"


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
    arguments = [
        "quality",
        "--count",
        "2",
        "--steps",
        "5",
        "--only",
        "gate step",
        "--sampler",
        "ddim",
        "euler",
        "--plot",
        str(picture),
    ]
    assert main([*arguments, "--json"]) == 130
    said = capsys.readouterr()
    report = json.loads(said.out)
    assert list(report["samplers"]) == ["ddim"]
    assert [row["name"] for row in report["samplers"]["ddim"]["rows"]] == ["stock", "gate step 2"]
    assert report["settings"]["interrupted"] is True
    assert "interrupted: the report covers what was done until then" in said.err
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


def test_the_table_is_of_the_rows_that_are_done(monkeypatch, capsys, tmp_path):
    presses_ctrl_c(monkeypatch, "tgate_processors.demo.table.count_row", after=1)
    picture = tmp_path / "table.png"
    assert main(["table", "--json", "--plot", str(picture)]) == 130
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["interrupted"] is True
    assert [(row["name"], row["speed_up"], row["pictures"]) for row in report["rows"]] == [("SD-1.5", None, None)]
    assert picture.is_file()


def test_generate_keeps_whole_pictures(monkeypatch, capsys, tmp_path):
    arguments = [
        "generate",
        "a small red circle on a white background",
        "a large blue square on a pink background",
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
    presses_ctrl_c(monkeypatch, "tgate_processors.demo.table.count_row", after=0)
    assert main(["table"]) == 130
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "tgate-processors: interrupted\n"


def test_no_colours(monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(["cost"]) == 0
    assert not re.search("\x1b\\[[0-9;]*m", capsys.readouterr().out)


# Before the work


WORK = ("pipeline_of", "load_demo_pipeline", "bench", "measure_table")


@pytest.fixture
def no_work(monkeypatch):
    """Work that would be lost is not begun."""

    def begun(*args, **kwargs):
        pytest.fail("the work has begun")

    for name in WORK:
        monkeypatch.setattr(f"tgate_processors.cli.commands.{name}", begun)


def said_at_once(arguments, capsys, code=2):
    """The one line of a command that fails before its work."""
    arguments = [*arguments[0].split(), *arguments[1:]]
    assert main(arguments) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tgate-processors {arguments[0]}: ")
    return line


FILES = [
    ("demo", "--out", "x.png"),
    ("bench", "--plot", "x.png"),
    ("table", "--plot", "x.png"),
    ("tune --psnr 30", "--out", "x.png"),
    ("calibrate", "--plot", "x.svg"),
    ("calibrate", "--out", "x.safetensors"),
    ("quality", "--plot", "x.pdf"),
]


@pytest.mark.parametrize(("command", "option", "name"), FILES)
def test_a_file_that_cannot_be_written_is_said_before_the_work(command, option, name, tmp_path, capsys, no_work):
    (tmp_path / "file").write_text("")
    (tmp_path / name).mkdir()
    for path, reason in (
        (tmp_path / "nowhere" / name, "No such file or directory"),
        (tmp_path / "file" / name, "Not a directory"),
        (tmp_path / name, "Is a directory"),
        (tmp_path / f"{'n' * 300}{name}", "File name too long"),
    ):
        said = said_at_once([command, option, str(path)], capsys)
        assert (
            f"`{option}` must be a place that can be written to, got {str(path)!r}: {reason}. Choose another" in said
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", name]


@pytest.mark.parametrize("suffix", ["", ".foo", ".txt", ".psd"])
@pytest.mark.parametrize(("command", "option"), [entry[:2] for entry in FILES if entry[2] != "x.safetensors"])
def test_a_format_that_nothing_writes_is_said_before_the_work(command, option, suffix, tmp_path, capsys, no_work):
    path = tmp_path / f"x{suffix}"
    said = said_at_once([command, option, str(path)], capsys)
    assert f"`{option}` must end in the suffix of a format that can be written here, got {str(path)!r}. Pass" in said
    assert not path.exists()


@pytest.mark.parametrize(("command", "option", "name"), FILES)
def test_trying_a_file_leaves_nothing_behind(command, option, name, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise ConfigError("as work does")

    for work in WORK:
        monkeypatch.setattr(f"tgate_processors.cli.commands.{work}", fails)
    there = tmp_path / f"there-{name}"
    there.write_text("precious")
    for path in (there, tmp_path / name):
        assert said_at_once([command, option, str(path)], capsys).endswith("as work does")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


def test_a_plot_without_what_plots_is_said_before_the_work(tmp_path, monkeypatch, capsys, no_work):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = said_at_once(["quality", "--plot", str(tmp_path / "x.png")], capsys, code=1)
    assert "pip install 'tgate-processors[plot]'" in said


@pytest.mark.parametrize("device", ["nonsense", "", "cpu:x", "meta", "vulkan", "cuda:99"])
@pytest.mark.parametrize("command", ["generate", "bench", "table", "calibrate", "quality", "tune --psnr 30"])
def test_an_unknown_device(command, device, tmp_path, monkeypatch, capsys, no_work):
    monkeypatch.chdir(tmp_path)
    prompt = ["a small red circle on a white background"] if command == "generate" else []
    said = said_at_once([command, *prompt, "--device", device], capsys)
    assert f"`--device` must be a device of this machine, such as cpu, got {device!r}. Leave it out" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["quality", "tune --psnr 30"])
def test_an_unknown_sampler(command, capsys, no_work):
    said = said_at_once([command, "--sampler", "ddpm"], capsys)
    assert said.endswith("`--sampler` must be one of " + ", ".join(SAMPLERS) + ", got 'ddpm'.")


@pytest.mark.parametrize("command", ["generate", "calibrate --steps 5", "tune --psnr 30", "demo"])
@pytest.mark.parametrize("model", ["sd", "pixart-lcm"])
def test_what_an_embedded_model_does_not_know(command, model, tmp_path, monkeypatch, capsys, no_work):
    monkeypatch.chdir(tmp_path)
    known = "a small red circle on a white background"
    said = said_at_once([command, known, "a red fox", "--model", model], capsys)
    assert (
        "`PROMPT` must use this world's words only, got the unknown 'fox' in 'a red fox'; the words are: a, " in said
    )
    said = said_at_once([command, known, "a small red circle", "--model", model], capsys)
    assert "`PROMPT` must be a caption of this world, got 'a small red circle'; write it like 'a large " in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cost", "--gate-step", "0"], "`--gate-step` must be .* for example `--gate-step=10`, or `--gate-step=0.4`"),
        (["cost", "--gate-step", "auto"], "`--gate-step` must be a count .* Pass for example `--gate-step=0.4`"),
        (["cost", "--look-interval", "1"], "`--look-interval` must be .* for example `--look-interval=2`"),
        (["cost", "--cache-interval", "0"], "`--cache-interval` must be a whole number"),
        (["cost", "--model", "sd-9"], "`--model` must be one of sd-1.5, "),
        (["bench", "--steps", "3", "--gate-step", "3"], "`--gate-step` must be below the number of steps"),
        (["calibrate", "--steps", "4"], "`--steps` must be a whole number of at least 5, got 4"),
        (["calibrate", "--tolerance", "2"], "`--tolerance` must be a number between 0 and 1, got 2.0"),
        (["calibrate", "--seed", str(2**63)], f"`--seed` must be a whole number of 64 bits, got {2**63}"),
        (["calibrate", "--model", "x"], "`PROMPT` must be given, or `--prompts FILE`, got neither"),
        (["quality", "--model", "x"], "`PROMPT` must be given, or `--prompts FILE`, got neither"),
        (["quality", "--steps", "4"], "`--steps` must be a whole number of at least 5, got 4"),
        (["demo", "a red fox"], "`PROMPT` must use this world's words only, got the unknown 'fox'"),
    ],
)
def test_messages_name_options(arguments, message, capsys):
    assert re.search(message, said_at_once(arguments, capsys))


def test_a_message_of_python_is_told_in_options():
    generate = options.parser().parse_args(["generate", "x"])
    for said, expected in (
        ("`pipe` must be one, got `scheduler`", "`--model` must be one, got `scheduler`"),
        ('with `gate_step="auto"`, got 4 gate_step', 'with `--gate-step="auto"`, got 4 gate_step'),
        ("pass `trust_remote_code=True`", "pass `--trust-remote-code`"),
        ("Call `TGateConfig(gate_step=10)`", "Call `TGateConfig(gate_step=10)`"),
        ("`height` must be even", "`height` must be even"),
    ):
        assert running._in_options(said, generate) == expected


def test_warnings_are_lines_that_name_options(monkeypatch, capsys):
    def warns(_):
        warnings.warn("`gate_step` should be below\n  the number of steps", stacklevel=2)
        return 0

    monkeypatch.setattr("tgate_processors.cli.commands.run_cost", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["cost"]) == 0
    said = "tgate-processors cost: warning: `--gate-step` should be below the number of steps\n"
    assert capsys.readouterr().err == said


# After the work


def test_what_was_measured_is_printed_where_its_file_fails(tmp_path, monkeypatch, capsys):
    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    path = str(tmp_path / "c.safetensors")
    assert main(["calibrate", "--count", "1", "--steps", "5", "--out", path]) == 1
    said = capsys.readouterr()
    assert "change of cross-attention since the step before" in said.out
    assert said.err.endswith(
        f"`--out` must be a place that can be written to, got {path!r}: No space left on device. "
        "Choose another, or make room there.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "printed", "saves"),
    [
        (["demo", "--count", "1", "--steps", "2", "--rounds", "1", "--out"], "2 steps", "PIL.Image.Image.save"),
        (["calibrate", "--count", "1", "--steps", "5", "--plot"], "gate step", "matplotlib.figure.Figure.savefig"),
    ],
)
def test_what_was_measured_is_printed_where_its_picture_fails(
    arguments, printed, saves, tmp_path, monkeypatch, capsys
):
    save = pkgutil.resolve_name(saves)

    def full(self, file, *args, **kwargs):
        if isinstance(file, Path):  # and no trial
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, file, *args, **kwargs)

    monkeypatch.setattr(saves, full)
    path = str(tmp_path / "x.png")
    assert main([*arguments, path]) == 1
    said = capsys.readouterr()
    assert printed in said.out
    assert f"`{arguments[-1]}` must be a place that can be written to, got {path!r}: No space left" in said.err


# Ctrl-C


@pytest.mark.parametrize("module", ["running", "commands"])
def test_ctrl_c_while_what_the_command_needs_is_imported(module, monkeypatch, capsys):
    class Interrupts:
        def find_spec(self, name, path=None, target=None):
            if name == f"tgate_processors.cli.{module}":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, f"tgate_processors.cli.{module}", raising=False)
    monkeypatch.delattr(cli, module, raising=False)
    monkeypatch.setattr(sys, "meta_path", [Interrupts(), *sys.meta_path])
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "tgate-processors: interrupted\n"


@pytest.mark.parametrize("function", ["options.metadata.version", "commands.pipeline_of", "generate._draw"])
def test_ctrl_c_before_anything_is_done(function, tmp_path, monkeypatch, capsys):
    presses_ctrl_c(monkeypatch, f"tgate_processors.cli.{function}", after=0)
    assert main(["generate", "a small red circle on a white background", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr() == ("", "tgate-processors: interrupted\n")


# Quickly


def test_no_help_waits_for_torch():
    """In a process of its own, since this one has imported all."""
    program = f"""
import sys
from tgate_processors.cli import main

for arguments in [["--help"], ["--version"], *([command, "--help"] for command in {COMMANDS})]:
    try:
        main(arguments)
    except SystemExit as stopped:
        assert stopped.code == 0
    slow = {{"torch", "diffusers", "transformers", "numpy", "PIL", "tqdm"}} & sys.modules.keys()
    assert not slow, (arguments, slow)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
