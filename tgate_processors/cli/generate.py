"""Draw the pictures of many prompts into a folder, on one device or on those of `accelerate launch`."""

import hashlib
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from inspect import signature
from itertools import takewhile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from tgate_processors import __version__
from tgate_processors.cli.outputs import writing
from tgate_processors.cli.processes import Share
from tgate_processors.errors import ConfigError, UnsupportedPipelineError
from tgate_processors.measure import ways
from tgate_processors.measure.sheet import sheet
from tgate_processors.schedule import TGateConfig


SIGNATURE = b"\x89PNG\r\n\x1a\n"
KEYWORD = "tgate-processors"  # name of the PNG text that holds a picture's settings


@dataclass(frozen=True)
class Job:
    """One picture to draw, with all settings that determine it. A later run recognises the picture by them.

    Args:
        prompt: What the picture shows.
        seed: Seed of the noise that the picture starts from.
        steps: Number of denoising steps. None if the pipeline has no such setting.
        guidance_scale: Scale of classifier-free guidance. None if the pipeline has no such setting.
        config: Settings of the gate.
        with_stock: Whether the stock pipeline's picture is drawn on the left.
        model: Name of the pipeline.
        weights: Hash of the pipeline, from `fingerprint`.
        dtype: Type of the pipeline's weights.
        device: Kind of the pipeline's device.
    """

    prompt: str
    seed: int
    steps: int | None
    guidance_scale: float | None
    config: TGateConfig
    with_stock: bool
    model: str
    weights: str
    dtype: str
    device: str

    def record(self) -> dict[str, Any]:
        """Return all settings by name, in types that JSON has."""
        settings = asdict(self)
        return {**settings.pop("config"), **settings}


def given_or_own(given: float | None, pipe: Any, name: str) -> Any:
    """Return the given setting, or else the default of the pipeline's call. None if the default is no number."""
    if given is not None:
        return given
    parameter = signature(pipe.__call__).parameters.get(name)
    return parameter.default if parameter is not None and isinstance(parameter.default, int | float) else None


