"""The functions that run the commands. `options.py` defines their options."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tgate_processors._validation import require_tolerance, require_whole
from tgate_processors.cli.explore import Drawer, build_page, gradio, require_port, serve
from tgate_processors.cli.generate import Job, fingerprint, generate, given_or_own
from tgate_processors.cli.inputs import (
    Options,
    architecture_of,
    call_of,
    config_of,
    device_of,
    measured_call_of,
    papers_of,
    pipeline_of,
    prompts_of,
    prompts_or_held_out,
    require_prompts,
    require_seed,
)
from tgate_processors.cli.outputs import print_report, require_file, require_folder, write_picture, write_plot, writing
from tgate_processors.cli.processes import share_of_this_process
from tgate_processors.demo.compare import compare
from tgate_processors.demo.embedded import EMBEDDED, load_demo_pipeline
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.picture import side_by_side
from tgate_processors.demo.quality import SAMPLERS, quality_of_demo
from tgate_processors.demo.table import measure_table
from tgate_processors.demo.table_report import plot_table
from tgate_processors.demo.world import caption, parse
from tgate_processors.errors import ConfigError
from tgate_processors.handle import check_can_apply
from tgate_processors.measure import run_cost as counting
from tgate_processors.measure.bench import bench, plot_speed_ups
from tgate_processors.measure.convergence import measure_convergence, plot_convergence, suggestion
from tgate_processors.measure.interruption import INTERRUPTED
from tgate_processors.measure.quality import quality_of_pipeline
from tgate_processors.measure.quality_plot import plot_quality
from tgate_processors.measure.rig import Rig, reduced
from tgate_processors.measure.samplers import require_sampler
from tgate_processors.measure.tune import LEAST_STEPS, require_budget, tune
from tgate_processors.schedule import LEAST_STEPS_FOR_AUTO


DONE = 0
QUICK_COUNT = 12  # held-out prompts with `quality --quick`
PAGE_COUNT = 3  # example prompts on the page of `explore`


def disable_loading_bars() -> None:
    """Disable the progress bars of diffusers and transformers, which also appear where stderr is no terminal."""
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def run_demo(options: Options) -> int:
    """Compare the stock and the gated pipeline on an embedded model."""
    if options.model not in EMBEDDED:
        raise ConfigError(f"`--model` must be one of {', '.join(EMBEDDED)}, got {options.model!r}.")
    for name in ("count", "rounds"):
        require_whole(f"--{name}", getattr(options, name), least=1)
    call = call_of(options)
    require_whole("--steps", call["num_inference_steps"], least=1)
    require_seed(options)
    config = config_of(options)
    scenes = [parse(prompt) for prompt in options.prompt] or held_out_scenes(options.count, options.seed)
    require_file("--out", options.out, write_picture)
    pipe = load_demo_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    comparison = compare(pipe, scenes, config, seed=options.seed, rounds=options.rounds, call=call)
    steps, scale = call["num_inference_steps"], call["guidance_scale"]
    settings = f"{options.model}: {steps} steps, {config}, guidance scale {scale:g}, seed {options.seed}"
    print(settings)
    print(comparison)
    with writing("--out", options.out):
        side_by_side(comparison, settings).save(options.out)
    print(f"pictures: {options.out}")
    return DONE


def run_generate(options: Options) -> int:
    """Draw the prompts whose pictures the folder does not hold yet."""
    prompts = prompts_of(options)
    require_prompts(prompts, options)
    require_seed(options)
    if options.steps is not None:
        require_whole("--steps", options.steps, least=1)
    config = config_of(options)
    require_folder("--out", options.out)
    device = device_of(options)
    pipe = pipeline_of(options, device)
    call = call_of(options)
    one = Job(
        prompts[0],
        options.seed,
        steps=given_or_own(call.pop("num_inference_steps", None), pipe, "num_inference_steps"),
        guidance_scale=given_or_own(call.pop("guidance_scale", None), pipe, "guidance_scale"),
        config=config,
        with_stock=options.with_stock,
        model=str(Path(options.model).resolve()) if Path(options.model).is_dir() else options.model,
        weights=fingerprint(pipe),
        dtype=options.dtype,
        device=device.type,
    )
    jobs = [replace(one, prompt=prompt, seed=options.seed + index) for index, prompt in enumerate(prompts)]
    share = share_of_this_process()
    made = generate(pipe, jobs, options.out, share=share, **call)
    there = len(share.of(jobs)) - len(made)
    print(f"process {share.index + 1} of {share.count}: {len(made)} made, {there} already there, in {options.out}")
    return DONE


def run_cost(options: Options) -> int:
    """Count the arithmetic of an architecture, or of a pipeline on disk."""
    cost = counting.run_cost(architecture_of(options), config_of(options), cache_interval=options.cache_interval)
    print_report(cost, as_json=options.json)
    return DONE


def run_bench(options: Options) -> int:
    """Time an architecture, or a pipeline on disk."""
    rig = Rig(
        name=options.model,
        known=reduced(architecture_of(options), options.reduce),
        config=config_of(options),
        batch=options.batch,
        device=str(device_of(options)),
        dtype=getattr(torch, options.dtype),
    )
    _require_plot(options)
    report = bench(rig, rounds=options.rounds, compiles=options.compile, only=options.only)
    print_report(report, as_json=options.json)
    if options.plot:
        with writing("--plot", options.plot):
            plot_speed_ups(report, options.plot)
    return _code(report.settings)


def run_table(options: Options) -> int:
    """Measure the original's benchmark table."""
    require_seed(options)
    _require_plot(options)
    device = str(device_of(options))
    dtype = getattr(torch, options.dtype)
    table = measure_table(count=options.count, seed=options.seed, rounds=options.rounds, device=device, dtype=dtype)
    print_report(table, as_json=options.json)
    if options.plot:
        with writing("--plot", options.plot):
            plot_table(table, options.plot)
    return _code(table.settings)


