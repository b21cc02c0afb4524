"""Loads the recordings of the original: tiny pipelines with their weights, inputs, and what came out."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import diffusers
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from tgate_processors import TGateConfig


ROOT = Path(__file__).parent / "recordings"
NAMES = sorted(path.stem for path in (ROOT / "cases").glob("*.safetensors"))


class PixelNormaliser:
    """CLIP's image normalisation alone, so that no version of an image processor matters."""

    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

    def __call__(self, images, **kwargs):
        return transformers.BatchFeature({"pixel_values": (images - self.mean) / self.std})


def load_model(name):
    meta = json.loads((ROOT / "weights" / f"{name}.json").read_text())
    weights = load_file(ROOT / "weights" / f"{name}.safetensors")
    if "base" in meta:  # it shares every other weight with its base model
        weights = load_file(ROOT / "weights" / f"{meta['base']}.safetensors") | weights
    if meta["lib"] == "transformers":
        model = getattr(transformers, meta["class"])(getattr(transformers, meta["config_class"])(**meta["config"]))
    else:
        model = getattr(diffusers, meta["class"])(**meta["config"])
    _, unexpected = model.load_state_dict({k: v.float() for k, v in weights.items()}, strict=False)
    assert all("position_ids" in key for key in unexpected)
    return model.eval().requires_grad_(False)


def build_pipe(kind, models, scheduler):
    scheduler = getattr(diffusers, scheduler["class"]).from_config(scheduler["config"])
    no_text = {"text_encoder": None, "tokenizer": None}
    if kind == "svd":
        pipe = diffusers.StableVideoDiffusionPipeline(
            vae=load_model("svd_vae"),
            image_encoder=load_model("svd_image_encoder"),
            unet=load_model(models["unet"]),
            scheduler=scheduler,
            feature_extractor=PixelNormaliser(),
        )
    elif kind == "sd":
        pipe = diffusers.StableDiffusionPipeline(
            vae=load_model("vae"),
            unet=load_model(models["unet"]),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **no_text,
        )
    elif kind == "sdxl":
        pipe = diffusers.StableDiffusionXLPipeline(
            vae=load_model("vae"),
            unet=load_model(models["unet"]),
            scheduler=scheduler,
            text_encoder_2=None,
            tokenizer_2=None,
            add_watermarker=False,
            **no_text,
        )
    else:
        cls = {"pixart_alpha": diffusers.PixArtAlphaPipeline, "pixart_sigma": diffusers.PixArtSigmaPipeline}[kind]
        transformer = load_model(models["transformer"])
        pipe = cls(vae=load_model("vae"), transformer=transformer, scheduler=scheduler, **no_text)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@dataclass(frozen=True)
class Case:
    """One recorded pipeline call, and its variants."""

    name: str
    meta: dict
    tensors: dict[str, torch.Tensor]

    @property
    def variants(self):
        return self.meta["variants"]

    def pipe(self):
        return build_pipe(self.meta["kind"], self.meta["models"], self.meta["scheduler"])

    def kwargs(self):
        """The arguments of the recorded call, fresh."""
        inputs = {k.removeprefix("in."): v.clone() for k, v in self.tensors.items() if k.startswith("in.")}
        generator = torch.Generator().manual_seed(self.meta["generator_seed"])
        sizes = {k: tuple(v) for k, v in self.meta["call"].items() if isinstance(v, list)}
        return self.meta["call"] | sizes | inputs | {"output_type": "latent", "generator": generator}


@cache
def load_case(name):
    with safe_open(ROOT / "cases" / f"{name}.safetensors", "pt") as file:
        keys = list(file.keys())
        return Case(name, json.loads(file.metadata()["case"]), {key: file.get_tensor(key) for key in keys})


def config_of(variant):
    """`v2:g8_sp3_fi1_wu2` as a configuration."""
    numbers = {key: int(value) for key, value in re.findall(r"(g|sp|fi|wu)(\d+)", variant.split(":")[1])}
    return TGateConfig(
        gate_step=numbers["g"],
        sp_interval=numbers.get("sp", 1),
        fi_interval=numbers.get("fi", 1),
        warm_up=numbers.get("wu", 0),
    )
