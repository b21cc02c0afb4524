"""The command `tgate-processors`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_processors import ConfigError, TGateConfig, TGateError


if TYPE_CHECKING:
    from tgate_processors.architectures import Architecture


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 is success, 2 a bad argument."""
    options = parser().parse_args(arguments)
    try:
        options.run(options)
    except (TGateError, ValueError) as error:
        print(f"tgate-processors {options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tgate-processors", description="T-GATE for diffusers pipelines, as attention processors."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_generate(commands)
    _add_cost(commands)
    _add_bench(commands)
    _add_calibrate(commands)
    _add_quality(commands)
    return top


def _gate_step(text: str) -> int | float | str:
    """A count, a fraction or `auto`; what is wrong with another is said by `TGateConfig`."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _add_gate_step(command: argparse.ArgumentParser, default: int | None = 10) -> None:
    command.add_argument(
        "--gate-step", type=_gate_step, default=default, help="steps before the gate closes, or their share, or auto"
    )


def _add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    demo = commands.add_parser(
        "demo",
        help="draw the same pictures with the stock and the gated pipeline",
        description="Draws the same pictures with the stock and the gated pipeline, on the text-to-image model that "
        "comes with the package: writes them side by side and prints what was saved.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help="such as 'a large red circle left of a small blue square on a yellow background'; none: draws some",
    )
    demo.add_argument("--count", type=int, default=5, help="how many prompts to draw where none is given")
    demo.add_argument("--steps", type=int, default=25, help="denoising steps")
    _add_gate_step(demo)
    demo.add_argument("--look-interval", type=int, help="look at the text again every so many steps after the gate")
    demo.add_argument("--guidance", type=float, default=5.0, help="scale of classifier-free guidance")
    demo.add_argument("--seed", type=int, default=0, help="of the drawn prompts and of the noise")
    demo.add_argument("--rounds", type=int, default=3, help="how often each pipeline is timed, in turn")
    demo.add_argument("--out", type=Path, default=Path("tgate-demo.png"), help="where the pictures go")
    demo.set_defaults(run=run_demo)


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    generate = commands.add_parser(
        "generate",
        help="draw many prompts into a folder",
        description="Draws every prompt with the gated pipeline. Run again, it goes on where it was; under "
        "`accelerate launch --num_processes N -m tgate_processors generate ...` the processes share the prompts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_pipeline(generate)
    generate.add_argument("--out", type=Path, default=Path("tgate-pictures"), help="the folder of the pictures")
    generate.add_argument("--steps", type=int, help="denoising steps; the pipeline's own where none is given")
    _add_gate_step(generate)
    generate.add_argument(
        "--look-interval", type=int, help="look at the text again every so many steps after the gate"
    )
    generate.add_argument("--with-stock", action="store_true", help="the stock pipeline's picture left of each")
    generate.set_defaults(run=run_generate)


def _add_pipeline(command: argparse.ArgumentParser) -> None:
    """The options that `_prompts_of` and `_pipeline_of` read, and those of a run."""
    command.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw")
    command.add_argument("--prompts", type=Path, metavar="FILE", help="a text file, a prompt on each line")
    command.add_argument("--model", default="demo", help="a pipeline's folder or name on the hub, or `demo`")
    command.add_argument("--guidance", type=float, help="scale of guidance; the pipeline's own where none is given")
    command.add_argument("--seed", type=int, default=0, help="picture i starts from the noise of SEED + i")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of the weights")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model, as its own pipeline"
    )


DTYPES = ("float32", "float16", "bfloat16")


def _add_cost(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    cost = commands.add_parser(
        "cost",
        help="count what a gated run saves: multiply-accumulates, parameters, cache",
        description="Counts a run by running the denoiser's architecture on the meta device: no weights, no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = cost.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="sd-1.5, sd-2.1, sdxl, lcm-sdxl, pixart-alpha, lcm-pixart or pixart-sigma")
    what.add_argument("--pipeline", type=Path, help="folder of a saved pipeline; only its configs are read")
    what.add_argument("--table", action="store_true", help="the original's benchmark table, counted here")
    _add_run(cost)
    cost.add_argument("--cache-interval", type=int, help="beside DeepCache with this interval, both runs")
    cost.add_argument("--json", action="store_true", help="print one JSON object")
    cost.set_defaults(run=run_cost)


def _add_run(command: argparse.ArgumentParser) -> None:
    """The options that `_run_of` reads."""
    _add_gate_step(command)
    command.add_argument("--look-interval", type=int, help="look at the text again every so many steps after the gate")
    command.add_argument("--sp-interval", type=int, default=1, help="self-attention's interval before the gate")
    command.add_argument("--fi-interval", type=int, default=1, help="self-attention's interval after the gate")
    command.add_argument("--warm-up", type=int, default=0, help="steps in which self-attention is always computed")
    command.add_argument("--steps", type=int, help="denoising steps; the model's own where none is given")
    command.add_argument("--height", type=int, help="pixels; the model's own where none is given")
    command.add_argument("--width", type=int, help="pixels; the model's own where none is given")


def _add_bench(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    bench = commands.add_parser(
        "bench",
        help="time the gated pipeline beside stock, the least possible, and its peers",
        description="Times an architecture with random weights, on which speed does not depend. The contestants run "
        "turn about; one that fails is reported with its error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = bench.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="sd-1.5, sd-2.1, sdxl, lcm-sdxl, pixart-alpha, lcm-pixart or pixart-sigma")
    what.add_argument(
        "--pipeline", type=Path, help="folder of a saved pipeline; its configs are read, not its weights"
    )
    _add_run(bench)
    bench.add_argument("--reduce", type=int, default=1, help="divide the width of its layers")
    bench.add_argument("--batch", type=int, default=1, help="pictures at once")
    bench.add_argument("--rounds", type=int, default=5, help="how often each is timed, in turn")
    bench.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contestants, by parts of their names")
    bench.add_argument("--compile", action="store_true", help="compile each denoiser")
    bench.add_argument("--device", help="such as cuda or cpu; the first accelerator where none is given")
    bench.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of weights and latents")
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the speed-ups")
    bench.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> None:
    """Time an architecture, or a pipeline on disk."""
    import torch

    from tgate_processors.bench import bench, plot
    from tgate_processors.rig import Rig, reduced

    config, known = _run_of(options)
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    rig = Rig(
        name=options.model or str(options.pipeline),
        known=reduced(known, options.reduce),
        config=config,
        batch=options.batch,
        device=options.device or accelerator,
        dtype=getattr(torch, options.dtype),
    )
    report = bench(rig, rounds=options.rounds, compiles=options.compile, only=options.only)
    print(json.dumps(report.as_dict(), indent=2) if options.json else report)
    if options.plot:
        plot(report, options.plot)


def _run_of(options: argparse.Namespace) -> "tuple[TGateConfig, Architecture]":
    """The gate and the architecture that the options of `cost` and `bench` name."""
    from tgate_processors import architectures

    config = TGateConfig(
        gate_step=options.gate_step,
        sp_interval=options.sp_interval,
        fi_interval=options.fi_interval,
        warm_up=options.warm_up,
        look_interval=options.look_interval,
    )
    if options.pipeline is not None:
        known = architectures.pipeline_on_disk(options.pipeline)
    else:
        known = architectures.architecture(options.model)
    return config, architectures.resized(known, steps=options.steps, height=options.height, width=options.width)


def run_cost(options: argparse.Namespace) -> None:
    """Count an architecture, a pipeline on disk, or the published table."""
    from tgate_processors import run_cost

    if options.table:
        _print_table(options.json)
        return
    config, known = _run_of(options)
    cost = run_cost.run_cost(known, config, cache_interval=options.cache_interval)
    print(json.dumps(cost.as_dict(), indent=2) if options.json else cost)


def _print_table(as_json: bool) -> None:
    from tqdm import tqdm

    from tgate_processors.run_cost import PUBLISHED, table_row
    from tgate_processors.schedule import format_table

    rows = [table_row(row) for row in tqdm(PUBLISHED, desc="counting", leave=False)]
    if as_json:
        print(json.dumps({"rows": [vars(row) | {"difference": row.difference} for row in rows]}, indent=2))
        return
    heading = ("TMACs of a run", "published", "Linear and Conv", "difference", "with attention's products")
    lines = [
        (r.name, f"{r.published_tmacs:.3f}", f"{r.tmacs:.3f}", f"{r.difference:+.3%}", f"{r.tmacs_with_attention:.3f}")
        for r in rows
    ]
    print(format_table([heading, *lines]))
    print(
        "The published DeepCache rows were made with DeepCache's own SDXL pipeline, whose shallow steps cost more\n"
        "than those of its helper for stock pipelines (127.9 against 49.0 GMACs), and with guidance through step 12;\n"
        "counted here is what the helper does, with the gate at step 10."
    )


def run_demo(options: argparse.Namespace) -> None:
    """Compare the pipelines on the demo's model."""
    # a help text must not wait for diffusers' pipelines
    from tgate_processors.demo.compare import compare
    from tgate_processors.demo.evaluate import held_out_scenes
    from tgate_processors.demo.model import load_demo_pipeline
    from tgate_processors.demo.picture import side_by_side
    from tgate_processors.demo.world import parse
    from tgate_processors.schedule import require_whole

    for name in ("count", "steps", "rounds"):
        require_whole(name, getattr(options, name), least=1)
    config = TGateConfig(gate_step=options.gate_step, look_interval=options.look_interval)
    scenes = [parse(prompt) for prompt in options.prompts] or held_out_scenes(options.count, options.seed)
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    comparison = compare(
        pipe,
        scenes,
        config,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance,
        rounds=options.rounds,
    )
    settings = (
        f"{options.steps} steps, gate step {options.gate_step}, guidance {options.guidance:g}, seed {options.seed}"
    )
    side_by_side(comparison, settings).save(options.out)
    print(settings)
    print(comparison)
    print(f"pictures: {options.out}")


def _prompts_of(options: argparse.Namespace) -> list[str]:
    from tgate_processors.generate import read_prompts

    return [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]


def _pipeline_of(options: argparse.Namespace, device: object) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    from tgate_processors.demo.model import load_demo_pipeline

    if options.model == "demo":
        pipe = load_demo_pipeline().to(getattr(torch, options.dtype))
    else:
        pipe = DiffusionPipeline.from_pretrained(
            options.model,
            use_safetensors=True,
            dtype=getattr(torch, options.dtype),
            trust_remote_code=options.trust_remote_code,
        )
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_generate(options: argparse.Namespace) -> None:
    """Draw the prompts that are not drawn yet."""
    from tgate_processors.generate import Job, generate, share_of_this_process
    from tgate_processors.schedule import require_whole

    prompts = _prompts_of(options)
    if not prompts:
        raise ConfigError("`PROMPT` must be given, or `--prompts FILE`, got neither.")
    if options.steps is not None:
        require_whole("steps", options.steps, least=1)
    config = TGateConfig(gate_step=options.gate_step, look_interval=options.look_interval)
    jobs = [
        Job(prompt, options.seed + index, options.steps, options.guidance, config, options.with_stock)
        for index, prompt in enumerate(prompts)
    ]
    share, device = share_of_this_process()
    made = generate(_pipeline_of(options, device), jobs, options.out, share=share)
    print(f"process {share.index + 1} of {share.count}: {len(made)} pictures in {options.out}")


def _add_calibrate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    calibrate = commands.add_parser(
        "calibrate",
        help="measure how a model's cross-attention converges, and choose its gate step",
        description="Draws the prompts with the stock pipeline, measures how much its cross-attention changes from "
        "step to step, and prints the gate step that this suggests with what it saves.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_pipeline(calibrate)
    calibrate.add_argument("--count", type=int, default=32, help="of the demo's own prompts, where none is given")
    calibrate.add_argument("--steps", type=int, default=25, help="denoising steps")
    calibrate.add_argument("--tolerance", type=float, default=TGateConfig.tolerance, help="change that is none")
    calibrate.add_argument("--out", type=Path, metavar="FILE", help="write what was measured, as safetensors")
    calibrate.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of it")
    calibrate.add_argument("--json", action="store_true", help="print one JSON object")
    calibrate.set_defaults(run=run_calibrate)


def _add_quality(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    quality = commands.add_parser(
        "quality",
        help="measure what the gate and other ways to save arithmetic cost in pictures",
        description="Draws the same prompts many ways. The demo's pictures are read exactly: whether they show what "
        "their prompts say. With a model of your own: how like the stock pictures they are, and CLIP scores.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_pipeline(quality)
    quality.add_argument("--count", type=int, default=256, help="of the demo's own prompts")
    quality.add_argument("--steps", type=int, default=25, help="denoising steps")
    quality.add_argument("--quick", action="store_true", help="fewer prompts, and the gate at every third step")
    quality.add_argument("--only", nargs="+", default=[], metavar="NAME", help="ways, by parts of their names")
    quality.add_argument("--clip", metavar="MODEL", help="a CLIP model's folder or name, to score your own model by")
    quality.add_argument("--json", action="store_true", help="print one JSON object")
    quality.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of score against arithmetic")
    quality.set_defaults(run=run_quality)


def _guidance_of(options: argparse.Namespace) -> dict[str, float]:
    guidance = 5.0 if options.guidance is None and options.model == "demo" else options.guidance
    return {} if guidance is None else {"guidance_scale": guidance}


def run_calibrate(options: argparse.Namespace) -> None:
    """Measure, and suggest a gate step."""
    from tgate_processors.convergence import measure_convergence, plot, suggestion
    from tgate_processors.demo.evaluate import held_out_scenes
    from tgate_processors.demo.world import caption
    from tgate_processors.generate import share_of_this_process
    from tgate_processors.schedule import require_tolerance, require_whole

    require_tolerance(options.tolerance)
    require_whole("count", options.count, least=1)
    prompts = _prompts_of(options)
    if not prompts and options.model == "demo":
        prompts = [caption(scene) for scene in held_out_scenes(options.count, options.seed)]
    pipe = _pipeline_of(options, share_of_this_process()[1])
    settings = _guidance_of(options)
    convergence = measure_convergence(pipe, prompts, num_inference_steps=options.steps, seed=options.seed, **settings)
    if options.out:
        convergence.save(options.out)
    if options.plot:
        plot(convergence, options.plot, tolerance=options.tolerance)
    suggested = suggestion(pipe, convergence, options.tolerance, **settings)
    print(json.dumps(suggested.as_dict(), indent=2) if options.json else suggested)


def run_quality(options: argparse.Namespace) -> None:
    """Measure the demo's model, or one's own."""
    from tgate_processors.demo.quality import quality_of_demo
    from tgate_processors.generate import share_of_this_process
    from tgate_processors.quality import quality_of_pipeline
    from tgate_processors.quality_report import plot

    pipe = _pipeline_of(options, share_of_this_process()[1])
    settings = _guidance_of(options)
    prompts = _prompts_of(options)
    if options.model == "demo":
        if prompts:
            raise ConfigError(
                f"`PROMPT` must be left out for the demo, which draws its own to read them, got {len(prompts)}. "
                "Pass `--count`."
            )
        report = quality_of_demo(
            pipe,
            count=48 if options.quick else options.count,
            seed=options.seed,
            steps=options.steps,
            guidance=settings["guidance_scale"],
            every=3 if options.quick else 1,
            only=options.only,
        )
    else:
        report = quality_of_pipeline(
            pipe,
            prompts[:4] if options.quick else prompts,
            num_inference_steps=options.steps,
            seed=options.seed,
            clip=options.clip,
            only=options.only,
            **settings,
        )
    print(json.dumps(report.as_dict(), indent=2) if options.json else report)
    if options.plot:
        plot(report, options.plot)
