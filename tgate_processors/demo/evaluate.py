"""Measure how well an embedded model follows prompts: `python -m tgate_processors.demo.evaluate --model sd`.

The prompts hold combinations that training never showed. Each picture has its own seed, so two methods draw from the
same noise, whatever the batch size.
"""

import argparse
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from tgate_processors._pipelines import takes_callback
from tgate_processors.demo.checker import ATTRIBUTES, Reading, read
from tgate_processors.demo.embedded import EMBEDDED, load_demo_pipeline
from tgate_processors.demo.world import Scene, caption, sample_scenes
from tgate_processors.handle import apply_tgate
from tgate_processors.schedule import TGateConfig


BATCH = 32  # pictures


@dataclass(frozen=True)
class Share:
    """Share of correct pictures and its standard error, both 0..1, over `count` pictures."""

    mean: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:6.1%} +- {self.error:.1%}"


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    """Return `count` scenes with a combination that training never showed. A longer list begins with a shorter one."""
    generator = torch.Generator().manual_seed(seed)
    return [sample_scenes(1, generator, held_out=True)[0] for _ in range(count)]


def generate(pipe: DiffusionPipeline, prompts: Sequence[str], seeds: Sequence[int], **call_kwargs: Any) -> Tensor:
    """Draw one picture for each prompt -> (prompts, 3, height, width) in -1..1 on the CPU.

    Args:
        pipe: Pipeline that draws.
        prompts: Prompt of each picture.
        seeds: Seed of each picture, on which alone its first noise depends.
        call_kwargs: Arguments of the pipeline's call. `batch_size` (default 64) is the number of prompts in a call.

    Raises:
        ValueError: The number of seeds is not the number of prompts.
    """
    if len(prompts) != len(seeds):
        raise ValueError(
            f"`seeds` must be as many as the prompts, got {len(seeds)} for {len(prompts)}; pass one for each."
        )
    size = int(call_kwargs.pop("batch_size", 64))
    pictures = []
    for start in range(0, len(prompts), size):
        chunk = slice(start, start + size)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[chunk]]
        made = pipe(prompt=list(prompts[chunk]), generator=noise, output_type="pt", **call_kwargs).images
        pictures.append(made.cpu().float() * 2 - 1)
    return torch.cat(pictures)


def adherence(pictures: Tensor, scenes: Sequence[Scene]) -> dict[str, Share]:
    """Return how often each attribute is correct if it is named and, as "all", how often all of them are."""
    reading = read(pictures, scenes)
    shares = {name: _attribute(reading, index) for index, name in enumerate(ATTRIBUTES)}
    return {**shares, "all": _share(reading.whole)}


def _attribute(reading: Reading, index: int) -> Share:
    return _share(reading.right[:, index][reading.named[:, index]])


def _share(right: Tensor) -> Share:
    mean = float(right.float().mean())
    return Share(mean, math.sqrt(mean * (1 - mean) / max(1, len(right))), len(right))


def table(shares: dict[str, Share]) -> str:
    """Return a line of text for each attribute."""
    return "\n".join(f"{name:<12}{share}" for name, share in shares.items())


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.evaluate", description=__doc__)
    parser.add_argument("--model", default="sd", help=f"{', '.join(EMBEDDED)}, or the folder of a trained model")
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, help="number of denoising steps (default: the model's own)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's own)")
    parser.add_argument("--gate-step", type=int, help="step at which the gate closes (default: no gate)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the prompts; picture i has the seed `seed + i`")
    parser.add_argument("--device", default="cpu")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    pipe = load_demo_pipeline(options.model).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    own = EMBEDDED.get(options.model) or EMBEDDED["pixart" if hasattr(pipe, "transformer") else "sd"]
    given = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    call = {**own.call, **{name: value for name, value in given.items() if value is not None}}
    scenes = held_out_scenes(options.prompts, options.seed)
    if options.gate_step is not None:
        tgate = apply_tgate(pipe, TGateConfig(gate_step=options.gate_step))
        call |= {"callback_on_step_end": tgate} if takes_callback(pipe) else {}
    started, pictures = time.perf_counter(), []
    for start in tqdm(range(0, len(scenes), BATCH), desc="pictures"):
        prompts = [caption(scene) for scene in scenes[start : start + BATCH]]
        seeds = range(options.seed + start, options.seed + start + len(prompts))
        pictures.append(generate(pipe, prompts, seeds, **call))
    seconds = (time.perf_counter() - started) / len(scenes)
    steps, guidance = call["num_inference_steps"], call["guidance_scale"]
    gate = "" if options.gate_step is None else f", gate step {options.gate_step}"
    print(f"{options.model}: {len(scenes)} held-out prompts, {steps} steps, guidance {guidance:g}{gate}")
    print(table(adherence(torch.cat(pictures), scenes)))
    print(f"{seconds:.2f} seconds a picture")


if __name__ == "__main__":
    main()
