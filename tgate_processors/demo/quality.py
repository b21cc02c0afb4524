"""Measure what each method costs in accuracy on an embedded model: `tgate-processors quality`."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tgate_processors._validation import require_whole
from tgate_processors.demo.checker import ATTRIBUTES, read
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.render import render
from tgate_processors.demo.world import caption
from tgate_processors.measure.likeness import FrechetDistance
from tgate_processors.measure.quality import chosen_ways, compare, draw, papers_gate, under_samplers
from tgate_processors.measure.quality_report import Quality, Report
from tgate_processors.schedule import TGateConfig


BATCH = 32
SAMPLERS = ("dpm++-2m-karras", "euler-a")  # default: one without fresh noise in each step, and one with


def quality_of_demo(
    pipe: Any,
    name: str,
    *,
    count: int,
    seed: int,
    num_inference_steps: int,
    samplers: Sequence[str] = SAMPLERS,
    only: Sequence[str] = (),
    **call_kwargs: Any,
) -> Quality:
    """Draw held-out prompts with each method and check the pictures, with a progress bar.

    Args:
        pipe: Pipeline of an embedded model, without a gate.
        name: Name of the model.
        count: Number of prompts.
        seed: Seed of the prompts. Picture i starts from the noise of `seed + i`.
        num_inference_steps: Number of steps in the stock run, at least 5.
        samplers: Keys of `tgate_processors.measure.samplers.SAMPLERS`.
        only: Parts of the names of the methods to run. If empty, all run that are not extra. The stock pipeline always
            runs.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: An argument breaks its rule, or `only` or `samplers` has an unknown name.
        MissingPackageError: `torchmetrics` or `scipy` is not installed.
    """
    require_whole("count", count, least=2)
    TGateConfig(gate_step="auto").schedule(num_inference_steps)  # raises if these are too few
    chosen = chosen_ways(num_inference_steps, only, has_unet=hasattr(pipe, "unet"))
    scenes = held_out_scenes(count, seed)
    prompts = [caption(scene) for scene in scenes]
    frechet = FrechetDistance((render(scenes, torch.Generator().manual_seed(seed)) + 1) / 2, Latents(pipe.vae))

    def arguments(chunk: slice) -> dict[str, Any]:
        generators = [torch.Generator().manual_seed(seed + index) for index in range(chunk.start, chunk.stop)]
        return {
            **call_kwargs,
            "prompt": prompts[chunk],
            "generator": generators,
            "num_inference_steps": num_inference_steps,
        }

    def score(pictures: Tensor, _: Tensor) -> Mapping[str, Tensor]:
        reading = read(pictures * 2 - 1, scenes)
        by_attribute = {
            name: reading.right[:, index][reading.named[:, index]]
            for index, name in enumerate(ATTRIBUTES)
            if reading.named[:, index].any()  # a few prompts may all be without a relation
        }
        return {**by_attribute, "accuracy": reading.whole}

    dtype = str(pipe.dtype).removeprefix("torch.")
    settings = {
        "model": name,
        "prompts": count,
        "steps": num_inference_steps,
        **call_kwargs,
        "seed": seed,
        "dtype": dtype,
    }
    with tqdm(total=len(samplers) * len(chosen) * count, desc="drawing", unit="picture", disable=None) as bar:

        def under(sampler: str) -> Report:
            return compare(
                chosen,
                lambda way: draw(pipe, way, count, arguments, batch_size=BATCH, bar=bar),
                score,
                "accuracy",
                sampler,
                frechet=frechet,
                papers=papers_gate(num_inference_steps, has_unet=hasattr(pipe, "unet")),
                settings=settings,
            )

        return under_samplers(pipe, samplers, under, settings)


class Latents(torch.nn.Module):
    """Features for a Fréchet distance: the autoencoder's latents, averaged over the cells of a 4 x 4 grid."""

    num_features = 64

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = copy.deepcopy(vae).float().cpu()  # on the pictures' device; the pipeline may have less precision

    def forward(self, pictures: Tensor) -> Tensor:
        """Return the features of pictures `(count, 3, height, width)` in 0..1 -> `(count, 64)`."""
        means = [self.vae.encode(part * 2 - 1).latent_dist.mean for part in torch.split(pictures, BATCH)]
        return torch.nn.functional.adaptive_avg_pool2d(torch.cat(means), 4).flatten(1)
