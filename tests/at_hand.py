"""diffusers and transformers as installed. Tests of what an older release lacks, or cannot run, are skipped."""

import functools
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import diffusers as _diffusers
import pytest
import torch
import transformers as _transformers
from packaging.version import Version


# The toys are built and called as this release wants it. An older one cannot run some of them, gated or not.
INSTALLED = Version(_diffusers.__version__)
IS_OLDER = Version("0.42") > INSTALLED
HAS_TRANSFORMERS_5 = Version(_transformers.__version__) >= Version("5")
# What the toys count on, and an older release does otherwise.
SINCE = {
    "DiTPipeline": "0.41",  # returns tensors, if latents are asked for
    "FluxControlNetPipeline": "0.39",  # does guidance with embeddings alone
    "FluxImg2ImgPipeline": "0.39",  # likewise
    "FluxInpaintPipeline": "0.39",  # likewise
    "LDMTextToImagePipeline": "0.41",  # as DiT
}


class Lacking:
    """Stands for a class that the installed release lacks. A test that makes one is skipped."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> "Lacking":
        if name.startswith("__"):
            raise AttributeError(name)
        return Lacking(f"{self._name}.{name}")

    def __mro_entries__(self, bases: Any) -> tuple[()]:
        return ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        skip_without(self._name)


class _Installed:
    """A module whose missing names are `Lacking`."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name, None)
        full_name = f"{self._module.__name__}.{name}"
        if value is None and hasattr(self._module, "__path__"):
            try:
                value = import_module(full_name)
            except ModuleNotFoundError:
                return Lacking(full_name)
        if value is None:
            return Lacking(full_name)
        return _Installed(value) if isinstance(value, ModuleType) else value


diffusers: Any = _Installed(_diffusers)
transformers: Any = _Installed(_transformers)


def skip_without(name: str) -> None:
    """Skip the test that needs this class."""
    pytest.skip(f"diffusers {_diffusers.__version__} and transformers {_transformers.__version__} lack {name}")


def class_named(name: str) -> Any:
    """A pipeline class of diffusers, most of which stand at its top."""
    sana_wm = getattr(_diffusers.pipelines, "sana_wm", None)
    cls = getattr(_diffusers, name, None) or getattr(sana_wm, name, None)
    if cls is None:
        skip_without(name)
    return cls


def _if_it_runs(name: str, entry: Any) -> Callable[[], Any]:
    """Build the entry's pipeline, or skip the test if the older release cannot run it, which is tried once."""

    @functools.cache
    def failure() -> str:
        state = torch.get_rng_state()
        try:
            pipe = entry.build()
            pipe.set_progress_bar_config(disable=True)
            pipe(**entry.call([0]))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            torch.set_rng_state(state)
        return ""

    def build() -> Any:
        if failure():
            pytest.skip(f"diffusers {_diffusers.__version__} does not run the stock {name}: {failure()}")
        return entry.build()

    return build


class Entries(dict[str, Any]):
    """Toy pipelines by name. A test that asks for one whose class the installed diffusers lacks is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self._lacking: dict[str, str] = {}

    def add(self, name: str, entry: Any, needs: str) -> None:
        """Add an entry that needs a class of diffusers."""
        assert name not in self
        if getattr(_diffusers, needs, None) is None or Version(SINCE.get(needs, "0")) > INSTALLED:
            self._lacking[name] = needs
        else:
            self[name] = replace(entry, build=_if_it_runs(name, entry)) if IS_OLDER else entry

    def __missing__(self, name: str) -> Any:
        if name in self._lacking:
            skip_without(self._lacking[name])
        raise KeyError(name)
