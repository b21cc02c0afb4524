"""What the options of a command stand for: prompts, the gate, the arguments of a call, and the pipeline."""

import argparse
from pathlib import Path
from typing import Any

import diffusers
import torch

from tgate_processors.cli.generate import read_prompts
from tgate_processors.cli.processes import device_named, device_of_this_process
from tgate_processors.demo.embedded import DTYPE, EMBEDDED, embedded_architecture, load_demo_pipeline
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.world import caption, parse
from tgate_processors.errors import ConfigError
from tgate_processors.measure import architectures
from tgate_processors.measure.architectures import Architecture
from tgate_processors.presets import PRESETS
from tgate_processors.schedule import TGateConfig


Options = argparse.Namespace


def prompts_of(options: Options) -> list[str]:
    return [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])]


def prompts_or_held_out(options: Options) -> list[str]:
    """Return the given prompts. If none is given, return held-out prompts of the embedded model."""
    prompts = prompts_of(options)
    if not prompts and options.model in EMBEDDED:
        prompts = [caption(scene) for scene in held_out_scenes(options.count, options.seed)]
    require_prompts(prompts, options)
    return prompts


def require_prompts(prompts: list[str], options: Options) -> None:
    if not prompts:
        raise ConfigError("`PROMPT` must be given, or `--prompts FILE`, got neither. Pass what to draw.")
    if options.model in EMBEDDED:
        for prompt in prompts:
            parse(prompt)  # raises for what the embedded models do not know


def require_seed(options: Options) -> None:
    if not -(2**63) <= options.seed < 2**63:  # torch's seeds end at 2**64, which leaves room for seed + i
        raise ConfigError(f"`--seed` must be a whole number of 64 bits, got {options.seed}. Pass 0, for example.")


def config_of(options: Options) -> TGateConfig:
    return TGateConfig(
        gate_step=papers_of(options.model).gate_step if options.gate_step is None else options.gate_step,
        sp_interval=options.sp_interval,
        fi_interval=options.fi_interval,
        warm_up=options.warm_up,
        look_interval=options.look_interval,
    )


def papers_of(model: str) -> TGateConfig:
    """Return the papers' gate for the model, or the one for SDXL if the model has no preset."""
    embedded = EMBEDDED.get(model)
    return PRESETS.get(model if embedded is None else embedded.preset, PRESETS["sdxl"]).config


def call_of(options: Options, **others: Any) -> dict[str, Any]:
    """Return the arguments of the pipeline's call.

    Options that are given replace the embedded model's own arguments. Any other model takes `others` for these.
    """
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance_scale}
    own = EMBEDDED[options.model].call if options.model in EMBEDDED else others
    return {**own, **{name: value for name, value in given.items() if value is not None}}


def measured_call_of(options: Options) -> dict[str, Any]:
    return call_of(options, num_inference_steps=25)


def device_of(options: Options) -> torch.device:
    return device_of_this_process() if options.device is None else device_named(options.device)


def pipeline_of(options: Options, device: torch.device) -> Any:
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
    parts = dict(diffusers.DiffusionPipeline.load_config(folder)) if folder.is_dir() else {}
    named = parts.pop("_class_name", None)
    files = [folder / f"{named[0]}.py"] if isinstance(named, list) and named else []
    files += [folder / name / f"{part[0]}.py" for name, part in parts.items() if isinstance(part, list) and part]
    for file in filter(Path.is_file, files):
        raise ConfigError(
            f"`--trust-remote-code` must be given for a model that brings its own code, got {str(file)!r}. "
            "Read the file first."
        )


def architecture_of(options: Options) -> Architecture:
    is_embedded = options.model in EMBEDDED
    known = embedded_architecture(options.model) if is_embedded else architectures.architecture(options.model)
    return architectures.resized(known, steps=options.steps, height=options.height, width=options.width)
