"""Check before the work that its results can be written, name the file in errors, and print reports."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from os.path import lexists
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from PIL import Image

from tgate_processors.errors import ConfigError, MissingPackageError
from tgate_processors.measure.plotting import new_figure


Trial = Callable[[BinaryIO, str], Any]  # writes a small file in the format of a suffix


def write_picture(file: BinaryIO, suffix: str) -> None:
    Image.init()  # registers Pillow's formats
    Image.new("RGB", (8, 8)).save(file, Image.registered_extensions()[suffix])


def write_plot(file: BinaryIO, suffix: str) -> None:
    figure = new_figure(1, 1)
    figure.text(0, 0, "some formats need another program to write text")
    figure.savefig(file, format=suffix.removeprefix("."))


def require_file(option: str, path: Path, trial: Trial | None = None) -> None:
    """Check that a file can be written after the work. A file that exists keeps its content.

    Args:
        option: Option that names the file.
        path: Path of the file.
        trial: Function that writes a small file in the format of the suffix. None if the format takes any suffix.

    Raises:
        ConfigError: The file cannot be written, or no format has its suffix.
        MissingPackageError: The package that writes the format is not installed.
    """
    if trial is not None:
        _require_format(option, path, trial)
    is_there = lexists(path)
    try:
        with path.open("ab"):
            pass
        if not is_there:
            path.unlink()
    except OSError as error:
        raise ConfigError(_unwritable(option, path, error)) from error


def _require_format(option: str, path: Path, trial: Trial) -> None:
    try:
        trial(BytesIO(), path.suffix.lower())
    except MissingPackageError:
        raise
    except Exception as error:  # each format raises errors of its own
        raise ConfigError(
            f"`{option}` must end in the suffix of a format that can be written here, got {str(path)!r}. "
            "Pass a name that ends in .png."
        ) from error


def require_folder(option: str, path: Path) -> None:
    """Check that a folder can be written to, or created if it does not exist. The check leaves no file behind.

    Raises:
        ConfigError: The folder cannot be written to, or not created.
    """
    path = path.absolute()
    try:
        with TemporaryFile(dir=next(filter(lexists, (path, *path.parents)))):
            pass
    except OSError as error:
        raise ConfigError(_unwritable(option, path, error)) from error


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """Name the file in the error if writing fails, because the system's error for a full disk does not name it."""
    try:
        yield
    except OSError as error:
        raise OSError(_unwritable(option, path, error)) from error


def _unwritable(option: str, path: Path, error: OSError) -> str:
    return (
        f"`{option}` must be a place that can be written to, got {str(path)!r}: {error.strerror or error}. "
        "Choose another, or make room there."
    )


def print_report(result: Any, *, as_json: bool) -> None:
    """Print a report as text, or as one JSON object."""
    print(json.dumps(_finite(result.as_dict()), indent=2) if as_json else result)


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, since JSON has none.

    The likeness of equal pictures is infinite, and so is the interval of a single picture.
    """
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
