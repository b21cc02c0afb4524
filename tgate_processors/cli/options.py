"""The options of the command `tgate-processors`. `commands.py` runs the commands."""

import argparse
from importlib import metadata
from pathlib import Path
from typing import Any, TypeAlias

from tgate_processors import __version__
from tgate_processors.measure.samplers import SAMPLERS
from tgate_processors.schedule import TGateConfig


DESCRIPTION = """\
T-GATE makes diffusers pipelines faster, without training. After a gate step it reuses the cross-attention of that
step, and drops classifier-free guidance."""

EPILOG = """\
examples:
  tgate-processors demo                                          see what the gate does on a small embedded model
  tgate-processors cost --model sdxl --gate-step 10              count what a run saves, without weights
  tgate-processors bench --model sdxl --dtype bfloat16           time the gate and other accelerators here
  tgate-processors table                                         measure the original's benchmark table here
  tgate-processors calibrate --model FOLDER "a red fox"          find the gate step that your model suggests
  tgate-processors quality --quick                               measure what each method costs in accuracy
  tgate-processors tune --model FOLDER "a red fox" --psnr 30     find the cheapest settings for your model
  tgate-processors generate --model FOLDER --prompts FILE        draw many prompts, and resume where it stopped
  tgate-processors explore                                       serve a page with the gate's settings as sliders

`tgate-processors COMMAND --help` lists the options of a command. The default model is an embedded Stable Diffusion.
exit codes: 0 done; 1 something is missing, or cannot be read or written; 2 a bad argument; 130 interrupted by Ctrl-C.
A command that is interrupted reports what it has done, or leaves it in its files."""

EMBEDDED = "sd, lcm, pixart or pixart-lcm"  # written out, because a help text must not import the models' module
GUIDANCE_SCALE = "scale of classifier-free guidance (default: the pipeline's own)"
DTYPES = ("float32", "float16", "bfloat16")
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


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
        "draw the same prompts with the stock and with the gated pipeline",
        "Draws the same prompts with the stock and with the gated pipeline, on a text-to-image model that comes with "
        "the package. Writes the pictures side by side, and prints what the gate saves.",
    )
    demo.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="what to draw, such as 'a large red circle left of a small blue square on a yellow background' (default: "
        "prompts that the model never saw in training)",
    )
    demo.add_argument("--count", type=int, default=5, help="number of prompts to draw if no PROMPT is given")
    demo.add_argument("--model", default="sd", metavar="NAME", help=f"embedded model to draw with: {EMBEDDED}")
    _add_seed_and_steps(demo)
    demo.add_argument("--guidance-scale", type=float, metavar="SCALE", help=GUIDANCE_SCALE)
    _add_gate(demo)
    demo.add_argument("--rounds", type=int, default=3, help="number of timed runs of each pipeline")
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("tgate-demo.png"),
        metavar="FILE",
        help="file for the pictures, side by side in one",
    )


def _add_generate(commands: Commands) -> None:
    generate = _command(
        commands,
        "generate",
        "draw many prompts into a folder",
        "Draws every prompt with the gated pipeline. If you run it again, it draws only the pictures that are "
        "missing. Under `accelerate launch --num_processes N -m tgate_processors generate ...` the processes share "
        "the prompts.",
    )
    _add_pipeline(generate)
    _add_seed_and_steps(generate)
    _add_gate(generate)
    generate.add_argument(
        "--out", type=Path, default=Path("tgate-pictures"), metavar="FOLDER", help="folder for the pictures"
    )
    generate.add_argument(
        "--with-stock",
        action="store_true",
        help="draw each prompt with the stock pipeline too, and put that picture on the left",
    )


def _add_cost(commands: Commands) -> None:
    cost = _command(
        commands,
        "cost",
        "count what a gated run saves: multiply-accumulates, parameters, cache",
        "Counts a run with the denoiser's architecture on the meta device, without weights and without a download.",
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
        "time the gated pipeline, the stock one, the least possible time, and other accelerators",
        "Times an architecture with random weights, because speed does not depend on their values. The contestants "
        "take turns. If one fails, the report gives its error.",
    )
    _add_architecture(bench)
    _add_size(bench)
    _add_gate(bench)
    bench.add_argument("--reduce", type=int, default=1, help="divisor of the layers' width")
    bench.add_argument("--batch", type=int, default=1, help="number of pictures in a batch")
    bench.add_argument("--rounds", type=int, default=5, help="number of timed runs of each contestant")
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
        "weights, and draws held-out prompts with the embedded model of its kind. Prints the results with the "
        "published figures.",
    )
    table.add_argument("--count", type=int, default=48, help="number of prompts to draw")
    _add_seed(table)
    table.add_argument("--rounds", type=int, default=3, help="number of timed runs of each row")
    _add_device_and_dtype(table)
    _add_reports(table)


def _add_calibrate(commands: Commands) -> None:
    calibrate = _command(
        commands,
        "calibrate",
        "measure how a model's cross-attention converges, and suggest a gate step",
        "Draws the prompts with the stock pipeline, and measures how much its cross-attention changes from step to "
        "step. Prints the gate step that this suggests, and what it saves.",
    )
    _add_pipeline(calibrate)
    _add_seed_and_steps(calibrate)
    _add_count(calibrate, 32)
    calibrate.add_argument(
        "--tolerance",
        type=float,
        default=TGateConfig.tolerance,
        help="change from step to step below which cross-attention counts as converged",
    )
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="write the measurements to FILE, as safetensors")
    _add_reports(calibrate)


