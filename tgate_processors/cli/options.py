"""The command `tgate-processors`: its options. `commands.py` has what they do."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from tgate_processors import __version__
from tgate_processors.errors import TGateError, UnsupportedPipelineError
from tgate_processors.measure.interruption import INTERRUPTED
from tgate_processors.measure.samplers import SAMPLERS
from tgate_processors.schedule import TGateConfig


DESCRIPTION = """\
T-GATE for diffusers pipelines: cross-attention is computed until it has converged, then reused, and guidance is
dropped with it. Faster text-to-image, without training."""

EPILOG = """\
examples:
  tgate-processors demo                                          see it, on the small model that comes along
  tgate-processors cost --model sdxl --gate-step 10              what a run saves; no weights are loaded
  tgate-processors bench --model sdxl --dtype bfloat16           what it takes on this machine, and what others take
  tgate-processors table                                         the original's benchmark table, measured here
  tgate-processors calibrate --model FOLDER "a red fox"          which gate step your model suggests
  tgate-processors quality --quick                               what each choice costs in pictures
  tgate-processors tune --model FOLDER "a red fox" --psnr 30     the cheapest settings for your model
  tgate-processors generate --model FOLDER --prompts FILE        pictures of many prompts, resumable
  tgate-processors explore                                       a page here, with the gate's settings as sliders

`tgate-processors COMMAND --help` has the options of each. Without `--model` a command takes the embedded model.
exit codes: 0 done; 1 something is missing or cannot be read or written; 2 a bad argument; 130 interrupted by Ctrl-C,
after which what was done is reported, or in its files."""

EMBEDDED = "sd, lcm, pixart or pixart-lcm"  # in words: a help text must not wait for the models' module
GUIDANCE_SCALE = "scale of classifier-free guidance (default: the pipeline's own)"
DTYPES = ("float32", "float16", "bfloat16")
RENAMED = {"num_inference_steps": "steps", "guidance": "guidance_scale", "pipe": "model"}  # Python's names here
WORDS = ("prompt", "prompts", "text")  # those of `PROMPT`
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code; Ctrl-C is raised where nothing is done yet."""
    options = parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}", options)
            code = _run(options)
    except (UnsupportedPipelineError, ValueError) as error:
        _say(str(error), options)
        return 2
    except (TGateError, OSError) as error:
        _say(str(error), options)
        return 1
    if code == INTERRUPTED:
        _say("interrupted: this is of what was done", options)
    return code


def _run(options: argparse.Namespace) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that nothing here needs
    from tgate_processors.cli import commands  # a help text must not wait for diffusers' pipelines

    if not sys.stderr.isatty():
        commands.disable_loading_bars()
    code: int = getattr(commands, f"run_{options.command}")(options)
    return code


def _say(message: str, options: argparse.Namespace) -> None:
    """One line for people."""
    line = re.sub(r"\s*\n\s*", " ", _in_options(message, options))
    print(f"tgate-processors {options.command}: {line}", file=sys.stderr)


def _in_options(message: str, options: argparse.Namespace) -> str:
    """The message of a Python call, in which the command's options stand for arguments."""

    def option(argument: re.Match[str]) -> str:
        name = RENAMED.get(argument[1], argument[1])
        if name in WORDS:
            return "`PROMPT"
        return f"`--{name.replace('_', '-')}" if name in vars(options) else argument[0]

    return re.sub(r"`(\w+)(?:=True)?(?=[`=])", option, message)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tgate-processors",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "diffusers"))
    version = f"tgate-processors {__version__} ({versions})"
    top.add_argument("--version", action="version", version=version)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        _add_demo,
        _add_generate,
        _add_cost,
        _add_bench,
        _add_table,
        _add_calibrate,
        _add_quality,
        _add_tune,
        _add_explore,
    ):
        add(commands)
    return top


def _add_demo(commands: Commands) -> None:
    demo = _command(
        commands,
        "demo",
        "draw the same pictures with the stock and the gated pipeline",
        "Draws the same pictures with the stock and the gated pipeline, on a text-to-image model that comes with "
        "the package: writes them side by side and prints what was saved.",
    )
    demo.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="what to draw, such as 'a large red circle left of a small blue square on a yellow background' (default: "
        "some of the model's own prompts)",
    )
    demo.add_argument("--count", type=int, default=5, help="number of the model's own prompts, where none is given")
    demo.add_argument("--model", default="sd", metavar="NAME", help=f"the embedded model: {EMBEDDED}")
    _add_seed_and_steps(demo)
    demo.add_argument("--guidance-scale", type=float, metavar="SCALE", help=GUIDANCE_SCALE)
    _add_gate(demo)
    demo.add_argument("--rounds", type=int, default=3, help="how often each pipeline is timed")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("tgate-demo.png"),
        metavar="FILE",
        help="the picture to write, all side by side",
    )


