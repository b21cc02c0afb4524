"""The trained models that come with the package, by name, and how the pipeline of each is called."""

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


# What `from_pretrained` calls the type of the weights; where it does not know the name, it says nothing.
DTYPE = "dtype" if tuple(map(int, diffusers.__version__.split(".")[:2])) >= (0, 40) else "torch_dtype"
WEIGHTS = Path(__file__).parent / "weights"
TEACHER_STEPS = 10  # of the runs that the latent-consistency models were taught by


@dataclass(frozen=True)
class Embedded:
    """One of the models.

    Args:
        call: Arguments of its pipeline's call.
        preset: The papers' gate for its kind, of `tgate_processors.presets`.
        teacher: The model that its weights are an adapter of; None: they are its own.
        vae: The model whose autoencoder it has; None: its own.
    """

    call: Mapping[str, Any] = field(repr=False)
    preset: str
    teacher: str | None = None
    vae: str | None = None


# PixArt's pipeline would draw in the nearest of its own sizes, and clean addresses out of a prompt by other packages
_AS_IT_IS = {"use_resolution_binning": False, "clean_caption": False}
_WITHOUT_GUIDANCE = {"num_inference_steps": 4, "guidance_scale": 1.0}
EMBEDDED = {
    "sd": Embedded({"num_inference_steps": 25, "guidance_scale": 5.0}, "sd-1.5"),
    "lcm": Embedded(_WITHOUT_GUIDANCE, "lcm-sdxl", teacher="sd"),
    "pixart": Embedded({"num_inference_steps": 25, "guidance_scale": 3.0} | _AS_IT_IS, "pixart-alpha", vae="sd"),
    "pixart-lcm": Embedded(_WITHOUT_GUIDANCE | _AS_IT_IS, "lcm-pixart", teacher="pixart"),
}


def load_demo_pipeline(model: str | Path = "sd", *, dtype: torch.dtype = torch.float32) -> DiffusionPipeline:
    """A trained demo model as a pipeline of diffusers; it is kept in half precision, and needs no network.

        pipe = load_demo_pipeline("pixart")
        image = pipe("a small red circle on a white background", **EMBEDDED["pixart"].call).images[0]

    Args:
        model: A key of `EMBEDDED`, or the folder of a model that you trained.
        dtype: The type of its weights.

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
            f"`model` must be one of {', '.join(EMBEDDED)}, or a folder with a trained demo model in it, "
            f"got {str(model)!r}. Train one with `python -m tgate_processors.demo.train --out FOLDER`."
        )
    # the other way of loading asks for `accelerate`, and a model this small gains nothing by it
    settings = {DTYPE: dtype, "local_files_only": True, "low_cpu_mem_usage": False}
    parts = {}
    if embedded is not None and embedded.vae is not None:
        parts["vae"] = AutoencoderKL.from_pretrained(WEIGHTS / embedded.vae, subfolder="vae", **settings)
    return DiffusionPipeline.from_pretrained(folder, **parts, **settings)


def _adapted(teacher: str, folder: Path, dtype: torch.dtype) -> DiffusionPipeline:
    """A latent-consistency model, made of its teacher."""
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
    """The denoiser of an embedded model, a key of `EMBEDDED`, and the run that its pipeline makes."""
    embedded = EMBEDDED[model]
    known = architecture(str(WEIGHTS / (embedded.teacher or model)))
    return replace(known, guidance=embedded.teacher is None, steps=embedded.call["num_inference_steps"])
