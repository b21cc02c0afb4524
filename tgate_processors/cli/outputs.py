"""The files that a command writes: tried before the work, which would be lost with them, and named in errors."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from os.path import lexists
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

from PIL import Image

from tgate_processors.errors import ConfigError, MissingPackageError
from tgate_processors.measure.plotting import new_figure


Trial = Callable[[BinaryIO, str], Any]  # writes something small, in the format of a suffix


def write_picture(file: BinaryIO, suffix: str) -> None:
    Image.init()  # its formats register themselves
    Image.new("RGB", (8, 8)).save(file, Image.registered_extensions()[suffix])


def write_plot(file: BinaryIO, suffix: str) -> None:
    figure = new_figure(1, 1)
    figure.text(0, 0, "some formats need a program to write words")
    figure.savefig(file, format=suffix.removeprefix("."))


def require_file(option: str, path: Path, trial: Trial | None = None) -> None:
    """Try the file that is written after the work; one that is there stays as it is.

    Args:
        option: That names it.
        path: Where the file is to be.
        trial: Writes the format that its suffix names; None: a format that takes any suffix.

    Raises:
        ConfigError: The file cannot be written, or not in that format.
        MissingPackageError: What writes the format is not installed.
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
    except Exception as error:  # each format fails in its own way
        raise ConfigError(
            f"`{option}` must end in the suffix of a format that can be written here, got {str(path)!r}. "
            "Pass a name that ends in .png."
        ) from error


def require_folder(option: str, path: Path) -> None:
    """Try the folder that is written into, or where it will be made; nothing is left there.

    Raises:
        ConfigError: Nothing can be written there.
    """
    path = path.absolute()
    try:
        with TemporaryFile(dir=next(filter(lexists, (path, *path.parents)))):
            pass
    except OSError as error:
        raise ConfigError(_unwritable(option, path, error)) from error


@contextmanager
def writing(option: str, path: Path) -> Iterator[None]:
    """An error says which file could not be written: the system's own of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(_unwritable(option, path, error)) from error


def _unwritable(option: str, path: Path, error: OSError) -> str:
    return (
        f"`{option}` must be a place that can be written to, got {str(path)!r}: {error.strerror or error}. "
        "Choose another, or make room there."
    )
