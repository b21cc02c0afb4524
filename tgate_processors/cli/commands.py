"""The functions that run the commands. `options.py` defines their options."""

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from tgate_processors._validation import require_tolerance, require_whole
from tgate_processors.cli.explore import Drawer, build_page, gradio, require_port, serve
from tgate_processors.cli.generate import Job, fingerprint, generate, given_or_own, read_prompts
from tgate_processors.cli.outputs import require_file, require_folder, write_picture, write_plot, writing
from tgate_processors.cli.processes import device_named, device_of_this_process, share_of_this_process
from tgate_processors.demo.compare import compare
from tgate_processors.demo.embedded import DTYPE, EMBEDDED, embedded_architecture, load_demo_pipeline
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.picture import side_by_side
from tgate_processors.demo.quality import SAMPLERS, quality_of_demo
from tgate_processors.demo.table import measure_table
from tgate_processors.demo.table_report import plot_table
from tgate_processors.demo.world import caption, parse
from tgate_processors.errors import ConfigError
from tgate_processors.handle import check_can_apply
from tgate_processors.measure import architectures
from tgate_processors.measure import run_cost as counting
from tgate_processors.measure.architectures import Architecture
from tgate_processors.measure.bench import bench, plot_speed_ups
from tgate_processors.measure.convergence import measure_convergence, plot_convergence, suggestion
from tgate_processors.measure.interruption import INTERRUPTED
from tgate_processors.measure.quality import quality_of_pipeline
from tgate_processors.measure.quality_report import plot_quality
from tgate_processors.measure.rig import Rig, reduced
from tgate_processors.measure.samplers import require_sampler
from tgate_processors.measure.tune import LEAST_STEPS, require_budget, tune
from tgate_processors.presets import PRESETS
from tgate_processors.schedule import LEAST_STEPS_FOR_AUTO, TGateConfig


Options = argparse.Namespace
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
    call = _call_of(options)
    require_whole("--steps", call["num_inference_steps"], least=1)
    _require_seed(options)
    config = _config_of(options)
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
    prompts = _prompts_of(options)
    _require_prompts(prompts, options)
    _require_seed(options)
    if options.steps is not None:
        require_whole("--steps", options.steps, least=1)
    config = _config_of(options)
    require_folder("--out", options.out)
    device = _device_of(options)
    pipe = _pipeline_of(options, device)
    call = _call_of(options)
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
    cost = counting.run_cost(_architecture_of(options), _config_of(options), cache_interval=options.cache_interval)
    _print(cost, options)
    return DONE


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
    _require_plot(options)
    report = bench(rig, rounds=options.rounds, compiles=options.compile, only=options.only)
    _print(report, options)
    if options.plot:
        with writing("--plot", options.plot):
            plot_speed_ups(report, options.plot)
    return _code(report.settings)


def run_table(options: Options) -> int:
    """Measure the original's benchmark table."""
    _require_seed(options)
    _require_plot(options)
    device = str(_device_of(options))
    dtype = getattr(torch, options.dtype)
    table = measure_table(count=options.count, seed=options.seed, rounds=options.rounds, device=device, dtype=dtype)
    _print(table, options)
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
    prompts = _prompts_or_held_out(options)
    pipe = _pipeline_of(options, _device_of(options))
    call = _measured_call_of(options)
    steps = call.pop("num_inference_steps")
    convergence = measure_convergence(pipe, prompts, num_inference_steps=steps, seed=options.seed, **call)
    try:
        if options.out:
            with writing("--out", options.out):
                convergence.save(options.out)
    finally:  # print the result even if the file cannot be written
        _print(suggestion(pipe, convergence, options.tolerance, **call), options)
    if options.plot:
        with writing("--plot", options.plot):
            plot_convergence(convergence, options.plot, tolerance=options.tolerance)
    return _code(convergence.settings)


def run_quality(options: Options) -> int:
    """Measure what each method costs on an embedded model, or on the user's own."""
    _require_measurable(options)
    for sampler in options.sampler:
        require_sampler(sampler)
    prompts = _prompts_of(options)
    if options.model not in EMBEDDED:
        _require_prompts(prompts, options)
    elif prompts:
        raise ConfigError(
            "`PROMPT` must be left out for an embedded model, which draws held-out prompts of its own, got "
            f"{len(prompts)}. Pass `--count` for the number of these."
        )
    pipe = _pipeline_of(options, _device_of(options))
    call = _measured_call_of(options)
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
    _print(report, options)
    if options.plot:
        with writing("--plot", options.plot):
            plot_quality(report, options.plot)
    return _code(report.settings)


def run_tune(options: Options) -> int:
    """Find the cheapest settings within the budget."""
    require_budget(options.psnr, options.arithmetic)
    if options.sampler is not None:
        require_sampler(options.sampler)
    call = _measured_call_of(options)
    require_whole("--steps", call["num_inference_steps"], least=LEAST_STEPS)
    require_whole("--count", options.count, least=1)
    _require_seed(options)
    require_file("--out", options.out, write_picture)
    prompts = _prompts_or_held_out(options)
    pipe = _pipeline_of(options, _device_of(options))
    tuning = tune(
        pipe,
        prompts,
        psnr=options.psnr,
        arithmetic=options.arithmetic,
        sampler=options.sampler,
        seed=options.seed,
        **call,
    )
    _print(tuning, options)
    with writing("--out", options.out):
        tuning.pictures(prompts).save(options.out)
    if not options.json:
        print(f"pictures: {options.out}")
    return _code(tuning.settings)


