"""A denoiser's inputs and outputs, and their halves: one branch of a doubled batch goes in, both come out.

The pipeline then computes `u + scale * (u - u)`, which is `u` exactly, and need not know.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Change = Callable[[torch.Tensor], torch.Tensor]


def sample_of(inputs: Inputs) -> torch.Tensor:
    """The noisy sample among a denoiser's positional and keyword arguments: `(batch, ...)`."""
    args, kwargs = inputs
    sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
    assert isinstance(sample, torch.Tensor), "a denoiser's first argument is the noisy sample"
    return sample


# Positions in the picture, the same for every branch.
UNBATCHED = {"image_rotary_emb", "ip_adapter_masks", "rotary_embedding"}

# What people hand to their own processors, in diffusers 0.42. Of these the names of diffusers are known.
ATTENTION_KWARGS = {"attention_kwargs", "cross_attention_kwargs", "joint_attention_kwargs"}
KNOWN_ATTENTION_KWARGS = {"gligen", "ip_adapter_masks", "scale"}

# What side networks add. In guess mode a ControlNet sees the positive branch alone and the negative one is given
# zeros, so the control is in the second half; else both halves are the same after the gate.
CONTROLS = {
    "controlnet_block_samples",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "mid_block_additional_residual",
}


def timestep_of(inputs: Inputs) -> Any:
    """The timestep among a denoiser's arguments: the second, or the one of that name."""
    args, kwargs = inputs
    return args[1] if len(args) > 1 and "timestep" not in kwargs else kwargs.get("timestep")


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
    return tuple(map_tensors(take, args)), {
        name: _halves(name, value, take, control) for name, value in kwargs.items()
    }


def _halves(name: str, value: Any, take: Change, control: Change) -> Any:
    if name in UNBATCHED:
        return value
    if name in ATTENTION_KWARGS and isinstance(value, Mapping):
        return {key: _halves(key, item, take, control) for key, item in value.items()}
    return map_tensors(control if name in CONTROLS else take, value)


def ambiguous_argument(inputs: Inputs, batch: int) -> str | None:
    """The name of an attention argument of somebody's own that may be batched or not, such as masks of regions."""
    for name in ATTENTION_KWARGS & inputs[1].keys():
        for key, value in (inputs[1][name] or {}).items():
            if key not in KNOWN_ATTENTION_KWARGS and any(_is_batched(tensor, batch) for tensor in tensors_in(value)):
                return str(key)
    return None


def _is_batched(tensor: torch.Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] > 0 and tensor.shape[0] % batch == 0


def _half(tensor: torch.Tensor, *, batch: int, first: bool) -> torch.Tensor:
    return half_of(tensor, first=first) if _is_batched(tensor, batch) else tensor


def half_of(tensor: torch.Tensor, *, first: bool) -> torch.Tensor:
    """One half of a batch, `(batch // 2, ...)`."""
    return tensor.chunk(2)[0 if first else 1]


def mean_of_halves(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of the two halves of a batch, `(batch // 2, ...)`."""
    first, second = tensor.chunk(2)
    return first / 2 + second / 2  # each halved first: the sum may overflow in half precision


def double(output: Any) -> Any:
    """Both halves of a denoiser's output, or of a side network's, from its one branch."""
    return map_tensors(lambda tensor: torch.cat([tensor, tensor]), output)


def difference_of_halves(output: Any, *, first: bool) -> list[torch.Tensor]:
    """What the other branch puts out less what the one that goes on does, of each tensor in a denoiser's output.

    Args:
        output: The output of both branches.
        first: Whether the first half goes on.
    """
    pairs = (tensor.chunk(2) if first else tensor.chunk(2)[::-1] for tensor in tensors_in(output))
    return [other - one for one, other in pairs]


def difference(one: Any, other: Any) -> list[torch.Tensor]:
    """What another branch puts out less what the one that goes on does, of each tensor in a denoiser's outputs."""
    return [theirs - its for its, theirs in zip(tensors_in(one), tensors_in(other), strict=True)]


def plus(output: Any, differences: Iterable[torch.Tensor]) -> Any:
    """The output of another branch, from that of the branch that goes on and what the other one differs by."""
    rest = iter(differences)
    return map_tensors(lambda tensor: tensor + next(rest), output)


def with_difference(output: Any, differences: Iterable[torch.Tensor], *, first: bool) -> Any:
    """Both halves of a denoiser's output, from the branch that goes on and what the other one differs by."""
    others = iter(tensors_in(plus(output, differences)))

    def join(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, next(others)] if first else [next(others), tensor])

    return map_tensors(join, output)


def halves_are_equal(sample: torch.Tensor) -> bool:
    """Whether a batch is one sample per picture, doubled for guidance. Synchronises with the device."""
    if sample.shape[0] % 2:
        return False
    first, second = sample.chunk(2)
    return torch.equal(first, second)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in mappings, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []


def map_tensors(change: Change, value: Any) -> Any:
    """`value` with `change` applied to each tensor in it, in mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):  # a ModelOutput of diffusers too: it is made from keywords as a dict is
        return type(value)(**{key: map_tensors(change, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value
