"""The trained models that come with the package, and the arguments of each pipeline's call."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, LCMScheduler

from tgate_processors._pipelines import denoisers_of
from tgate_processors.errors import ConfigError, MissingPackageError
from tgate_processors.measure.architectures import Architecture, architecture


# name of the argument of `from_pretrained` for the weights' type; it ignores a name that it does not know
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
WEIGHTS = Path(__file__).parent / "weights"
TEACHER_STEPS = 10  # steps of the runs that the latent-consistency models learnt from


@dataclass(frozen=True)
class Embedded:
    """An embedded model.

    Args:
        call: Arguments of the pipeline's call.
        preset: Name of the preset with the papers' gate for this kind of model.
        teacher: Name of the model that the weights are a LoRA for. None if they are a whole model.
        vae: Name of the model whose autoencoder this one shares. None if it has its own.
    """

    call: Mapping[str, Any] = field(repr=False)
    preset: str
    teacher: str | None = None
    vae: str | None = None


# PixArt's pipeline would otherwise draw at the nearest of its own sizes, and clean captions with other packages
_AS_IT_IS = {"use_resolution_binning": False, "clean_caption": False}
_WITHOUT_GUIDANCE = {"num_inference_steps": 4, "guidance_scale": 1.0}
EMBEDDED = {
    "sd": Embedded({"num_inference_steps": 25, "guidance_scale": 5.0}, "sd-1.5"),
    "lcm": Embedded(_WITHOUT_GUIDANCE, "lcm-sdxl", teacher="sd"),
    "pixart": Embedded({"num_inference_steps": 25, "guidance_scale": 3.0} | _AS_IT_IS, "pixart-alpha", vae="sd"),
    "pixart-lcm": Embedded(_WITHOUT_GUIDANCE | _AS_IT_IS, "lcm-pixart", teacher="pixart"),
}


def load_demo_pipeline(model: str | Path = "sd", *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """Load a trained model as a diffusers pipeline, without a download. Its files hold half precision.

        pipe = load_demo_pipeline("pixart")
        image = pipe("a small red circle on a white background", **EMBEDDED["pixart"].call).images[0]

    Args:
        model: Key of `EMBEDDED`, or the folder of a model that you trained.
        dtype: Type of the loaded weights.

    Raises:
        ConfigError: There is no such model.
        MissingPackageError: `peft` is not installed, which the latent-consistency models need.
    """
    embedded = EMBEDDED.get(str(model))
    if embedded is not None and embedded.teacher is not None:
        return _adapted(embedded.teacher, WEIGHTS / str(model), dtype)
    folder = Path(model) if embedded is None else WEIGHTS / str(model)
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"`model` must be one of {', '.join(EMBEDDED)}, or the folder of a model that you trained, "
            f"got {str(model)!r}. Train one with `python -m tgate_processors.demo.train --out FOLDER`."
        )
    # `low_cpu_mem_usage=True` needs `accelerate`, and a model this small gains nothing from it
    settings = {DTYPE: dtype, "local_files_only": True, "low_cpu_mem_usage": False}
    parts = {}
    if embedded is not None and embedded.vae is not None:
        parts["vae"] = AutoencoderKL.from_pretrained(WEIGHTS / embedded.vae, subfolder="vae", **settings)
    return DiffusionPipeline.from_pretrained(folder, **parts, **settings)


def _adapted(teacher: str, folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """Return a latent-consistency model: its teacher with the LoRA merged into it."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingPackageError(
            "`peft` must be installed for the latent-consistency models, which are LoRAs. "
            "Run `pip install 'tgate-processors[lcm]'`."
        ) from error
    pipe = load_demo_pipeline(teacher, dtype=dtype)
    PeftModel.from_pretrained(denoisers_of(pipe)[0], str(folder)).merge_and_unload()
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, original_inference_steps=TEACHER_STEPS)
    return pipe


def embedded_architecture(model: str) -> Architecture:
    """Return the architecture of an embedded model's denoiser, with the steps and guidance of its pipeline's run.

    Args:
        model: Key of `EMBEDDED`.
    """
    embedded = EMBEDDED[model]
    known = architecture(str(WEIGHTS / (embedded.teacher or model)))
    return replace(known, guidance=embedded.teacher is None, steps=embedded.call["num_inference_steps"])
