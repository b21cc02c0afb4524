"""This process among those that `accelerate launch` started: its share of the work, and its device."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from tgate_processors.errors import MissingPackageError


T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Every `count`-th piece of work from `index` on."""

    index: int = 0
    count: int = 1

    def of(self, work: Sequence[T]) -> Sequence[T]:
        """This share's pieces."""
        return work[self.index :: self.count]


def share_of_this_process() -> tuple[Share, torch.device]:
    """Its share and its device, as `accelerate launch` says, or everything and the first accelerator.

    Raises:
        MissingPackageError: There are several processes, and no `accelerate`.
    """
    try:
        from accelerate import PartialState
    except ImportError as error:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise MissingPackageError(
                "`accelerate` must be installed to share prompts out to several processes. "
                "Run `pip install 'tgate-processors[accelerate]'`."
            ) from error
        return Share(), torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    state = PartialState(cpu=not torch.accelerator.is_available())
    return Share(state.process_index, state.num_processes), state.device