def fingerprint(pipe: Any) -> str:
    """Return a hash of a pipeline's weights and settings, because its folder or its name may later hold others."""
    digest = hashlib.sha256(type(pipe).__name__.encode())
    for name, part in sorted(pipe.components.items()):
        digest.update(f"{name} {type(part).__name__} {_settings_of(part)}".encode())
        for key, value in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _settings_of(part: Any) -> list[tuple[str, Any]]:
    config = getattr(part, "config", None)
    public = config.items() if isinstance(config, Mapping) else ()  # no mapping in transformers
    return sorted((name, value) for name, value in public if not name.startswith("_"))


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a text file, one from each line that is not empty.

    Raises:
        ConfigError: The file cannot be read, is not in UTF-8, or holds no prompt.
    """
    rule = f"`--prompts` must be a text file in UTF-8 with a prompt on each line, got {str(path)!r}"
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{rule}: {error.strerror}. Pass one that can be read.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{rule}: byte {error.start} is not UTF-8. Save the file in UTF-8.") from error
    # not `splitlines`, which ends a line at other characters too
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not prompts:
        raise ConfigError(f"{rule}: it holds no prompt. Write one.")
    return prompts


def generate(
    pipe: Any, jobs: Sequence[Job], folder: Path, *, share: Share | None = None, **call_kwargs: Any
) -> list[Path]:
    """Draw the pictures that `folder` does not hold yet, with a progress bar.

    The folder never holds a part of a picture, so a run that was interrupted can continue where it stopped.

    Args:
        pipe: Pipeline that makes images, without a gate.
        jobs: Pictures to draw. The name of each file is the job's index and its prompt.
        folder: Folder for the pictures, which is created if it does not exist.
        share: Share of the jobs for this process. None for all of them.
        call_kwargs: Arguments of the pipeline's call that are the same for all jobs.

    Returns:
        Paths of the pictures that this process drew.

    Raises:
        ConfigError: `folder` holds a picture of another job. Then nothing is drawn.
    """
    share = share or Share()
    folder.mkdir(parents=True, exist_ok=True)
    digits = len(str(len(jobs) - 1))
    paths = {folder / f"{index:0{digits}}-{_slug(job.prompt)}.png": job for index, job in enumerate(jobs)}
    _require_no_conflict(folder, paths)
    mine = dict(share.of(list(paths.items())))
    missing = {path: job for path, job in mine.items() if not _is_whole(path)}
    bar = tqdm(
        missing.items(),
        desc="drawing",
        unit="picture",
        initial=len(mine) - len(missing),
        total=len(mine),
        disable=True if share.index else None,
    )
    for path, job in bar:
        gated = picture = _draw(pipe, job, call_kwargs, gated=True)
        if job.with_stock:
            picture = _side_by_side(_draw(pipe, job, call_kwargs, gated=False), gated, job)
        _save(picture, path, job.record() | {"size": gated.size, "versions": _versions()})
    return list(missing)


def _versions() -> dict[str, str]:
    """Return the versions that a picture records. No run compares them, so a package may be updated in between."""
    return {"tgate-processors": __version__} | {name: metadata.version(name) for name in ("torch", "diffusers")}


def _draw(pipe: Any, job: Job, call_kwargs: Mapping[str, Any], *, gated: bool) -> Image.Image:
    kwargs: dict[str, Any] = {**call_kwargs, "generator": torch.Generator().manual_seed(job.seed)}
    if job.steps is not None:
        kwargs["num_inference_steps"] = job.steps
    if job.guidance_scale is not None:
        kwargs["guidance_scale"] = job.guidance_scale
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


def _side_by_side(stock: Image.Image, gated: Image.Image, job: Job) -> Image.Image:
    said = {"steps": job.steps, "guidance scale": job.guidance_scale, "seed": job.seed}
    settings = [f"{name} {value}" for name, value in said.items() if value is not None]
    return sheet(
        [[stock, gated]],
        title=job.prompt,
        settings=", ".join(settings),
        columns=["the stock pipeline", f"gated: {job.config}"],
    )


def _save(picture: Image.Image, path: Path, settings: Mapping[str, Any]) -> None:
    written = PngInfo()
    written.add_text(KEYWORD, json.dumps(settings, sort_keys=True))
    unfinished = path.with_suffix(".unfinished")
    with writing("--out", path):
        unfinished.unlink(missing_ok=True)  # left by a killed run, or a link that was planted there
        with unfinished.open("xb") as file:  # "x" follows no link
            picture.save(file, format="PNG", pnginfo=written)
        unfinished.replace(path)


def _require_no_conflict(folder: Path, jobs: Mapping[Path, Job]) -> None:
    for path in sorted(folder.glob("*.png")):
        if conflict := _conflict(path, jobs.get(path)):
            raise ConfigError(
                f"`--out` must hold no picture of other settings, got {str(path)!r} {conflict}. "
                "Remove it, or choose another folder."
            )


def _conflict(path: Path, job: Job | None) -> str | None:
    """Return how a picture in the folder conflicts with the jobs, or None if it does not.

    A picture that this command did not write conflicts only if it has the path of a job.

    Args:
        path: Path of the picture.
        job: Job of this path. None if no job has it.
    """
    found = _settings_in(path)
    if job is None:
        return None if found is None else "of another prompt, or of a prompt in another place"
    if found is None:
        return None if _ends_before_pixels(path) else "without settings"
    wanted = job.record()
    other = [f"`{name}`" for name in wanted if name not in found or found[name] != wanted[name]]
    return f"of another {', '.join(other)}" if other else None


def _settings_in(path: Path) -> dict[str, Any] | None:
    """Return the settings that this command wrote into a picture. None if there are none."""
    with path.open("rb") as file:
        before_pixels = takewhile(lambda chunk: chunk[0] != b"IDAT", _chunks(file))
        texts = [body for kind, body in before_pixels if kind == b"tEXt" and body.startswith(f"{KEYWORD}\0".encode())]
    if not texts:
        return None
    try:
        settings = json.loads(texts[0].split(b"\0", 1)[1])
    except (ValueError, RecursionError):
        settings = {}
    return settings if isinstance(settings, dict) else {}


def _is_whole(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return any(kind == b"IEND" for kind, _ in _chunks(file))


def _ends_before_pixels(path: Path) -> bool:
    """Return whether a file is the beginning of a PNG file, cut off before its pixels."""
    data = path.read_bytes()
    return SIGNATURE.startswith(data[: len(SIGNATURE)]) and b"IDAT" not in data


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield the kind and the body of each whole chunk of a PNG file, up to where the file is cut off or damaged."""
    if file.read(len(SIGNATURE)) != SIGNATURE:
        return
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        body = file.read(length)
        if file.read(4) != zlib.crc32(kind + body).to_bytes(4, "big"):
            return
        yield kind, body


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
