"""Classifier-free guidance at the denoiser: one branch of a doubled batch goes in, its output comes out twice.

The pipeline then computes `u + scale * (u - u)`, which is `u` exactly, and need not know.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
FADING = 0.9  # of kept guidance, in a twenty-fifth of the run


def sample_of(inputs: Inputs) -> torch.Tensor:
    """The noisy sample among a denoiser's positional and keyword arguments: `(batch, ...)`."""
    args, kwargs = inputs
    sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    assert isinstance(sample, torch.Tensor), "a denoiser's first argument is the noisy sample"
    return sample


# Positions in the picture, the same for every branch.
UNBATCHED = {"image_rotary_emb", "rotary_embedding"}

# What side networks add. In guess mode a ControlNet sees the positive branch alone and the negative one is given
# zeros, so the control is in the second half; else both halves are the same after the gate.
CONTROLS = {
    "controlnet_block_samples",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "mid_block_additional_residual",
}


def take_half(inputs: Inputs, batch: int, *, first: bool) -> Inputs:
    """One half of every batched tensor in `inputs`, nested ones too. No copy is made.

    A tensor is batched where its first dimension is a multiple of the batch: AnimateDiff has an embedding a frame.

    Args:
        inputs: A denoiser's positional and keyword arguments.
        batch: Size of the doubled batch.
        first: Whether to take the first half.
    """
    args, kwargs = inputs
    take = functools.partial(_half, batch=batch, first=first)
    control = functools.partial(_half, batch=batch, first=False)
    halves = {
        name: value if name in UNBATCHED else map_tensors(control if name in CONTROLS else take, value)
        for name, value in kwargs.items()
    }
    return tuple(map_tensors(take, args)), halves


def _half(tensor: torch.Tensor, *, batch: int, first: bool) -> torch.Tensor:
    if tensor.ndim == 0 or tensor.shape[0] == 0 or tensor.shape[0] % batch:
        return tensor
    return tensor.chunk(2)[0 if first else 1]


def double(output: Any) -> Any:
    """Both halves of a denoiser's output, or of a side network's, from its one branch."""
    return map_tensors(lambda tensor: torch.cat([tensor, tensor]), output)


def difference_of_halves(output: Any, *, first: bool) -> list[torch.Tensor]:
    """What the other branch puts out less what the one that goes on does, of each tensor in a denoiser's output.

    Args:
        output: Of both branches.
        first: Whether the first half goes on.
    """
    differences = []

    def subtract(tensor: torch.Tensor) -> torch.Tensor:
        one, other = tensor.chunk(2) if first else reversed(tensor.chunk(2))
        differences.append(other - one)
        return tensor

    map_tensors(subtract, output)
    return differences


def with_difference(output: Any, differences: Iterable[torch.Tensor], *, first: bool) -> Any:
    """Both halves of a denoiser's output, from the branch that goes on and what the other one differs by."""
    rest = iter(differences)

    def add(tensor: torch.Tensor) -> torch.Tensor:
        other = tensor + next(rest)
        return torch.cat([tensor, other] if first else [other, tensor])

    return map_tensors(add, output)


def halves_are_equal(sample: torch.Tensor) -> bool:
    """Whether a batch is one sample per picture, doubled for guidance. Synchronises with the device."""
    if sample.shape[0] % 2:
        return False
    first, second = sample.chunk(2)
    return torch.equal(first, second)


def map_tensors(change: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    """`value` with `change` applied to each tensor in it, in mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):  # a ModelOutput of diffusers too: it is made from keywords as a dict is
        return type(value)(**{key: map_tensors(change, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value
