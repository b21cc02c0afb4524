"""The share of the work and the device of this process, alone or under `accelerate launch`."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from tgate_processors.errors import ConfigError, MissingPackageError


T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """A share of the work: every `count`-th item, from `index` on."""

    index: int = 0
    count: int = 1

    def of(self, work: Sequence[T]) -> Sequence[T]:
        """Return the items of this share."""
        return work[self.index :: self.count]


def share_of_this_process() -> Share:
    """Return the share that accelerate gives this process. Without accelerate, it is all of the work.

    Raises:
        MissingPackageError: Several processes run, and `accelerate` is not installed.
    """
    state = _state()
    return Share() if state is None else Share(state.process_index, state.num_processes)


def device_of_this_process() -> torch.device:
    """Return the device that accelerate gives this process. Without accelerate, it is the first accelerator or CPU.

    Raises:
        MissingPackageError: Several processes run, and `accelerate` is not installed.
    """
    state = _state()
    if state is None:
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device: torch.device = state.device
    return device


def device_named(name: str) -> torch.device:
    """Return the device of a name, after a trial allocation on it.

    Raises:
        ConfigError: This machine has no such device, or the device holds no values.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except Exception as error:  # each kind of device raises errors of its own
        raise ConfigError(
            f"`--device` must be a device of this machine, such as cpu, got {name!r}. "
            "Leave it out to use the first accelerator."
        ) from error
    return device


def _state() -> Any:
    """Return accelerate's state of this process, or None if accelerate is not installed."""
    try:
        from accelerate import PartialState
    except ImportError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MissingPackageError(
                "`accelerate` must be installed to share the prompts among several processes. "
                "Run `pip install 'tgate-processors[accelerate]'`."
            ) from error
        return None
    return PartialState(cpu=not torch.accelerator.is_available())
