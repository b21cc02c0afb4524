"""A denoiser's inputs and outputs, and their halves: one branch of a doubled batch goes in, both come out.

The pipeline then computes `u + scale * (u - u)`, which is `u` exactly, and need not know. A batch is a tensor, or a
list of pictures for a network that takes lists (Z-Image).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Change = Callable[[torch.Tensor], torch.Tensor]
Batch = torch.Tensor | list[torch.Tensor]


def sample_of(inputs: Inputs) -> Batch:
    """The noisy sample among a denoiser's positional and keyword arguments: `(batch, ...)`, or a list of pictures."""
    args, kwargs = inputs
    named = (kwargs.get(name) for name in ("sample", "hidden_states", "vision_tokens"))
    others: list[Batch] = []  # such as indices: the sample where there is nothing else
    for value in (*args, *named, *kwargs.values()):
        tensors = tensors_in(value)
        if tensors and tensors[0].is_floating_point():
            sample: Batch = value
            return sample
        others += [value] if tensors else []
    return others[0]


def batch_of(inputs: Inputs) -> int:
    """How many rows the noisy sample has."""
    return len(sample_of(inputs))


def rows_of(output: Any, inputs: Inputs) -> int:
    """How many rows a network's output has."""
    value = next(iter(output.values() if isinstance(output, Mapping) else output))
    if isinstance(value, list) and isinstance(sample_of(inputs), list):
        return len(value)
    return tensors_in(output)[0].shape[0]


# Positions in the picture, the same for every branch.
UNBATCHED = {
    "image_rotary_emb",
    "img_ids",
    "ip_adapter_masks",
    "rotary_embedding",
    "txt_ids",
}

# A Python list with an item for each row.
LISTED = {"shape_list"}

# The texts of several layers of an encoder, `(layers, batch, ...)` (HiDream).
BATCHED_SECOND = {"encoder_hidden_states_llama3"}

# What people hand to their own processors, in diffusers 0.42. Of these the names of diffusers are known.
ATTENTION_KWARGS = {"attention_kwargs", "cross_attention_kwargs", "joint_attention_kwargs"}
KNOWN_ATTENTION_KWARGS = {"attention_mask", "gligen", "ip_adapter_image_embeds", "ip_adapter_masks", "scale"}

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
    half = _Half(batch, first=first, in_lists=isinstance(sample_of(inputs), list))
    return tuple(map(half.of, args)), {name: half.named(name, value) for name, value in kwargs.items()}


@dataclass(frozen=True)
class _Half:
    """One half of a batch.

    Args:
        batch: Size of the doubled batch.
        first: Whether it is the first.
        in_lists: Whether the network takes lists with an item for each picture.
    """

    batch: int
    first: bool
    in_lists: bool

    def named(self, name: str, value: Any) -> Any:
        """The half of a keyword argument."""
        if name in UNBATCHED:
            return value
        if name in LISTED:
            return self.of_list(value)
        if name in BATCHED_SECOND:
            return self.of(value.transpose(0, 1)).transpose(0, 1)
        if name in ATTENTION_KWARGS and isinstance(value, Mapping):
            return {key: self.named(key, item) for key, item in value.items()}
        return (replace(self, first=False) if name in CONTROLS else self).of(value)

    def of(self, value: Any) -> Any:
        """The half of what is batched in a value, nested ones too."""
        if self.in_lists and isinstance(value, list):
            return self.of_list(value)  # what is in an item is not batched
        return map_tensors(self.of_tensor, value)

    def of_list(self, value: Any) -> Any:
        """The half of a list that has an item for each row."""
        if not isinstance(value, list) or len(value) != self.batch:
            return value
        return value[: self.batch // 2] if self.first else value[self.batch // 2 :]

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The half of a tensor, if it is batched."""
        return half_of(tensor, first=self.first) if _is_batched(tensor, self.batch) else tensor


def ambiguous_argument(inputs: Inputs, batch: int) -> str | None:
    """The name of an attention argument of somebody's own that may be batched or not, such as masks of regions."""
    for name in ATTENTION_KWARGS & inputs[1].keys():
        for key, value in (inputs[1][name] or {}).items():
            if key not in KNOWN_ATTENTION_KWARGS and any(_is_batched(tensor, batch) for tensor in tensors_in(value)):
                return str(key)
    return None


def _is_batched(tensor: torch.Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] > 0 and tensor.shape[0] % batch == 0


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


def halves_are_equal(sample: Batch) -> bool:
    """Whether a batch is one sample per picture, doubled for guidance. Synchronises with the device."""
    half, rest = divmod(len(sample), 2)
    return not rest and all(torch.equal(*pair) for pair in zip(sample[:half], sample[half:], strict=True))


def has_lists(output: Any) -> bool:
    """Whether a network puts its pictures out in a list."""
    return any(isinstance(value, list) for value in (output.values() if isinstance(output, Mapping) else output))


def as_tensors(output: Any) -> Any:
    """The output of a network with a tensor `(batch, ...)` for each list of pictures."""
    if isinstance(output, list):
        return torch.stack(output)
    if isinstance(output, Mapping):
        return _like(output, {key: as_tensors(item) for key, item in output.items()})
    return tuple(map(as_tensors, output)) if isinstance(output, tuple) else output


def as_lists(output: Any) -> Any:
    """Undo `as_tensors`."""
    return map_tensors(lambda tensor: list(tensor.unbind()), output)  # type: ignore[arg-type, return-value]


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
    if isinstance(value, Mapping):
        return _like(value, {key: map_tensors(change, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def _like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same class; diffusers' outputs are dataclasses."""
    made: Any = type(value)
    return made(**items) if is_dataclass(value) else made(items)