def run_explore(options: Options) -> int:
    """Serve the page with the gate's settings as sliders."""
    call = _measured_call_of(options)
    steps = call.pop("num_inference_steps")
    require_whole("--steps", steps, least=2)
    require_port(options.port)
    is_embedded = options.model in EMBEDDED
    prompts = [caption(scene) for scene in held_out_scenes(PAGE_COUNT, seed=0)] if is_embedded else []
    with gradio() as gr:
        pipe = _pipeline_of(options, _device_of(options))
        config = _papers_of(options.model)
        check_can_apply(pipe, config)
        drawer = Drawer(pipe, call=call, config=config, check_prompt=parse if is_embedded else None)
        page = build_page(gr, drawer, title=options.model, steps=steps, prompts=prompts)
        serve(gr, page, drawer, options.port)
    return DONE


# Shared by several commands


def _require_prompts(prompts: list[str], options: Options) -> None:
    if not prompts:
        raise ConfigError("`PROMPT` must be given, or `--prompts FILE`, got neither. Pass what to draw.")
    if options.model in EMBEDDED:
        for prompt in prompts:
            parse(prompt)  # raises for what the embedded models do not know


def _require_measurable(options: Options) -> None:
    require_whole("--count", options.count, least=1)
    require_whole("--steps", _measured_call_of(options)["num_inference_steps"], least=LEAST_STEPS_FOR_AUTO)
    _require_seed(options)
    _require_plot(options)


def _require_seed(options: Options) -> None:
    if not -(2**63) <= options.seed < 2**63:  # torch's seeds end at 2**64, which leaves room for seed + i
        raise ConfigError(f"`--seed` must be a whole number of 64 bits, got {options.seed}. Pass 0, for example.")


def _require_plot(options: Options) -> None:
    if options.plot:
        require_file("--plot", options.plot, write_plot)


def _print(result: Any, options: Options) -> None:
    print(json.dumps(_finite(result.as_dict()), indent=2) if options.json else result)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, since JSON has none.

    The likeness of equal pictures is infinite, and so is the interval of a single picture.
    """
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _code(settings: Mapping[str, Any]) -> int:
    return INTERRUPTED if settings.get("interrupted") else DONE


def _config_of(options: Options) -> TGateConfig:
    return TGateConfig(
        gate_step=_papers_of(options.model).gate_step if options.gate_step is None else options.gate_step,
        sp_interval=options.sp_interval,
        fi_interval=options.fi_interval,
        warm_up=options.warm_up,
        look_interval=options.look_interval,
    )


def _papers_of(model: str) -> TGateConfig:
    """Return the papers' gate for the model, or the one for SDXL if the model has no preset."""
    embedded = EMBEDDED.get(model)
    return PRESETS.get(model if embedded is None else embedded.preset, PRESETS["sdxl"]).config


def _prompts_of(options: Options) -> list[str]:
    return [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]


def _prompts_or_held_out(options: Options) -> list[str]:
    """Return the given prompts. If none is given, return held-out prompts of the embedded model."""
    prompts = _prompts_of(options)
    if not prompts and options.model in EMBEDDED:
        prompts = [caption(scene) for scene in held_out_scenes(options.count, options.seed)]
    _require_prompts(prompts, options)
    return prompts


def _call_of(options: Options, **others: Any) -> dict[str, Any]:
    """Return the arguments of the pipeline's call.

    Options that are given replace the embedded model's own arguments. Any other model takes `others` for these.
    """
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    own = EMBEDDED[options.model].call if options.model in EMBEDDED else others
    return {**own, **{name: value for name, value in given.items() if value is not None}}


def _measured_call_of(options: Options) -> dict[str, Any]:
    return _call_of(options, num_inference_steps=25)


def _device_of(options: Options) -> torch.device:
    return device_of_this_process() if options.device is None else device_named(options.device)


def _pipeline_of(options: Options, device: torch.device) -> Any:
    dtype = getattr(torch, options.dtype)
    if options.model in EMBEDDED:
        pipe = load_demo_pipeline(options.model, dtype=dtype)
    else:
        settings: dict[str, Any] = {"use_safetensors": True, DTYPE: dtype}
        if options.trust_remote_code:
            settings["trust_remote_code"] = True  # older diffusers warns of it where no code comes with the model
        else:
            _require_no_code(Path(options.model))
        pipe = diffusers.DiffusionPipeline.from_pretrained(options.model, **settings)
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _require_no_code(folder: Path) -> None:
    """Raise `ConfigError` if a pipeline's folder brings code; diffusers before 0.38 runs it without being asked."""
    index = folder / "model_index.json"
    parts = json.loads(index.read_text()) if index.is_file() else {}
    named = parts.pop("_class_name", None)
    files = [folder / f"{named[0]}.py"] if isinstance(named, list) else []
    files += [folder / name / f"{part[0]}.py" for name, part in parts.items() if isinstance(part, list)]
    for file in filter(Path.is_file, files):
        raise ConfigError(
            f"`--trust-remote-code` must be given for a model that brings its own code, got {str(file)!r}. "
            "Read the file first."
        )


def _architecture_of(options: Options) -> Architecture:
    is_embedded = options.model in EMBEDDED
    known = embedded_architecture(options.model) if is_embedded else architectures.architecture(options.model)
    return architectures.resized(known, steps=options.steps, height=options.height, width=options.width)
