"""What the gate costs in meaning on the demo's model: `python -m tgate_processors.demo.tradeoff`.

Draws the same held-out prompts with the stock pipeline, with the gate closing after some of the steps, and, as a
control, with guidance dropped after as many steps and cross-attention still computed: what both lose is not the cached
attention's doing. Prints also how much cross-attention changes from step to step.
"""

import argparse
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from tgate_processors.demo.checker import ATTRIBUTES
from tgate_processors.demo.evaluate import adherence, generate, held_out_scenes
from tgate_processors.demo.model import load_demo_pipeline
from tgate_processors.demo.world import caption
from tgate_processors.handle import apply_tgate
from tgate_processors.layers import cross_attention_layers
from tgate_processors.schedule import TGateConfig, format_table


def drop_guidance(after: int) -> dict[str, Any]:
    """Arguments of a call that go on with the positive branch, without guidance, after `after` steps."""

    def callback(pipe: Any, step_index: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step_index + 1 == after:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


def cross_attention_change(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], **call_kwargs: Any) -> Tensor:
    """Relative change of cross-attention's outputs since the step before -> (steps - 1,), the median over layers."""
    outputs: list[list[Tensor]] = []
    layers = cross_attention_layers(pipe.unet).values()
    hooks = [pipe.unet.register_forward_pre_hook(lambda *_: outputs.append([]))]
    hooks += [layer.register_forward_hook(lambda *args: outputs[-1].append(args[-1])) for layer in layers]
    try:
        generate(pipe, prompts, seeds, batch_size=len(prompts), **call_kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    changes = [list(map(_relative, now, before)) for before, now in pairwise(outputs)]
    return torch.tensor(changes).median(1).values


def _relative(now: Tensor, before: Tensor) -> float:
    return float((now - before).norm() / before.norm())


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    pipe = load_demo_pipeline().to(options.device)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(options.prompts, options.seed)
    prompts = [caption(scene) for scene in scenes]
    seeds = range(options.seed, options.seed + len(prompts))
    settings = {"num_inference_steps": options.steps, "guidance_scale": options.guidance}
    rows: list[tuple[str, ...]] = [("", *ATTRIBUTES, "all", "seconds a picture")]

    def measure(name: str, **changes: Any) -> None:
        started, pictures = time.perf_counter(), []
        for start in tqdm(range(0, len(prompts), 32), desc=name):
            chunk = slice(start, start + 32)
            pictures.append(generate(pipe, prompts[chunk], seeds[chunk], **settings | changes))
        seconds = (time.perf_counter() - started) / len(prompts)
        shares = adherence(torch.cat(pictures), scenes)
        whole = shares.pop("all")
        rows.append((name, *(f"{s.mean:.1%}" for s in shares.values()), str(whole).strip(), f"{seconds:.3f}"))

    measure("stock")
    for gate_step in options.gate_steps:
        with apply_tgate(pipe, TGateConfig(gate_step=gate_step)) as tgate:
            measure(f"gate step {gate_step}", callback_on_step_end=tgate)
        measure(f"guidance dropped after {gate_step}", **drop_guidance(gate_step))
    for steps in options.fewer_steps:
        measure(f"{steps} steps", num_inference_steps=steps)
    print(f"{len(prompts)} held-out prompts, {options.steps} steps, guidance {options.guidance:g}")
    print(format_table(rows))
    change = cross_attention_change(pipe, prompts[:16], seeds[:16], **settings)
    print("change of cross-attention since the step before, from step 1 on:")
    print(" ".join(f"{value:.3f}" for value in change.tolist()))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.tradeoff", description=__doc__)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument("--gate-steps", type=int, nargs="*", default=[5, 10, 15])
    parser.add_argument("--fewer-steps", type=int, nargs="*", default=[5])
    parser.add_argument("--seed", type=int, default=0, help="of the prompts; picture i has the seed `seed + i`")
    parser.add_argument("--device", default="cpu")
    return parser


if __name__ == "__main__":
    main()