def run_calibrate(options: Options) -> int:
    """Measure how cross-attention converges, and suggest a gate step."""
    require_tolerance(options.tolerance)
    _require_measurable(options)
    if options.out:
        require_file("--out", options.out)
    prompts = prompts_or_held_out(options)
    pipe = pipeline_of(options, device_of(options))
    call = measured_call_of(options)
    steps = call.pop("num_inference_steps")
    convergence = measure_convergence(pipe, prompts, num_inference_steps=steps, seed=options.seed, **call)
    try:
        if options.out:
            with writing("--out", options.out):
                convergence.save(options.out)
    finally:  # print the result even if the file cannot be written
        print_report(suggestion(pipe, convergence, options.tolerance, **call), as_json=options.json)
    if options.plot:
        with writing("--plot", options.plot):
            plot_convergence(convergence, options.plot, tolerance=options.tolerance)
    return _code(convergence.settings)


def run_quality(options: Options) -> int:
    """Measure what each method costs on an embedded model, or on the user's own."""
    _require_measurable(options)
    for sampler in options.sampler:
        require_sampler(sampler)
    prompts = prompts_of(options)
    if options.model not in EMBEDDED:
        require_prompts(prompts, options)
    elif prompts:
        raise ConfigError(
            "`PROMPT` must be left out for an embedded model, which draws held-out prompts of its own, got "
            f"{len(prompts)}. Pass `--count` for the number of these."
        )
    pipe = pipeline_of(options, device_of(options))
    call = measured_call_of(options)
    if options.model in EMBEDDED:
        report = quality_of_demo(
            pipe,
            options.model,
            count=QUICK_COUNT if options.quick else options.count,
            seed=options.seed,
            samplers=options.sampler or SAMPLERS,
            only=options.only,
            **call,
        )
    else:
        report = quality_of_pipeline(
            pipe,
            prompts[:4] if options.quick else prompts,
            samplers=options.sampler,
            seed=options.seed,
            clip=options.clip,
            only=options.only,
            **call,
        )
    print_report(report, as_json=options.json)
    if options.plot:
        with writing("--plot", options.plot):
            plot_quality(report, options.plot)
    return _code(report.settings)


def run_tune(options: Options) -> int:
    """Find the cheapest settings within the budget."""
    require_budget(options.psnr, options.arithmetic)
    if options.sampler is not None:
        require_sampler(options.sampler)
    call = measured_call_of(options)
    require_whole("--steps", call["num_inference_steps"], least=LEAST_STEPS)
    require_whole("--count", options.count, least=1)
    require_seed(options)
    require_file("--out", options.out, write_picture)
    prompts = prompts_or_held_out(options)
    pipe = pipeline_of(options, device_of(options))
    tuning = tune(
        pipe,
        prompts,
        psnr=options.psnr,
        arithmetic=options.arithmetic,
        sampler=options.sampler,
        seed=options.seed,
        **call,
    )
    print_report(tuning, as_json=options.json)
    with writing("--out", options.out):
        tuning.pictures(prompts).save(options.out)
    if not options.json:
        print(f"pictures: {options.out}")
    return _code(tuning.settings)


def run_explore(options: Options) -> int:
    """Serve the page with the gate's settings as sliders."""
    call = measured_call_of(options)
    steps = call.pop("num_inference_steps")
    require_whole("--steps", steps, least=2)
    require_port(options.port)
    is_embedded = options.model in EMBEDDED
    prompts = [caption(scene) for scene in held_out_scenes(PAGE_COUNT, seed=0)] if is_embedded else []
    with gradio() as gr:
        pipe = pipeline_of(options, device_of(options))
        config = papers_of(options.model)
        check_can_apply(pipe, config)
        drawer = Drawer(pipe, call=call, config=config, check_prompt=parse if is_embedded else None)
        page = build_page(gr, drawer, title=options.model, steps=steps, prompts=prompts)
        serve(gr, page, drawer, options.port)
    return DONE


# Shared by several commands


def _require_measurable(options: Options) -> None:
    require_whole("--count", options.count, least=1)
    require_whole("--steps", measured_call_of(options)["num_inference_steps"], least=LEAST_STEPS_FOR_AUTO)
    require_seed(options)
    _require_plot(options)


def _require_plot(options: Options) -> None:
    if options.plot:
        require_file("--plot", options.plot, write_plot)


def _code(settings: Mapping[str, Any]) -> int:
    return INTERRUPTED if settings.get("interrupted") else DONE
