"""What each command does with its options; `options.py` has them."""

import argparse
import json
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from tqdm import tqdm

from tgate_processors._tables import format_table
from tgate_processors._validation import require_tolerance, require_whole
from tgate_processors.cli.generate import Job, generate, read_prompts
from tgate_processors.cli.processes import device_of_this_process, share_of_this_process
from tgate_processors.demo.compare import compare
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.model import WEIGHTS, load_demo_pipeline
from tgate_processors.demo.picture import side_by_side
from tgate_processors.demo.quality import quality_of_demo
from tgate_processors.demo.world import caption, parse
from tgate_processors.errors import ConfigError
from tgate_processors.measure import architectures
from tgate_processors.measure import run_cost as counting
from tgate_processors.measure.architectures import Architecture
from tgate_processors.measure.bench import bench, plot_speed_ups
from tgate_processors.measure.convergence import measure_convergence, plot_convergence, suggestion
from tgate_processors.measure.interruption import keeping
from tgate_processors.measure.quality import quality_of_pipeline
from tgate_processors.measure.quality_report import plot_quality
from tgate_processors.measure.rig import Rig, reduced
from tgate_processors.schedule import TGateConfig


Options = argparse.Namespace
DONE, INTERRUPTED = 0, 130


def run_demo(options: Options) -> int:
    """Compare the pipelines on the demo's model."""
    for name in ("count", "steps", "rounds"):
        require_whole(name, getattr(options, name), least=1)
    config = _config_of(options)
    scenes = [parse(prompt) for prompt in options.prompt] or held_out_scenes(options.count, options.seed)
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    comparison = compare(
        pipe,
        scenes,
        config,
        seed=options.seed,
        steps=options.steps,
        guidance=options.guidance_scale,
        rounds=options.rounds,
    )
    settings = f"{options.steps} steps, {config}, guidance scale {options.guidance_scale:g}, seed {options.seed}"
    side_by_side(comparison, settings).save(options.out)
    print(settings)
    print(comparison)
    print(f"pictures: {options.out}")
    return DONE


def run_generate(options: Options) -> int:
    """Draw the prompts that are not drawn yet."""
    prompts = _prompts_of(options)
    if not prompts:
        raise ConfigError("`PROMPT` must be given, or `--prompts FILE`, got neither.")
    if options.steps is not None:
        require_whole("steps", options.steps, least=1)
    config = _config_of(options)
    jobs = [
        Job(prompt, options.seed + index, options.steps, options.guidance_scale, config, options.with_stock)
        for index, prompt in enumerate(prompts)
    ]
    share = share_of_this_process()
    made = generate(_pipeline_of(options), jobs, options.out, share=share)
    print(f"process {share.index + 1} of {share.count}: {len(made)} pictures in {options.out}")
    return DONE


def run_cost(options: Options) -> int:
    """Count an architecture, a pipeline on disk, or the published table."""
    if options.table:
        return _count_table(options)
    cost = counting.run_cost(_architecture_of(options), _config_of(options), cache_interval=options.cache_interval)
    _print(cost, options)
    return DONE


def _count_table(options: Options) -> int:
    rows: list[counting.TableRow] = []
    settings: dict[str, Any] = {}
    with keeping(rows, settings):
        for row in tqdm(counting.PUBLISHED, desc="counting", leave=False):
            rows.append(counting.table_row(row))
    if options.json:
        print(json.dumps({"rows": [vars(row) | {"difference": row.difference} for row in rows]}, indent=2))
        return _code(settings)
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
    return _code(settings)


def run_bench(options: Options) -> int:
    """Time an architecture, or a pipeline on disk."""
    rig = Rig(
        name=options.model,
        known=reduced(_architecture_of(options), options.reduce),
        config=_config_of(options),
        batch=options.batch,
        device=str(_device_of(options)),
        dtype=getattr(torch, options.dtype),
    )
    report = bench(rig, rounds=options.rounds, compiles=options.compile, only=options.only)
    _print(report, options)
    if options.plot:
        plot_speed_ups(report, options.plot)
    return _code(report.settings)


def run_calibrate(options: Options) -> int:
    """Measure, and suggest a gate step."""
    require_tolerance(options.tolerance)
    require_whole("count", options.count, least=1)
    prompts = _prompts_of(options)
    if not prompts and options.model == "demo":
        prompts = [caption(scene) for scene in held_out_scenes(options.count, options.seed)]
    pipe = _pipeline_of(options)
    settings = _guidance_of(options)
    convergence = measure_convergence(pipe, prompts, num_inference_steps=options.steps, seed=options.seed, **settings)
    if options.out:
        convergence.save(options.out)
    if options.plot:
        plot_convergence(convergence, options.plot, tolerance=options.tolerance)
    _print(suggestion(pipe, convergence, options.tolerance, **settings), options)
    return _code(convergence.settings)


def run_quality(options: Options) -> int:
    """Measure the demo's model, or one's own."""
    pipe = _pipeline_of(options)
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
            count=24 if options.quick else options.count,
            seed=options.seed,
            steps=options.steps,
            guidance=settings["guidance_scale"],
            every=4 if options.quick else 1,
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
    _print(report, options)
    if options.plot:
        plot_quality(report, options.plot)
    return _code(report.settings)


# What several commands have in common


def _print(result: Any, options: Options) -> None:
    print(json.dumps(result.as_dict(), indent=2) if options.json else result)


def _code(settings: Mapping[str, Any]) -> int:
    return INTERRUPTED if settings.get("interrupted") else DONE


def _config_of(options: Options) -> TGateConfig:
    return TGateConfig(
        gate_step=options.gate_step,
        sp_interval=options.sp_interval,
        fi_interval=options.fi_interval,
        warm_up=options.warm_up,
        look_interval=options.look_interval,
    )


def _prompts_of(options: Options) -> list[str]:
    return [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]


def _guidance_of(options: Options) -> dict[str, float]:
    scale = 5.0 if options.guidance_scale is None and options.model == "demo" else options.guidance_scale
    return {} if scale is None else {"guidance_scale": scale}


def _device_of(options: Options) -> torch.device:
    return device_of_this_process() if options.device is None else torch.device(options.device)


def _pipeline_of(options: Options) -> Any:
    dtype = getattr(torch, options.dtype)
    if options.model == "demo":
        pipe = load_demo_pipeline(dtype=dtype)
    else:
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            options.model, use_safetensors=True, dtype=dtype, trust_remote_code=options.trust_remote_code
        )
    pipe.to(_device_of(options))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _architecture_of(options: Options) -> Architecture:
    known = architectures.architecture(str(WEIGHTS) if options.model == "demo" else options.model)
    return architectures.resized(known, steps=options.steps, height=options.height, width=options.width)
