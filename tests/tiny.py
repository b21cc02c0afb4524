"""Tiny pipelines of every family, and what the tests look at in them."""

import gc
from collections import Counter
from dataclasses import dataclass
from functools import cache

import diffusers
import torch
from recorded import load_case

from tgate_processors._layers import attention_layers, cross_attention_layers


# family: the recorded case that it is built from
TEXT_TO_IMAGE = {
    "sd": "sd_ddim_b1",
    "sd-2.1": "sd_dpm_b1",
    "sdxl": "sdxl_euler_b1",
    "lcm-sdxl": "sdxl_lcm_b1",
    "pixart-alpha": "pixart_dpm_b1",
    "pixart-sigma": "sigma_dpm_b1",
    "lcm-pixart": "pixart_lcm_b1",
    "svd": "svd_euler_b1",
}
FROM_IMAGE = {
    "sd-img2img": diffusers.StableDiffusionImg2ImgPipeline,
    "sd-inpaint": diffusers.StableDiffusionInpaintPipeline,
    "sdxl-img2img": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sdxl-inpaint": diffusers.StableDiffusionXLInpaintPipeline,
}
FAMILIES = [*TEXT_TO_IMAGE, *FROM_IMAGE]


@dataclass
class Tiny:
    """A pipeline and a call of it."""

    family: str
    pipe: diffusers.DiffusionPipeline

    @property
    def denoiser(self):
        return getattr(self.pipe, "unet", None) or self.pipe.transformer

    @property
    def takes_callback(self):
        return "pixart" not in self.family

    @property
    def guided(self):
        return "lcm" not in self.family

    def kwargs(self, **changes):
        kwargs = load_case(_case_of(self.family)).kwargs()
        if self.family in FROM_IMAGE:
            del kwargs["latents"]
            kwargs |= {"image": torch.rand(1, 3, 16, 16, generator=seeded(1)), "strength": 0.75}
        if "inpaint" in self.family:
            kwargs["mask_image"] = (torch.rand(1, 1, 16, 16, generator=seeded(2)) > 0.5).float()
        if "img2img" in self.family:
            del kwargs["height"], kwargs["width"]
        return kwargs | changes

    def __call__(self, callback=None, **changes):
        """The pipeline's latents for its recorded inputs."""
        if callback is not None and self.takes_callback:
            changes["callback_on_step_end"] = callback
        return self.pipe(**self.kwargs(**changes), return_dict=False)[0]

    def num_steps(self, **changes):
        kwargs = self.kwargs(**changes)
        return int(kwargs["num_inference_steps"] * kwargs.get("strength", 1))


def _case_of(family):
    return TEXT_TO_IMAGE.get(family) or TEXT_TO_IMAGE[family.split("-")[0]]


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def tiny(family):
    """A fresh tiny pipeline of a family."""
    pipe = load_case(_case_of(family)).pipe()
    if family == "sd-2.1":
        make_it_sd_2(pipe)
    if family in FROM_IMAGE:
        parts = pipe.components
        pipe = FROM_IMAGE[family](**parts, **({"requires_safety_checker": False} if family.startswith("sd-") else {}))
        pipe.set_progress_bar_config(disable=True)
    return Tiny(family, pipe)


def make_it_sd_2(pipe):
    """Stable Diffusion 2.1 projects with Linear layers, has heads of one width, and predicts the velocity."""
    torch.manual_seed(0)
    changes = {"use_linear_projection": True, "attention_head_dim": [2, 4]}
    pipe.unet = type(pipe.unet).from_config({**pipe.unet.config, **changes}).eval().requires_grad_(False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")


def widen(tensor, times=2):
    """A batch of different pictures from one: noise is added to all but the first."""
    noise = torch.randn((times, *tensor.shape[1:]), generator=seeded(3)) * 0.5
    noise[0] = 0
    return tensor.expand(times, *tensor.shape[1:]) + noise


def fingerprint(model):
    """Everything that a visitor could leave behind in a model."""
    return {name: _traces(module) for name, module in model.named_modules()}


def _traces(module):
    hooks = {k: len(v) for k, v in vars(module).items() if "_hooks" in k}
    attributes = {k: id(v) for k, v in vars(module).items() if k not in hooks}
    return type(module), attributes, hooks, id(getattr(module, "processor", None)), set(module._modules)


def left_behind(before, model):
    """What differs from an earlier fingerprint, by module."""
    after = fingerprint(model)
    assert before.keys() == after.keys()
    return {
        name: [(a, b) for a, b in zip(before[name], after[name], strict=True) if a != b]
        for name in before
        if before[name] != after[name]
    }


def live_bytes():
    gc.collect()
    return sum(obj.nbytes for obj in gc.get_objects() if type(obj) is torch.Tensor)


class Observed:
    """What really happens in a denoiser: the batches that reach its first layer, the attention layers that compute."""

    def __init__(self, tiny):
        self.batches, self.computed = [], Counter()
        denoiser = tiny.denoiser
        first = denoiser.conv_in if hasattr(denoiser, "conv_in") else denoiser.pos_embed
        frames = tiny.kwargs().get("num_frames", 1)
        first.register_forward_pre_hook(lambda module, args: self.batches.append(args[0].shape[0] // frames))
        cross = cross_attention_layers(denoiser)
        for name, layer in attention_layers(denoiser).items():
            kind = "cross" if name in cross else "self"
            layer.to_k.register_forward_hook(lambda *_, kind=kind: self.computed.update([kind]))


@cache
def num_layers(family):
    """How many cross- and self-attention layers a family's denoiser has."""
    denoiser = tiny(family).denoiser
    cross = len(cross_attention_layers(denoiser))
    return cross, len(attention_layers(denoiser)) - cross
