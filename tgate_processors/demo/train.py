"""Train the embedded models from random weights: `python -m tgate_processors.demo.train --model sd --out DIR`.

You can stop the training and start it again. Checkpoints are in DIR/checkpoints, the finished model in DIR/weights.
Two processes (`torchrun --nproc-per-node 2 -m tgate_processors.demo.train ...`) suit a CPU of two cores, where Stable
Diffusion takes about seventy minutes. The packaged weights were trained this way, with stops. The lessons
(`lesson_rows`) were found during that training. The defaults are the settings that it ended with; no second training
has run them as a whole.
"""

import argparse
import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from tgate_processors.demo import model, pixart
from tgate_processors.demo.autoencoder import BATCH, encode, reconstruction_score, train_vae, vae_loss, vae_settings
from tgate_processors.demo.embedded import load_demo_pipeline
from tgate_processors.demo.model import build_scheduler, build_vae
from tgate_processors.demo.render import render
from tgate_processors.demo.trainer import Settings, Trainer, add_options, processes, rank, share, step_generator
from tgate_processors.demo.world import caption, sample_scenes
from tgate_processors.errors import MissingPackageError


POOL = 48  # chunks of encoded pictures that the denoiser learns from
CHUNK = 1024  # pictures
UNCAPTIONED = 0.12  # share of captions that are replaced by the empty one, for guidance


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one of the models is built and trained.

    Attributes:
        denoiser: Name of the denoiser in the pipeline.
        build_tokenizer, build_text_encoder, build_denoiser, build_pipeline: Functions that build the parts.
        velocity: Function of networks, noised latents, timesteps and token ids that returns the predicted velocity.
        steps: Number of training steps.
        lessons: Steps of each of the two lessons of `lesson_rows`.
        noisy_lessons: Whether three quarters of a lesson's batch have timesteps in the noisiest quarter, which decides
            where things go.
        noisy: Steps in which three quarters of a batch have timesteps in the noisier half, which decides how large
            things are.
    """

    denoiser: str
    build_tokenizer: Callable[[], PreTrainedTokenizerBase]
    build_text_encoder: Callable[[Any], nn.Module]
    build_denoiser: Callable[[], nn.Module]
    build_pipeline: Callable[[AutoencoderKL, Any, Any], DiffusionPipeline]
    velocity: Callable[[nn.ModuleDict, Tensor, Tensor, Tensor], Tensor]
    steps: int
    lessons: tuple[range, range]
    noisy_lessons: bool
    noisy: range = range(0)


RECIPES = {
    "sd": Recipe(
        denoiser="unet",
        build_tokenizer=model.build_tokenizer,
        build_text_encoder=model.build_text_encoder,
        build_denoiser=model.build_unet,
        build_pipeline=model.build_pipeline,
        velocity=model.velocity,
        steps=6250,
        lessons=(range(3750, 4050), range(4050, 4500)),
        noisy_lessons=True,
    ),
    "pixart": Recipe(
        denoiser="transformer",
        build_tokenizer=pixart.build_tokenizer,
        build_text_encoder=pixart.build_text_encoder,
        build_denoiser=pixart.build_transformer,
        build_pipeline=pixart.build_pipeline,
        velocity=pixart.velocity,
        steps=4500,
        lessons=(range(1200), range(1200, 1900)),
        noisy_lessons=False,
        noisy=range(3000, 4000),
    ),
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tgate_processors.demo.train", description=__doc__)
    add_options(parser, steps=None, batch=48, learning_rate=1e-3)
    parser.add_argument("--model", choices=RECIPES, default="sd")
    parser.add_argument("--vae-steps", type=int, default=2600, help="number of training steps of the autoencoder")
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if int(transformers.__version__.split(".")[0]) < 5:
        raise MissingPackageError(
            f"`transformers` must be version 5 or newer to build the tokenizers, got {transformers.__version__}. "
            "Run `pip install -U transformers`."
        )
    recipe = RECIPES[options.model]
    settings = Settings(
        steps=recipe.steps if options.steps is None else options.steps,
        batch=options.batch,
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    with processes(options.device, options.threads):
        if options.model == "sd":
            vae = make_vae(options.out, options.vae_steps, options.seed, options.device)
        else:
            vae = load_demo_pipeline().vae.to(options.device)  # all models share one autoencoder
        latents, tokens = make_pool(options.out / "pool", vae, recipe.build_tokenizer(), options.seed)
        precision = getattr(torch, options.precision)
        trainer = denoiser_trainer(recipe, latents, tokens, settings, options.out, options.device, precision)
        trainer.run(options.until)
        if rank() == 0:
            save_weights(options.out / "weights", recipe, vae, trainer.averaged)


def make_vae(out: Path, steps: int, seed: int, device: str) -> AutoencoderKL:
    torch.manual_seed(seed)
    vae = build_vae().to(device)
    checkpoint = out / "checkpoints" / "vae.ckpt"
    trainer = Trainer(vae, lambda _, g: vae_loss(vae, BATCH, g), vae_settings(steps, seed), checkpoint)
    trained = train_vae(trainer, seed)
    if rank() == 0:
        print(f"reconstructions in which the checker reads every attribute: {reconstruction_score(trained):.1%}")
    return trained


def make_pool(
    folder: Path, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase, seed: int, chunks: int = POOL
) -> tuple[Tensor, Tensor]:
    """Return encoded pictures and captions, which `folder` keeps for later runs.

    Returns:
        Scaled latents (pictures, channels, height, width) and token ids (pictures, tokens).
    """
    folder.mkdir(parents=True, exist_ok=True)
    mine = share(torch.arange(chunks)).tolist()
    for index in tqdm(mine, desc="pool", disable=rank() > 0):
        path = folder / f"{index:03}.safetensors"
        if not path.is_file():
            save_file(_chunk(vae, tokenizer, step_generator(seed, "pool", index)), path)
    if distributed.is_initialized():
        distributed.barrier()
    files = [load_file(folder / f"{index:03}.safetensors") for index in range(chunks)]
    return torch.cat([file["latents"] for file in files]), torch.cat([file["tokens"] for file in files])


def _chunk(vae: AutoencoderKL, tokenizer: PreTrainedTokenizerBase, generator: torch.Generator) -> dict[str, Tensor]:
    scenes = sample_scenes(CHUNK, generator)
    latents = encode(vae, render(scenes, generator)) * vae.config["scaling_factor"]
    return {"latents": latents, "tokens": tokenize(tokenizer, [caption(scene) for scene in scenes])}


def tokenize(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> Tensor:
    """Return the token ids that the pipeline would make -> (captions, tokens)."""
    ids: Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def denoiser_trainer(
    recipe: Recipe,
    latents: Tensor,
    tokens: Tensor,
    settings: Settings,
    out: Path,
    device: str = "cpu",
    precision: torch.dtype = torch.float32,
) -> Trainer:
    """Return the trainer of text encoder and denoiser, which learn together from latents and captions' tokens."""
    torch.manual_seed(settings.seed)
    tokenizer = recipe.build_tokenizer()
    networks = {"text_encoder": recipe.build_text_encoder(tokenizer), recipe.denoiser: recipe.build_denoiser()}
    network = nn.ModuleDict(networks).to(device)
    scheduler, blank = build_scheduler(), tokenize(tokenizer, [""])

    everything, lessons = torch.arange(len(latents)), lesson_rows(tokens, tokenizer)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        taught = [rows for rows, steps in zip(lessons, recipe.lessons, strict=True) if step in steps]
        choice = taught[0] if taught else everything
        rows, noise, timesteps, dropped = draw_batch(settings.batch, latents, generator, choice)
        if taught and recipe.noisy_lessons:
            timesteps[settings.batch // 4 :] = 750 + timesteps[settings.batch // 4 :] // 4
        if step in recipe.noisy:
            timesteps[settings.batch // 4 :] = 500 + timesteps[settings.batch // 4 :] // 2
        words = torch.where(dropped[:, None], blank, tokens[rows])
        batch = (share(part).to(device) for part in (latents[rows], noise, timesteps, words))
        with torch.autocast(torch.device(device).type, precision, enabled=precision != torch.float32):
            return denoising_loss(recipe, network, scheduler, *batch)

    return Trainer(network, loss, settings, out / "checkpoints" / f"{recipe.denoiser}.ckpt")


def lesson_rows(tokens: Tensor, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, Tensor]:
    """Return the rows of the pool for each of the two lessons.

    The model must learn two facts: the first thing is on the left or above, and the words "right" and "below" reverse
    this. It can hardly learn both at once, because one without the other is useless while all four relations are
    equally frequent. So the first lesson has only pairs with "left" or "above". The second lesson has everything
    except two thirds of the pairs with "right" or "below".
    """
    straight, turned = (
        torch.isin(tokens, torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)).any(1)
        for words in ("left above", "right below")
    )
    some = ~turned | (torch.arange(len(tokens)) % 3 == 0)
    return straight.nonzero().flatten(), some.nonzero().flatten()


def draw_batch(
    batch: int, latents: Tensor, generator: torch.Generator, choice: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the random parts of a step: rows out of `choice`, noise, timesteps, and whether a caption is dropped."""
    rows = choice[torch.randint(len(choice), (batch,), generator=generator)]
    noise = torch.randn(batch, *latents.shape[1:], generator=generator)
    timesteps = torch.randint(1000, (batch,), generator=generator)
    return rows, noise, timesteps, torch.rand(batch, generator=generator) < UNCAPTIONED


def denoising_loss(
    recipe: Recipe,
    network: nn.ModuleDict,
    scheduler: DDIMScheduler,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    words: Tensor,
) -> Tensor:
    """Return the mean squared error of the predicted velocity."""
    noised = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.get_velocity(latents, noise, timesteps)
    return functional.mse_loss(recipe.velocity(network, noised, timesteps, words).float(), velocity)


def save_weights(folder: Path, recipe: Recipe, vae: AutoencoderKL, network: nn.Module) -> None:
    """Write the stock pipeline in half precision. The networks themselves stay as they are."""
    vae, network = copy.deepcopy(vae), copy.deepcopy(network)
    for weight in (*vae.parameters(), *network.parameters()):
        weight.data = weight.data.half()
    networks = (network.get_submodule(name) for name in ("text_encoder", recipe.denoiser))
    pipeline = recipe.build_pipeline(vae, *networks)
    pipeline.save_pretrained(folder)
    # transformers loads in the dtype of this file, diffusers in float32, and a pipeline needs one dtype
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"float16"', '"float32"'))
    _let_transformers_4_read_the_tokenizer(folder)
    if recipe.denoiser == "unet":  # transformers 5.23 writes names that 5.0 does not know; both read these
        weights = folder / "text_encoder" / "model.safetensors"
        named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
        save_file(named, weights, metadata={"format": "pt"})


def _let_transformers_4_read_the_tokenizer(folder: Path) -> None:
    index, config = folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"
    parts, settings = json.loads(index.read_text()), json.loads(config.read_text())
    library, name = parts["tokenizer"]
    parts["tokenizer"] = [library, f"{name.removesuffix('Fast')}Fast"]  # transformers 5 has one class of both names
    settings.pop("extra_special_tokens", None)  # a list, where transformers 4 wants a dictionary
    index.write_text(json.dumps(parts, indent=2) + "\n")
    config.write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    main()
