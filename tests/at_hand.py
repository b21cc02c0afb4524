"""diffusers and transformers as they are installed; the tests of what an older release lacks are skipped."""

from importlib import import_module
from types import ModuleType
from typing import Any

import diffusers as _diffusers
import pytest
import transformers as _transformers


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


class Entries(dict[str, Any]):
    """Toy pipelines by name. A test that asks for one whose class the installed diffusers lacks is skipped."""

    def __init__(self) -> None:
        super().__init__()
        self._lacking: dict[str, str] = {}

    def add(self, name: str, entry: Any, needs: str) -> None:
        """Add an entry that needs a class of diffusers."""
        assert name not in self
        if getattr(_diffusers, needs, None) is None:
            self._lacking[name] = needs
        else:
            self[name] = entry

    def __missing__(self, name: str) -> Any:
        if name in self._lacking:
            skip_without(self._lacking[name])
        raise KeyError(name)
