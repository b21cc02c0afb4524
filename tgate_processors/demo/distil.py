"""Teach an embedded model to draw in four steps: `python -m tgate_processors.demo.distil --out DIR`.

The result is a latent-consistency model (Luo et al. 2023, https://arxiv.org/abs/2310.04378) in a LoRA, as in LCM-LoRA
(https://arxiv.org/abs/2311.05556). From every timestep of a run it predicts the clean latents that the run ends with.
The model without the LoRA is the teacher. Its guided runs are drawn first and kept, and the student learns their final
latents. In these papers the student learns what it predicts itself one timestep later, which takes a longer training.

You can stop it and start it again, as with `demo.train`. It needs `peft`.
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


CHUNK = 64  # runs of the teacher per file
LATENTS = (LATENT_CHANNELS, RESOLUTION // SCALE, RESOLUTION // SCALE)
STRIDE = 1000 // TEACHER_STEPS  # timesteps between two steps of the teacher
USED_SETTINGS = ("peft_type", "inference_mode", "r", "lora_alpha", "target_modules")  # kept in its config
HUBER = 1e-3  # error below which the loss is nearly quadratic


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.distil", description=__doc__)
    add_options(parser, steps=500, batch=24, learning_rate=1e-3)
    parser.add_argument("--model", choices=RECIPES, default="sd")
    parser.add_argument("--teacher", help="folder of a pipeline to learn from (default: the embedded model)")
    parser.add_argument("--runs", type=int, default=2048, help=f"number of the teacher's runs, a multiple of {CHUNK}")
    parser.add_argument("--guidance-scale", type=float, help="guidance scale to learn (default: the model's own)")
    parser.add_argument("--rank", type=int, default=12, help="rank of the LoRA")
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
        averaging=0.99,  # the training is short, so an average must forget early weights soon
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
    """Return the teacher's timesteps, the noisiest first -> (steps,). `LCMScheduler` draws with some of them."""
    return torch.arange(TEACHER_STEPS, 0, -1) * STRIDE - 1


def make_runs(
    folder: Path, recipe: Recipe, teacher: DiffusionPipeline, guidance: float, seed: int, chunks: int
) -> dict[str, Tensor]:
    """Return runs of the teacher, which `folder` keeps for later trainings.

    Returns:
        `states`, the latents at the start of each step (runs, steps, channels, height, width); `clean`, the latents at
        the end of the run (runs, channels, height, width); and `tokens` (runs, tokens).
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
    """Return deterministic (DDIM) runs of the teacher from noise, in the form of `make_runs`, on the CPU."""
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
    """Return the teacher's denoiser with a LoRA on every linear and convolutional layer."""
    torch.manual_seed(seed)
    denoiser = getattr(teacher, recipe.denoiser)
    layers = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    return get_peft_model(denoiser, LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))


def student_trainer(
    recipe: Recipe, networks: nn.ModuleDict, runs: dict[str, Tensor], settings: Settings, out: Path
) -> Trainer:
    """Return the trainer of the denoiser's LoRA, which learns from runs of the teacher."""
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
    """Return the Huber loss between the clean latents that the student predicts and those that the run ends with.

    `LCMScheduler` adds less than 1e-5 of the noised latents to the prediction. The loss leaves this out.
    """
    error = _clean(scheduler, noised, timesteps, recipe.velocity(networks, noised, timesteps, words)) - clean
    return ((error.square() + HUBER**2).sqrt() - HUBER).mean()


def _clean(scheduler: DDIMScheduler, noised: Tensor, timesteps: Tensor, velocity: Tensor) -> Tensor:
    """Return the clean latents that a predicted velocity implies."""
    signal, noise = _shares(scheduler, timesteps)
    return signal * noised - noise * velocity


def _ddim_step(scheduler: DDIMScheduler, noised: Tensor, now: Tensor, then: Tensor, velocity: Tensor) -> Tensor:
    """Return the latents at the timesteps `then`. Before the first timestep they are clean."""
    (signal, noise), (signal_then, noise_then) = _shares(scheduler, now), _shares(scheduler, then)
    stepped: Tensor = signal_then * _clean(scheduler, noised, now, velocity) + noise_then * (
        noise * noised + signal * velocity
    )
    return stepped


def _shares(scheduler: DDIMScheduler, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of signal and of noise in the latents at these timesteps -> (batch, 1, 1, 1) each."""
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps.clamp(0)]
    kept = torch.where(timesteps < 0, 1.0, kept).view(-1, 1, 1, 1)
    return kept.sqrt(), (1 - kept).sqrt()


def save_adapter(folder: Path, network: nn.Module) -> None:
    """Write the LoRA alone, in half precision. The network itself stays as it is."""
    adapted = copy.deepcopy(network).half()
    assert isinstance(adapted, PeftModel)
    adapted.save_pretrained(str(folder))
    (folder / "README.md").unlink()  # an empty template
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text())
    settings["target_modules"].sort()
    # only settings with a use, because an older peft warns about names that it does not know
    config.write_text(json.dumps({name: settings[name] for name in USED_SETTINGS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
