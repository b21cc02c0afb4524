"""This process among those that `accelerate launch` started: its share of the work, and its device."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tgate_processors.errors import ConfigError, MissingPackageError


T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Every `count`-th piece of work from `index` on."""

    index: int = 0
    count: int = 1

    def of(self, work: Sequence[T]) -> Sequence[T]:
        """This share's pieces."""
        return work[self.index :: self.count]


def share_of_this_process() -> Share:
    """Its share, as `accelerate launch` says, or everything.

    Raises:
        MissingPackageError: There are several processes, and no `accelerate`.
    """
    state = _state()
    return Share() if state is None else Share(state.process_index, state.num_processes)


def device_of_this_process() -> torch.device:
    """Its device, as `accelerate launch` says, or the first accelerator.

    Raises:
        MissingPackageError: There are several processes, and no `accelerate`.
    """
    state = _state()
    if state is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device: torch.device = state.device
    return device


def device_named(name: str) -> torch.device:
    """The device of that name, tried.

    Raises:
        ConfigError: There is none here, or it holds no values.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device is missing in its own way
        raise ConfigError(
            f"`--device` must be a device of this machine, such as cpu, got {name!r}. "
            "Leave it out for the first accelerator."
        ) from error
    return device


def _state() -> Any:
    """accelerate's; None where it is not installed."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MissingPackageError(
                "`accelerate` must be installed to share prompts out to several processes. "
                "Run `pip install 'tgate-processors[accelerate]'`."
            ) from error
        return None
    return PartialState(cpu=not torch.accelerator.is_available())
