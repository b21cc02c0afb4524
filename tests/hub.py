"""The hub as the documentation's examples meet it: every name gives a tiny pipeline, of the class that is asked.

A prompt, or a picture, is replaced by the inputs that the tiny pipeline's own tests give it.
"""

import functools

import diffusers
import every  # noqa: F401  # registers its pipelines
import torch
import zoo_unets
from adapters import load_ip_adapters, lora, with_images
from PIL import Image
from zoo import ENTRIES, class_of, seeded
from zoo_modular import MODULAR


REPLACED = ("ip_adapter_image", "image", "generator")  # by what the tiny pipeline is given
MODELS = {
    "latent-consistency/lcm-sdxl": lambda: zoo_unets.unet(**zoo_unets.XL, time_cond_proj_dim=8),
    "diffusers/controlnet-canny-sdxl-1.0": lambda: zoo_unets.controlnet(**zoo_unets.XL_CONTROL),
}


def from_hub(cls, name, **components):
    """`cls.from_pretrained`."""
    assert "/" in name
    if cls is diffusers.AutoPipelineForImage2Image:
        cls = diffusers.StableDiffusionXLImg2ImgPipeline
    pipe = seeded(ENTRIES[cls.__name__].build)
    assert type(pipe) is cls
    pipe.register_modules(**{n: part for n, part in components.items() if isinstance(part, torch.nn.Module)})
    return pipe


def model_from_hub(cls, name, **_):
    model = MODELS[name]().eval().requires_grad_(False)
    assert isinstance(model, cls)
    return model


def called(stock_call):
    """A pipeline's `__call__` that takes the prompt of an example."""

    @functools.wraps(stock_call)  # its signature says whether it takes a callback
    def call(pipe, *given, **kwargs):
        assert given
        pictures = [*given[1:], *(value for name, value in kwargs.items() if name in ("image", "ip_adapter_image"))]
        assert all(isinstance(picture, Image.Image) for picture in pictures)
        inputs = ENTRIES[type(pipe).__name__].call([0])
        for name in ("num_inference_steps", "return_dict"):
            inputs.pop(name, None)
        if "ip_adapter_image" in kwargs:
            inputs = with_images(inputs)
        return stock_call(pipe, **inputs | {n: v for n, v in kwargs.items() if n not in REPLACED})

    return call


def called_modular(stock_call):
    """The same of a modular pipeline."""

    def call(pipe, *, prompt, output, **kwargs):
        return stock_call(pipe, **MODULAR["StableDiffusionXL"].call([0]) | kwargs)

    return call


def connect(monkeypatch):
    """Put this in the place of the hub, of an accelerator and of inductor."""
    torch._dynamo.reset()  # of the graphs of other tests
    for cls in {getattr(diffusers, class_of(name)) for name in ENTRIES}:
        monkeypatch.setattr(cls, "__call__", called(cls.__call__))
    monkeypatch.setattr(
        diffusers.ModularPipeline, "from_pretrained", lambda name: MODULAR["StableDiffusionXL"].build()
    )
    monkeypatch.setattr(diffusers.ModularPipeline, "load_components", lambda pipe, **_: None)
    monkeypatch.setattr(diffusers.ModularPipeline, "to", lambda pipe, *_, **__: pipe)
    monkeypatch.setattr(diffusers.ModularPipeline, "__call__", called_modular(diffusers.ModularPipeline.__call__))
    for cls in (diffusers.DiffusionPipeline, diffusers.AutoPipelineForImage2Image):
        monkeypatch.setattr(cls, "from_pretrained", classmethod(from_hub))
    monkeypatch.setattr(diffusers.ModelMixin, "from_pretrained", classmethod(model_from_hub))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "to", lambda pipe, *_, **__: pipe)
    offloads = functools.partialmethod(diffusers.DiffusionPipeline.enable_model_cpu_offload, device="cpu")
    monkeypatch.setattr(diffusers.DiffusionPipeline, "enable_model_cpu_offload", offloads)
    compiles = functools.partialmethod(torch.nn.Module.compile, backend="eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compiles)
    monkeypatch.setattr(diffusers.utils, "load_image", lambda name: Image.new("RGB", (16, 16)))
    xl = diffusers.StableDiffusionXLPipeline
    load_lora, load_adapter = xl.load_lora_weights, xl.load_ip_adapter

    def load_named_adapter(pipe, name, **where):
        if isinstance(name, str):
            load_ip_adapters(pipe)
        else:
            load_adapter(pipe, name, **where)

    monkeypatch.setattr(xl, "load_lora_weights", lambda pipe, name, weight_name: load_lora(pipe, lora(pipe)))
    monkeypatch.setattr(xl, "load_ip_adapter", load_named_adapter)