def _add_quality(commands: Commands) -> None:
    quality = _command(
        commands,
        "quality",
        "measure what the gate and other methods cost in the pictures",
        "Draws the same prompts with the gate and with other methods that save arithmetic. On an embedded model it "
        "prints how many pictures show all that their prompts say. On your model it prints their likeness to the "
        "stock pictures, and CLIP scores.",
    )
    _add_pipeline(quality)
    _add_seed_and_steps(quality)
    _add_count(quality, 256)
    _add_sampler(quality, nargs="+", default=[], several="; several are compared")
    quality.add_argument("--quick", action="store_true", help="draw few prompts")
    quality.add_argument(
        "--clip",
        metavar="MODEL",
        help="folder of a CLIP model, or its name on the hub, that scores the pictures of your model",
    )
    _add_only(quality, "methods")
    _add_reports(quality)


def _add_tune(commands: Commands) -> None:
    tune = _command(
        commands,
        "tune",
        "find the cheapest settings within a budget, for your model",
        "Draws a few prompts with the stock pipeline and with several settings of the gate, and prints what each "
        "setting costs. Prints the cheapest setting within the budget as a line of Python, and writes its pictures "
        "below the stock ones.",
    )
    _add_pipeline(tune)
    _add_seed_and_steps(tune)
    _add_sampler(tune)
    tune.add_argument(
        "--psnr", type=float, metavar="DB", help="budget: least mean likeness to the stock pictures, in dB"
    )
    tune.add_argument(
        "--arithmetic",
        type=float,
        metavar="SHARE",
        help="budget: largest share of the stock pipeline's arithmetic, such as 0.66",
    )
    _add_count(tune, 8)
    tune.add_argument(
        "--out",
        type=Path,
        default=Path("tgate-tune.png"),
        metavar="FILE",
        help="file for the pictures, side by side in one",
    )
    _add_reports(tune, plots=False)


def _add_explore(commands: Commands) -> None:
    explore = _command(
        commands,
        "explore",
        "serve a page with the gate's settings as sliders",
        "Serves a page to this machine alone. The page draws a prompt with the stock and with the gated pipeline. It "
        "shows what the gate saves and changes, and how the prompt's cross-attention converges. Ctrl-C ends it.",
    )
    _add_model(explore)
    _add_steps(explore)
    explore.add_argument("--port", type=int, default=7860, help="port of this machine that serves the page")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Help formatter that leaves out defaults without information, such as None."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        says_nothing = action.default is None or action.default is False or action.default == []
        return action.help if says_nothing else super()._get_help_string(action)


def _command(commands: Commands, name: str, short: str, description: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=short, description=description, formatter_class=_Formatter)


# Options that several commands share


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    """Add a pipeline with its weights, and the prompts that it draws."""
    command.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="text file with a prompt on each line")
    _add_model(command)


def _add_model(command: argparse.ArgumentParser) -> None:
    """Add a pipeline with its weights."""
    command.add_argument(
        "--model", default="sd", help=f"folder of a pipeline, its name on the hub, or an embedded model: {EMBEDDED}"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, such as its own pipeline"
    )
    command.add_argument("--guidance-scale", type=float, metavar="SCALE", help=GUIDANCE_SCALE)
    _add_device_and_dtype(command)


def _add_architecture(command: argparse.ArgumentParser) -> None:
    """Add a denoiser that is built from its config, without weights."""
    command.add_argument(
        "--model",
        default="sd",
        help="sd-1.5, sd-2.1, sdxl, lcm-sdxl, pixart-alpha, lcm-pixart or pixart-sigma; the folder of a saved "
        f"pipeline, which needs only its configs; or an embedded model: {EMBEDDED}",
    )


def _add_seed_and_steps(command: argparse.ArgumentParser) -> None:
    _add_seed(command)
    _add_steps(command)


def _add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument("--seed", type=int, default=0, help="seed of the noise; picture i starts from SEED + i")


def _add_count(command: argparse.ArgumentParser, default: int) -> None:
    help_text = "number of the embedded model's held-out prompts to draw if no prompt is given"
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
    """Add the fields of `TGateConfig`."""
    command.add_argument(
        "--gate-step",
        type=_gate_step,
        metavar="STEP",
        help="number of steps before the gate closes, such as 10; their share of the run, such as 0.4; or auto "
        "(default: the papers' value for the model, or 0.4 for models of your own)",
    )
    for name, default, text in (
        ("--look-interval", None, "after the gate, compute one step in full (a look) every STEPS steps"),
        ("--sp-interval", 1, "before the gate, compute self-attention every STEPS steps"),
        ("--fi-interval", 1, "after the gate, compute self-attention every STEPS steps"),
        ("--warm-up", 0, "compute self-attention in each step up to this one, counted from 0"),
    ):
        command.add_argument(name, type=int, default=default, metavar="STEPS", help=text)


def _gate_step(text: str) -> int | float | str:
    """Return a count, a fraction or else the text itself, which `TGateConfig` checks."""
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
        "--only", nargs="+", default=[], metavar="NAME", help=f"names of the {what} to run, or parts of them"
    )


def _add_reports(command: argparse.ArgumentParser, *, plots: bool = True) -> None:
    command.add_argument("--json", action="store_true", help="print the report as one JSON object")
    if plots:
        command.add_argument("--plot", type=Path, metavar="FILE", help="write the report as a picture")
