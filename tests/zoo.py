"""A tiny pipeline of every class that is known, built from diffusers' own classes, and a call of it."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from at_hand import Entries


@dataclass(frozen=True)
class Entry:
    """How a pipeline class is built and called.

    Args:
        build: Makes the pipeline; its weights are random.
        call: The arguments for a list of pictures, each known by its number: picture 3 has the same inputs alone and
            in a batch. Among them are `num_inference_steps=STEPS` and what makes the result latents.
        branches: Size of the batch that the denoiser is given for one picture, or its calls in a step.
    """

    build: Callable[[], Any]
    call: Callable[[list[int]], dict[str, Any]]
    branches: int = 2


STEPS = 4
ENTRIES = Entries()


def register(name: str, build: Callable[[], Any], call: Callable[[list[int]], dict[str, Any]], branches: int = 2):
    ENTRIES.add(name, Entry(build, call, branches), needs=class_of(name))


def of_pictures(pictures: list[int], *shape: int, kind: int = 0) -> torch.Tensor:
    """Noise of each picture, `(len(pictures), *shape)`; `kind` tells a picture's several inputs apart."""
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(1000 * kind + p)) for p in pictures]
    return torch.stack(noise)


def images(pictures: list[int], height: int, width: int, kind: int = 50) -> torch.Tensor:
    """A picture from 0 to 1, `(len(pictures), 3, height, width)`."""
    return of_pictures(pictures, 3, height, width, kind=kind).sigmoid()


def generators(pictures: list[int]) -> list[torch.Generator]:
    """For pipelines that draw their own noise: the same for a picture alone and in a batch."""
    return [torch.Generator().manual_seed(p) for p in pictures]


def seeded(build: Callable[[], Any]) -> Any:
    """What `build` makes, always with the same weights, ready to run."""
    torch.manual_seed(0)
    pipe = build()
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval().requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(cls: Any, **components: Any) -> Any:
    """A pipeline from these components; those that it needs and a call with embeddings does not are None."""
    parameters = inspect.signature(cls.__init__).parameters
    missing = {
        name: None
        for name, parameter in parameters.items()
        if name != "self" and parameter.default is inspect.Parameter.empty and name not in components
    }
    if "requires_safety_checker" in parameters:
        missing |= {"requires_safety_checker": False}
    if "add_watermarker" in parameters:
        missing |= {"add_watermarker": False}
    return cls(**missing, **components)


def wake(network: torch.nn.Module, std: float = 0.1) -> torch.nn.Module:
    """Parameters that training would begin at zero, such as a ControlNet's last convolutions, do something."""
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=std)
    return network


def class_of(name: str) -> str:
    """The class of an entry; what stands in brackets behind it is a way to call it."""
    return name.split(" (")[0]
