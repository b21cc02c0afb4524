"""Train the autoencoder, which maps pictures of the world to latents a quarter as wide, and back."""

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from tgate_processors.demo.checker import read
from tgate_processors.demo.render import render
from tgate_processors.demo.trainer import Settings, Trainer, share, step_generator
from tgate_processors.demo.world import sample_scenes


BATCH = 16
LEARNING_RATE = 2e-3
KL_WEIGHT = 1e-6  # just enough to keep the latents from drifting apart


def vae_settings(steps: int, seed: int) -> Settings:
    return Settings(steps=steps, batch=BATCH, learning_rate=LEARNING_RATE, seed=seed, warm_up=100)


def vae_loss(vae: AutoencoderKL, batch: int, generator: torch.Generator) -> Tensor:
    """Return the loss for a batch of new pictures: absolute error, squared error and KL divergence."""
    pictures = share(render(sample_scenes(batch, generator), generator)).to(vae.device)
    posterior = vae.encode(pictures).latent_dist
    noise = torch.randn(batch, *posterior.mean.shape[1:], generator=generator)
    latents = posterior.mean + posterior.std * share(noise).to(vae.device)
    drawn = vae.decode(latents).sample
    error: Tensor = functional.l1_loss(drawn, pictures) + functional.mse_loss(drawn, pictures)
    return error.add(posterior.kl().mean(), alpha=KL_WEIGHT)


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor) -> Tensor:
    """Return the latents before scaling -> (pictures, latent channels, height / 4, width / 4)."""
    parts = torch.split(pictures.to(vae.device), 64)
    return torch.cat([vae.encode(part).latent_dist.mode() for part in parts]).cpu()


@torch.no_grad()
def reconstruction_score(vae: AutoencoderKL, count: int = 512, seed: int = 1) -> float:
    """Return the share of reconstructed pictures in which the checker reads every attribute correctly."""
    generator = step_generator(seed, "reconstruction", 0)
    scenes = sample_scenes(count, generator)
    latents = encode(vae, render(scenes, generator)).to(vae.device)
    pictures = torch.cat([vae.decode(part).sample.cpu() for part in torch.split(latents, 64)])
    return float(read(pictures, scenes).whole.float().mean())


def fix_scaling(vae: AutoencoderKL, seed: int) -> None:
    """Set the factor by which the pipeline scales latents to a standard deviation of 1."""
    generator = step_generator(seed, "scaling", 0)
    latents = encode(vae, render(sample_scenes(512, generator), generator))
    vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))


def train_vae(trainer: Trainer, seed: int) -> AutoencoderKL:
    """Train to the end, set the scaling factor, and return the averaged autoencoder."""
    trainer.run()
    vae = trainer.averaged.eval()
    assert isinstance(vae, AutoencoderKL)
    fix_scaling(vae, seed)
    return vae
