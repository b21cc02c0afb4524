"""Classifier-free guidance at the denoiser: one branch of a doubled batch goes in, its output comes out twice.

The pipeline then computes `u + scale * (u - u)`, which is `u` exactly, and need not know.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from tgate_processors.schedule import Branch


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def sample_of(inputs: Inputs) -> torch.Tensor:
    """The noisy sample among a denoiser's positional and keyword arguments: `(batch, ...)`."""
    args, kwargs = inputs
    sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    assert isinstance(sample, torch.Tensor), "a denoiser's first argument is the noisy sample"
    return sample


def take_branch(inputs: Inputs, batch: int, branch: Branch) -> Inputs:
    """One half of every tensor in `inputs` whose first dimension is `batch`, nested ones too. No copy is made.

    Args:
        inputs: A denoiser's positional and keyword arguments.
        batch: Size of the doubled batch, `[negative, positive]`.
        branch: Which half to take.
    """
    half = slice(0, batch // 2) if branch == "negative" else slice(batch // 2, batch)
    args, kwargs = inputs
    take = _with_batch(batch, lambda tensor: tensor[half])
    return tuple(map_tensors(take, args)), map_tensors(take, kwargs)


def repeat_branch(output: Any, batch: int) -> Any:
    """Both halves of a denoiser's output from its one branch: tensors of `batch // 2` become `batch`."""
    return map_tensors(_with_batch(batch // 2, lambda tensor: torch.cat([tensor, tensor])), output)


def halves_are_equal(sample: torch.Tensor) -> bool:
    """Whether a batch is one sample per picture, doubled for guidance. Synchronises with the device."""
    if sample.shape[0] % 2:
        return False
    first, second = sample.chunk(2)
    return torch.equal(first, second)


def _with_batch(batch: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: change(tensor) if tensor.ndim > 0 and tensor.shape[0] == batch else tensor


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with `change` applied to each tensor in it, in mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):  # a ModelOutput of diffusers too: it is made from keywords as a dict is
        return type(value)(**{key: map_tensors(change, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value