def _add_generate(commands: Commands) -> None:
    generate = _command(
        commands,
        "generate",
        "draw many prompts into a folder",
        "Draws every prompt with the gated pipeline. Run again, it goes on where it was; under `accelerate launch "
        "--num_processes N -m tgate_processors generate ...` the processes share the prompts.",
    )
    _add_pipeline(generate)
    _add_seed_and_steps(generate)
    _add_gate(generate)
    generate.add_argument(
        "--out", type=Path, default=Path("tgate-pictures"), metavar="FOLDER", help="the folder for the pictures"
    )
    generate.add_argument(
        "--with-stock",
        action="store_true",
        help="draw each with the stock pipeline too, and put that picture left of it",
    )


def _add_cost(commands: Commands) -> None:
    cost = _command(
        commands,
        "cost",
        "count what a gated run saves: multiply-accumulates, parameters, cache",
        "Counts a run by running the denoiser's architecture on the meta device: no weights, no download.",
    )
    _add_architecture(cost)
    _add_size(cost)
    _add_gate(cost)
    cost.add_argument(
        "--cache-interval", type=int, metavar="STEPS", help="count both runs with DeepCache at this interval"
    )
    _add_reports(cost, plots=False)


def _add_bench(commands: Commands) -> None:
    bench = _command(
        commands,
        "bench",
        "time the gated pipeline, the stock one, the least possible, and peers",
        "Times an architecture with random weights, on which speed does not depend. The contestants take turns; one "
        "that fails is reported with its error.",
    )
    _add_architecture(bench)
    _add_size(bench)
    _add_gate(bench)
    bench.add_argument("--reduce", type=int, default=1, help="divide the width of the layers by this")
    bench.add_argument("--batch", type=int, default=1, help="number of pictures in a batch")
    bench.add_argument("--rounds", type=int, default=5, help="how often each contestant is timed")
    bench.add_argument("--compile", action="store_true", help="compile each denoiser")
    _add_device_and_dtype(bench)
    _add_only(bench, "contestants")
    _add_reports(bench)


def _add_table(commands: Commands) -> None:
    table = _command(
        commands,
        "table",
        "measure the original's benchmark table",
        "Counts each row of the original's benchmark table at full size, times it at reduced size with random "
        "weights, draws held-out prompts on the embedded model of its kind, and prints it with the published figures.",
    )
    table.add_argument("--count", type=int, default=48, help="number of prompts to draw")
    _add_seed(table)
    table.add_argument("--rounds", type=int, default=3, help="how often each row is timed")
    _add_device_and_dtype(table)
    _add_reports(table)


def _add_calibrate(commands: Commands) -> None:
    calibrate = _command(
        commands,
        "calibrate",
        "measure how a model's cross-attention converges, and choose its gate step",
        "Draws the prompts with the stock pipeline, measures how much its cross-attention changes from step to step, "
        "and prints the gate step that this suggests with what it saves.",
    )
    _add_pipeline(calibrate)
    _add_seed_and_steps(calibrate)
    _add_count(calibrate, 32)
    calibrate.add_argument(
        "--tolerance",
        type=float,
        default=TGateConfig.tolerance,
        help="change from one step to the next below which cross-attention has converged",
    )
    calibrate.add_argument(
        "--out", type=Path, metavar="FILE", help="write what was measured into FILE, as safetensors"
    )
    _add_reports(calibrate)


def _add_quality(commands: Commands) -> None:
    quality = _command(
        commands,
        "quality",
        "measure what the gate and other ways to save arithmetic cost in pictures",
        "Draws the same prompts many ways. The demo's pictures are read exactly: whether they show what their prompts "
        "say. With a model of your own: how like the stock pictures they are, and CLIP scores.",
    )
    _add_pipeline(quality)
    _add_seed_and_steps(quality)
    _add_count(quality, 256)
    _add_sampler(quality, nargs="+", default=[], several="; several are compared")
    quality.add_argument("--quick", action="store_true", help="draw few prompts")
    quality.add_argument(
        "--clip",
        metavar="MODEL",
        help="a CLIP model's folder or its name on the hub, which scores your model's pictures",
    )
    _add_only(quality, "ways")
    _add_reports(quality)


