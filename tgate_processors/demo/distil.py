"""Teaches one of the demo's models to draw in four steps: `python -m tgate_processors.demo.distil --out DIR`.

A latent-consistency model (Luo et al. 2023, https://arxiv.org/abs/2310.04378) in a LoRA, as LCM-LoRA
(https://arxiv.org/abs/2311.05556): from every timestep of a run it sees the clean latents that the run ends in. The
model without its adapter is the teacher. Its guided runs are drawn first and kept, so the student learns what they end
in, and not what it sees itself a timestep further, as in these papers: that takes a longer training.
Stops and starts as training does. It needs `peft`.
"""

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from tqdm import tqdm

from tgate_processors.demo.embedded import EMBEDDED, TEACHER_STEPS, load_demo_pipeline
from tgate_processors.demo.model import LATENT_CHANNELS, SCALE, build_scheduler
from tgate_processors.demo.train import RECIPES, Recipe, tokenize
from tgate_processors.demo.trainer import Settings, Trainer, add_options, processes, rank, share, step_generator
from tgate_processors.demo.world import RESOLUTION, caption, sample_scenes


CHUNK = 64  # runs of the teacher in a file
LATENTS = (LATENT_CHANNELS, RESOLUTION // SCALE, RESOLUTION // SCALE)
STRIDE = 1000 // TEACHER_STEPS  # timesteps that the teacher goes at once
USED_SETTINGS = ("peft_type", "inference_mode", "r", "lora_alpha", "target_modules")  # of the adapter
HUBER = 1e-3  # the distance below which an error counts as its square


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.distil", description=__doc__)
    add_options(parser, steps=500, batch=24, learning_rate=1e-3)
    parser.add_argument("--model", choices=RECIPES, default="sd")
    parser.add_argument("--teacher", help="the folder of a pipeline to learn from, in the place of the embedded one")
    parser.add_argument("--runs", type=int, default=2048, help=f"of the teacher, a multiple of {CHUNK}")
    parser.add_argument("--guidance-scale", type=float, help="the one that is learnt, in the place of the model's own")
    parser.add_argument("--rank", type=int, default=12, help="of the adapter")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    recipe = RECIPES[options.model]
    settings = Settings(
        steps=options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
        warm_up=50,
        averaging=0.99,  # a short training: what it knew a thousand steps ago is no help
    )
    with processes(options.device, options.threads):
        teacher = load_demo_pipeline(options.teacher or options.model).to(options.device)
        guidance, chunks = options.guidance_scale, options.runs // CHUNK
        if guidance is None:
            guidance = EMBEDDED[options.model].call["guidance_scale"]
        runs = make_runs(options.out / "runs", recipe, teacher, guidance, options.seed, chunks)
        denoiser = student(recipe, teacher, options.rank, options.seed)
        networks = nn.ModuleDict({"text_encoder": teacher.text_encoder, recipe.denoiser: denoiser})
        trainer = student_trainer(recipe, networks, runs, settings, options.out)
        trainer.run(options.until)
        if rank() == 0:
            save_adapter(options.out / "adapter", trainer.averaged)


def timesteps_of_a_run() -> Tensor:
    """The teacher's, the noisiest first; `LCMScheduler` draws with some of them -> (steps,)."""
    return torch.arange(TEACHER_STEPS, 0, -1) * STRIDE - 1


def make_runs(
    folder: Path, recipe: Recipe, teacher: DiffusionPipeline, guidance: float, seed: int, chunks: int
) -> dict[str, Tensor]:
    """Runs of the teacher, kept in `folder`.

    -> states (runs, steps, channels, height, width), the latents that each step begins with; clean (runs, channels,
    height, width), those that the run ends in; tokens (runs, tokens).
    """
    folder.mkdir(parents=True, exist_ok=True)
    networks = nn.ModuleDict({name: getattr(teacher, name) for name in ("text_encoder", recipe.denoiser)})
    for index in tqdm(share(torch.arange(chunks)).tolist(), desc="runs", disable=rank() > 0):
        path = folder / f"{index:03}.safetensors"
        if not path.is_file():
            generator = step_generator(seed, "runs", index)
            captions = [caption(scene) for scene in sample_scenes(CHUNK, generator)]
            tokens = tokenize(teacher.tokenizer, captions)
            noise = torch.randn(CHUNK, *LATENTS, generator=generator)
            blank = tokenize(teacher.tokenizer, [""])
            save_file(draw_runs(recipe, networks, noise, tokens, blank, guidance), path)
    if distributed.is_initialized():
        distributed.barrier()
    files = [load_file(folder / f"{index:03}.safetensors") for index in range(chunks)]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]}


@torch.no_grad()
def draw_runs(
    recipe: Recipe, networks: nn.ModuleDict, noise: Tensor, tokens: Tensor, blank: Tensor, guidance: float
) -> dict[str, Tensor]:
    """Deterministic runs of the teacher (DDIM) from noise, as `make_runs` has them, on the CPU."""
    device = next(networks.parameters()).device
    scheduler, latents = build_scheduler(), noise.to(device)
    words = torch.cat([blank.expand_as(tokens), tokens]).to(device)
    states = []
    for timestep in timesteps_of_a_run().to(device):
        states.append(latents)
        now = timestep.expand(len(latents))
        negative, positive = recipe.velocity(networks, torch.cat([latents] * 2), now.repeat(2), words).chunk(2)
        latents = _ddim_step(scheduler, latents, now, now - STRIDE, negative + guidance * (positive - negative))
    return {"states": torch.stack(states, 1).cpu(), "clean": latents.cpu(), "tokens": tokens}


def student(recipe: Recipe, teacher: DiffusionPipeline, rank: int, seed: int) -> PeftModel:
    """The teacher's denoiser with an adapter on every layer."""
    torch.manual_seed(seed)
    denoiser = getattr(teacher, recipe.denoiser)
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return get_peft_model(denoiser, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))


def student_trainer(
    recipe: Recipe, networks: nn.ModuleDict, runs: dict[str, Tensor], settings: Settings, out: Path
) -> Trainer:
    """Trains the denoiser's adapter on runs of the teacher."""
    networks["text_encoder"].requires_grad_(False)
    denoiser = networks[recipe.denoiser]
    device = next(denoiser.parameters()).device
    scheduler, timesteps = build_scheduler(), timesteps_of_a_run()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(runs["clean"]), (settings.batch,), generator=generator)
        steps = torch.randint(len(timesteps), (settings.batch,), generator=generator)
        batch = (runs["states"][rows, steps], timesteps[steps], runs["tokens"][rows], runs["clean"][rows])
        return consistency_loss(recipe, networks, scheduler, *(share(part).to(device) for part in batch))

    return Trainer(denoiser, loss, settings, out / "checkpoints" / "adapter.ckpt")


def consistency_loss(
    recipe: Recipe,
    networks: nn.ModuleDict,
    scheduler: DDIMScheduler,
    noised: Tensor,
    timesteps: Tensor,
    words: Tensor,
    clean: Tensor,
) -> Tensor:
    """How far the clean latents that are seen from a timestep are from those of the run's end: a Huber loss.

    `LCMScheduler` adds less than 1e-5 of the noised latents to what is seen, which is left out here.
    """
    error = _clean(scheduler, noised, timesteps, recipe.velocity(networks, noised, timesteps, words)) - clean
    return ((error.square() + HUBER**2).sqrt() - HUBER).mean()


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
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["target_modules"].sort()
    # only the settings that are used: an older peft warns of names that it does not know
    config.write_text(json.dumps({name: settings[name] for name in USED_SETTINGS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
