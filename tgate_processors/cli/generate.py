"""Pictures of many prompts, gated, into a folder: on one device, or shared out by `accelerate launch`."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from tgate_processors.cli.processes import Share
from tgate_processors.errors import ConfigError, UnsupportedPipelineError
from tgate_processors.measure import ways
from tgate_processors.measure.sheet import sheet
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class Job:
    """One picture to make; what is written into it, so that a second run knows it.

    Args:
        prompt: What to draw.
        seed: Of its noise.
        steps: Denoising steps; None: the pipeline's own.
        guidance: Scale of classifier-free guidance; None: the pipeline's own.
        config: The gate's settings.
        with_stock: Whether the stock pipeline's picture stands left of it.
    """

    prompt: str
    seed: int
    steps: int | None
    guidance: float | None
    config: TGateConfig
    with_stock: bool = False

    def __str__(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a text file, one a line; empty lines are left out.

    Raises:
        ConfigError: There is no such file, or no prompt in it.
    """
    if not path.is_file():
        raise ConfigError(f"`--prompts` must be a text file with a prompt on each line, got {str(path)!r}: no file.")
    prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ConfigError(f"`--prompts` must be a text file with a prompt on each line, got {str(path)!r}: empty.")
    return prompts


def generate(pipe: Any, jobs: Sequence[Job], folder: Path, *, share: Share | None = None) -> list[Path]:
    """Make the pictures that `folder` does not hold yet, with a progress bar.

    A picture is there whole or not at all, so an interrupted run goes on where it was.

    Args:
        pipe: A pipeline that makes images, not gated.
        jobs: The pictures; the name of each is its place among them and its prompt.
        folder: Where they go; it is made where there is none.
        share: This process's share of the jobs; None: all.

    Returns:
        The paths of this process's pictures.

    Raises:
        ConfigError: `folder` holds a picture of that name that was made with other settings.
    """
    share = share or Share()
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(jobs) - 1))
    paths = {folder / f"{index:0{digits}}-{_slug(job.prompt)}.png": job for index, job in enumerate(jobs)}
    mine = dict(share.of(list(paths.items())))
    missing = {path: job for path, job in mine.items() if not _is_made(path, job)}
    bar = tqdm(missing.items(), desc="drawing", unit="picture", initial=len(mine) - len(missing), total=len(mine))
    bar.disable = share.index > 0
    for path, job in bar:
        picture = _draw(pipe, job, gated=True)
        if job.with_stock:
            picture = _beside(_draw(pipe, job, gated=False), picture, job)
        _save(picture, path, job)
    return list(mine)


def _draw(pipe: Any, job: Job, *, gated: bool) -> Image.Image:
    kwargs: dict[str, Any] = {"generator": torch.Generator().manual_seed(job.seed)}
    if job.steps is not None:
        kwargs["num_inference_steps"] = job.steps
    if job.guidance is not None:
        kwargs["guidance_scale"] = job.guidance
    way = ways.gated(job.config, "gated") if gated else ways.stock()
    with way.on(pipe) as changes:
        output = pipe(job.prompt, **kwargs | changes)
    images = getattr(output, "images", None)
    if not images or not isinstance(images[0], Image.Image):
        raise UnsupportedPipelineError(
            f"`--model` must be a pipeline that makes images, got {type(pipe).__name__}, which makes "
            f"{', '.join(output.keys())}. Call it from Python, with `apply_tgate`."
        )
    return images[0]


def _beside(stock: Image.Image, gated: Image.Image, job: Job) -> Image.Image:
    said = {"steps": job.steps, "guidance scale": job.guidance, "seed": job.seed}
    settings = [f"{name} {value}" for name, value in said.items() if value is not None]
    return sheet(
        [[stock, gated]],
        title=job.prompt,
        settings=", ".join(settings),
        columns=["the stock pipeline", f"gated: {job.config}"],
    )


def _save(picture: Image.Image, path: Path, job: Job) -> None:
    settings = PngInfo()
    settings.add_text("tgate-processors", str(job))
    unfinished = path.with_suffix(".unfinished")
    picture.save(unfinished, format="PNG", pnginfo=settings)
    unfinished.replace(path)


def _is_made(path: Path, job: Job) -> bool:
    if not path.is_file():
        return False
    with Image.open(path) as picture:
        if picture.info.get("tgate-processors") == str(job):
            return True
    raise ConfigError(
        f"`--out` must hold no picture of other settings, got {str(path)!r}. Remove it, or choose another folder."
    )


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