def _add_tune(commands: Commands) -> None:
    tune = _command(
        commands,
        "tune",
        "find the cheapest settings that keep a budget, for your model",
        "Draws a few prompts with the stock pipeline and with each of some settings, prints what each costs, the "
        "cheapest that keeps the budget as a line of Python, and writes its pictures beside the stock ones.",
    )
    _add_pipeline(tune)
    _add_seed_and_steps(tune)
    _add_sampler(tune)
    tune.add_argument(
        "--psnr", type=float, metavar="DB", help="budget: the least likeness to the stock pictures, in dB"
    )
    tune.add_argument(
        "--arithmetic",
        type=float,
        metavar="SHARE",
        help="budget: the greatest share of the stock arithmetic, such as 0.66",
    )
    _add_count(tune, 8)
    tune.add_argument(
        "--out",
        type=Path,
        default=Path("tgate-tune.png"),
        metavar="FILE",
        help="the picture to write, all side by side",
    )
    _add_reports(tune, plots=False)


def _add_explore(commands: Commands) -> None:
    explore = _command(
        commands,
        "explore",
        "see it for oneself: a page with the gate's settings as sliders",
        "Serves a page to this machine alone: a prompt drawn by the stock and by the gated pipeline, what the gate "
        "saves and changes there, and how the prompt's cross-attention converges. Ctrl-C ends it.",
    )
    _add_model(explore)
    _add_steps(explore)
    explore.add_argument("--port", type=int, default=7860, help="where the page is served on this machine")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Says only those defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def _command(commands: Commands, name: str, short: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=short, description=description, formatter_class=_Formatter)


# Options that several commands have


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    """A pipeline with its weights, and what it draws."""
    command.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="a text file with a prompt on each line")
    _add_model(command)


def _add_model(command: argparse.ArgumentParser) -> None:
    """A pipeline with its weights."""
    command.add_argument(
        "--model", default="sd", help=f"a pipeline's folder or its name on the hub, or an embedded model: {EMBEDDED}"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, such as its own pipeline"
    )
    command.add_argument("--guidance-scale", type=float, metavar="SCALE", help=GUIDANCE_SCALE)
    _add_device_and_dtype(command)


def _add_architecture(command: argparse.ArgumentParser) -> None:
    """A denoiser of which the config is enough."""
    command.add_argument(
        "--model",
        default="sd",
        help="sd-1.5, sd-2.1, sdxl, lcm-sdxl, pixart-alpha, lcm-pixart or pixart-sigma; the folder of a saved "
        f"pipeline, of which only the configs are read; or an embedded model: {EMBEDDED}",
    )


def _add_seed_and_steps(command: argparse.ArgumentParser) -> None:
    _add_seed(command)
    _add_steps(command)


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="seed of the noise; picture i has SEED + i")


def _add_count(command: argparse.ArgumentParser, default: int) -> None:
    help_text = "number of the embedded model's own prompts, where none is given"
    command.add_argument("--count", type=int, default=default, help=help_text)


def _add_size(command: argparse.ArgumentParser) -> None:
    _add_steps(command)
    command.add_argument(
        "--height", type=int, metavar="PIXELS", help="height of the picture (default: the model's own)"
    )
    command.add_argument("--width", type=int, metavar="PIXELS", help="width of the picture (default: the model's own)")


def _add_steps(command: argparse.ArgumentParser) -> None:
    command.add_argument("--steps", type=int, help="number of denoising steps (default: the model's own)")


def _add_gate(command: argparse.ArgumentParser) -> None:
    """The fields of `TGateConfig`."""
    command.add_argument(
        "--gate-step",
        type=_gate_step,
        metavar="STEP",
        help="number of steps before the gate closes, such as 10; their share of the run, such as 0.4; or auto "
        "(default: the papers' for the model, 0.4 for other models)",
    )
    for name, default, text in (
        ("--look-interval", None, "compute every so many steps after the gate as before it"),
        ("--sp-interval", 1, "compute self-attention every so many steps before the gate"),
        ("--fi-interval", 1, "compute self-attention every so many steps after the gate"),
        ("--warm-up", 0, "number of first steps that compute self-attention in any case"),
    ):
        command.add_argument(name, type=int, default=default, metavar="STEPS", help=text)


def _gate_step(text: str) -> int | float | str:
    """A count, a fraction or `auto`; what is wrong with another is said by `TGateConfig`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _add_device_and_dtype(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="device to run on, such as cuda or cpu (default: the first accelerator)")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of weights and latents")


def _add_sampler(command: argparse.ArgumentParser, several: str = "", **settings: Any) -> None:
    help_text = f"sampler to draw with: {', '.join(SAMPLERS)}{several}"
    command.add_argument("--sampler", metavar="NAME", help=help_text, **settings)


def _add_only(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help=f"{what} to keep, by parts of their names"
    )


def _add_reports(command: argparse.ArgumentParser, *, plots: bool = True) -> None:
    command.add_argument("--json", action="store_true", help="print the report as one JSON object")
    if plots:
        command.add_argument("--plot", type=Path, metavar="FILE", help="write the report as a picture")
