"""Teaches one of the demo's models to draw in four steps: `python -m tgate_processors.demo.distil --out DIR`.

Latent consistency distillation (Luo et al. 2023, https://arxiv.org/abs/2310.04378), into a LoRA as in LCM-LoRA
(https://arxiv.org/abs/2311.05556): the model without its adapter is the teacher, and guidance of one scale is learnt
with it. Stops and starts as training does. It needs `peft`.
"""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from tgate_processors.demo.model import WEIGHTS, build_scheduler
from tgate_processors.demo.train import RECIPES, Recipe, make_pool, tokenize
from tgate_processors.demo.trainer import Settings, Trainer, add_options, processes, rank, share


STRIDE = 20  # timesteps that the teacher goes at once: `LCMScheduler` knows 50 of the 1000
HUBER = 1e-3  # the distance below which an error counts as its square


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.distil", description=__doc__)
    add_options(parser, steps=1500, batch=24, learning_rate=5e-4)
    parser.add_argument("--model", choices=RECIPES, default="sd")
    parser.add_argument("--teacher", type=Path, default=WEIGHTS, help="folder of the pipeline to learn from")
    parser.add_argument("--guidance-scale", type=float, default=5.0, help="the one that is learnt")
    parser.add_argument("--rank", type=int, default=32, help="of the adapter")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    recipe = RECIPES[options.model]
    settings = Settings(
        steps=options.steps, batch=options.batch, learning_rate=options.learning_rate, seed=options.seed
    )
    with processes(options.device, options.threads):
        teacher = DiffusionPipeline.from_pretrained(options.teacher, local_files_only=True, low_cpu_mem_usage=False)
        teacher.to(options.device)
        latents, tokens = make_pool(options.out / "pool", teacher.vae, teacher.tokenizer, options.seed)
        networks = student(recipe, teacher, options.rank, options.seed)
        trainer = student_trainer(recipe, networks, latents, tokens, settings, options.out, options.guidance_scale)
        trainer.run(options.until)
        if rank() == 0:
            save_adapter(options.out / "adapter", trainer.averaged)


def student(recipe: Recipe, teacher: DiffusionPipeline, rank: int, seed: int) -> nn.ModuleDict:
    """The teacher's text encoder, and its denoiser with an adapter on every layer."""
    torch.manual_seed(seed)
    denoiser = getattr(teacher, recipe.denoiser)
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    adapted = get_peft_model(denoiser, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
    return nn.ModuleDict({"text_encoder": teacher.text_encoder.requires_grad_(False), recipe.denoiser: adapted})


def student_trainer(
    recipe: Recipe,
    networks: nn.ModuleDict,
    latents: Tensor,
    tokens: Tensor,
    settings: Settings,
    out: Path,
    guidance: float,
) -> Trainer:
    """Trains the adapter on a pool of latents and their captions' tokens."""
    denoiser = networks[recipe.denoiser]
    device = next(denoiser.parameters()).device
    scheduler, blank = build_scheduler(), tokenize(recipe.build_tokenizer(), [""]).to(device)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (settings.batch,), generator=generator)
        noise = torch.randn(settings.batch, *latents.shape[1:], generator=generator)
        timesteps = STRIDE * torch.randint(1, 1000 // STRIDE + 1, (settings.batch,), generator=generator) - 1
        batch = (share(part).to(device) for part in (latents[rows], noise, timesteps, tokens[rows]))
        return consistency_loss(recipe, networks, scheduler, guidance, blank, *batch)

    return Trainer(denoiser, loss, settings, out / "checkpoints" / "adapter.ckpt")


def consistency_loss(
    recipe: Recipe,
    networks: nn.ModuleDict,
    scheduler: DDIMScheduler,
    guidance: float,
    blank: Tensor,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    words: Tensor,
) -> Tensor:
    """How far the clean latents that are seen from two neighbouring timesteps are apart: a Huber loss.

    At the first timestep the target is what the teacher sees: the boundary condition. At the others `LCMScheduler`
    adds less than 1e-5 of the noised latents to what is seen, which is left out here.
    """
    noised = scheduler.add_noise(latents, noise, timesteps)
    earlier = timesteps - STRIDE
    with torch.no_grad():
        negative, positive = _taught(recipe, networks, noised, timesteps, words, blank).chunk(2)
        velocity = negative + guidance * (positive - negative)
        less_noised = _ddim_step(scheduler, noised, timesteps, earlier, velocity)
        is_clean = earlier.lt(0).view(-1, 1, 1, 1)
        seen = _clean(scheduler, less_noised, earlier, recipe.velocity(networks, less_noised, earlier.clamp(0), words))
        target = torch.where(is_clean, less_noised, seen)
    error = _clean(scheduler, noised, timesteps, recipe.velocity(networks, noised, timesteps, words)) - target
    return ((error.square() + HUBER**2).sqrt() - HUBER).mean()


def _taught(
    recipe: Recipe, networks: nn.ModuleDict, noised: Tensor, timesteps: Tensor, words: Tensor, blank: Tensor
) -> Tensor:
    """What the teacher predicts of the empty captions, and then of the given ones."""
    denoiser = networks[recipe.denoiser]
    assert isinstance(denoiser, PeftModel)
    with denoiser.disable_adapter():
        both, times = torch.cat([noised, noised]), torch.cat([timesteps, timesteps])
        return recipe.velocity(networks, both, times, torch.cat([blank.expand_as(words), words]))


def _clean(scheduler: DDIMScheduler, noised: Tensor, timesteps: Tensor, velocity: Tensor) -> Tensor:
    """The clean latents, of what is predicted at some timesteps."""
    signal, noise = _shares(scheduler, timesteps)
    return signal * noised - noise * velocity


def _ddim_step(scheduler: DDIMScheduler, noised: Tensor, now: Tensor, then: Tensor, velocity: Tensor) -> Tensor:
    """The latents at other timesteps; those before the first are clean."""
    (signal, noise), (signal_then, noise_then) = _shares(scheduler, now), _shares(scheduler, then)
    stepped: Tensor = signal_then * _clean(scheduler, noised, now, velocity) + noise_then * (
        noise * noised + signal * velocity
    )
    return stepped


def _shares(scheduler: DDIMScheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """How much of the signal and of the noise is in the latents at some timesteps -> (batch, 1, 1, 1) each."""
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps.clamp(0)]
    kept = torch.where(timesteps < 0, 1.0, kept).view(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


def save_adapter(folder: Path, network: nn.Module) -> None:
    """Writes the adapter alone, in half precision; the network stays as it is."""
    adapted = copy.deepcopy(network).half()
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink()  # a form to fill in


if __name__ == "__main__":
    main()
