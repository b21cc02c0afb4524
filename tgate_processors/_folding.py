"""Halves of a denoiser's inputs and outputs: one branch of a doubled batch goes in, and both branches come out.

The pipeline then computes `u + scale * (u - u)`, which is `u` exactly, so its guidance formula works unchanged. A
batch is a tensor, or a list of pictures if the network takes lists (Z-Image).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Change = Callable[[torch.Tensor], torch.Tensor]
Batch = torch.Tensor | list[torch.Tensor]


def sample_of(inputs: Inputs) -> Batch:
    """Return the noisy sample among a denoiser's arguments: `(batch, ...)`, or a list of pictures.

    The sample is the first floating-point argument. If there is none, it is the first other tensor, such as indices.
    """
    args, kwargs = inputs
    named = (kwargs.get(name) for name in ("sample", "hidden_states", "vision_tokens"))
    others: list[Batch] = []
    for value in (*args, *named, *kwargs.values()):
        tensors = tensors_in(value)
        if tensors and tensors[0].is_floating_point():
            sample: Batch = value
            return sample
        others += [value] if tensors else []
    return others[0]


def batch_of(inputs: Inputs) -> int:
    """Return the number of rows of the noisy sample."""
    return len(sample_of(inputs))


def rows_of(output: Any, inputs: Inputs) -> int:
    """Return the number of rows of a network's output."""
    value = next(iter(output.values() if isinstance(output, Mapping) else output))
    if isinstance(value, list) and isinstance(sample_of(inputs), list):
        return len(value)
    return tensors_in(output)[0].shape[0]


# Arguments with positions in the picture, which are the same for every branch.
UNBATCHED = {
    "image_rotary_emb",
    "img_ids",
    "ip_adapter_masks",
    "rotary_embedding",
    "txt_ids",
}

# Arguments that are a Python list with an item for each row.
LISTED = {"shape_list"}

# Arguments with the text from several layers of an encoder, `(layers, batch, ...)` (HiDream).
BATCHED_SECOND = {"encoder_hidden_states_llama3"}

# Arguments whose items diffusers 0.42 passes on to the processors, and the names of the items that diffusers itself
# uses. Any other item belongs to a processor of the user.
ATTENTION_KWARGS = {"attention_kwargs", "cross_attention_kwargs", "joint_attention_kwargs"}
KNOWN_ATTENTION_KWARGS = {"attention_mask", "gligen", "ip_adapter_image_embeds", "ip_adapter_masks", "scale"}

# Arguments with the outputs of side networks. The second half is always taken. In guess mode a ControlNet computes
# only the positive branch, and the first half has zeros. Otherwise both halves are equal after the gate.
CONTROLS = {
    "controlnet_block_samples",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "mid_block_additional_residual",
}


def timestep_of(inputs: Inputs) -> Any:
    """Return the timestep: the denoiser's second argument, or the one of that name."""
    args, kwargs = inputs
    return args[1] if len(args) > 1 and "timestep" not in kwargs else kwargs.get("timestep")


def take_half(inputs: Inputs, batch: int, *, first: bool) -> Inputs:
    """Return `inputs` with one half of every batched tensor, including nested ones. It copies no tensor.

    A tensor is batched if its first dimension is a multiple of the batch. It may be a larger multiple, because
    AnimateDiff has an embedding for each frame.

    Args:
        inputs: Positional and keyword arguments of a denoiser.
        batch: Size of the doubled batch.
        first: Whether to take the first half.
    """
    args, kwargs = inputs
    half = _Half(batch, first=first, in_lists=isinstance(sample_of(inputs), list))
    return tuple(map(half.of, args)), {name: half.named(name, value) for name, value in kwargs.items()}


@dataclass(frozen=True)
class _Half:
    """Takes one half of each batched value.

    Args:
        batch: Size of the doubled batch.
        first: Whether to take the first half.
        in_lists: Whether the network takes lists with an item for each picture.
    """

    batch: int
    first: bool
    in_lists: bool

    def named(self, name: str, value: Any) -> Any:
        """Return the half of a keyword argument."""
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
        """Return a value with one half of every batched tensor or list in it."""
        if self.in_lists and isinstance(value, list):
            return self.of_list(value)  # the tensors in an item are not batched
        return map_tensors(self.of_tensor, value)

    def of_list(self, value: Any) -> Any:
        """Return the half of a list, if it has an item for each row."""
        if not isinstance(value, list) or len(value) != self.batch:
            return value
        return value[: self.batch // 2] if self.first else value[self.batch // 2 :]

    def of_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the half of a tensor, if it is batched."""
        return half_of(tensor, first=self.first) if _is_batched(tensor, self.batch) else tensor


def ambiguous_argument(inputs: Inputs, batch: int) -> str | None:
    """Return the name of an attention argument that may be batched or not; None if there is none.

    Only arguments that diffusers itself does not use are ambiguous, such as masks of regions for a custom processor.
    """
    for name in ATTENTION_KWARGS & inputs[1].keys():
        for key, value in (inputs[1][name] or {}).items():
            if key not in KNOWN_ATTENTION_KWARGS and any(_is_batched(tensor, batch) for tensor in tensors_in(value)):
                return str(key)
    return None


def _is_batched(tensor: torch.Tensor, batch: int) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] > 0 and tensor.shape[0] % batch == 0


def half_of(tensor: torch.Tensor, *, first: bool) -> torch.Tensor:
    """Return one half of a batch, `(batch // 2, ...)`."""
    return tensor.chunk(2)[0 if first else 1]


def mean_of_halves(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean of the two halves of a batch, `(batch // 2, ...)`."""
    first, second = tensor.chunk(2)
    return first / 2 + second / 2  # `(first + second) / 2` may overflow in half precision


def double(output: Any) -> Any:
    """Return the output of one branch twice, as both halves of a doubled batch."""
    return map_tensors(lambda tensor: torch.cat([tensor, tensor]), output)


def difference_of_halves(output: Any, *, first: bool) -> list[torch.Tensor]:
    """Return the difference of the two branches, for each tensor in a denoiser's output.

    The difference is the other branch minus the branch that goes on.

    Args:
        output: Output of both branches.
        first: Whether the first half goes on.
    """
    pairs = (tensor.chunk(2) if first else tensor.chunk(2)[::-1] for tensor in tensors_in(output))
    return [other - one for one, other in pairs]


def difference(one: Any, other: Any) -> list[torch.Tensor]:
    """Return `other` minus `one`, for each tensor in the outputs of two branches. The branch of `one` goes on."""
    return [second - first for first, second in zip(tensors_in(one), tensors_in(other), strict=True)]


def plus(output: Any, differences: Iterable[torch.Tensor]) -> Any:
    """Return the output of another branch: the output of the branch that goes on plus the differences."""
    rest = iter(differences)
    return map_tensors(lambda tensor: tensor + next(rest), output)


def with_difference(output: Any, differences: Iterable[torch.Tensor], *, first: bool) -> Any:
    """Return both halves of a denoiser's output: the branch that goes on, and the same plus the differences.

    Args:
        output: Output of the branch that goes on.
        differences: What the other branch differs by, for each tensor in `output`.
        first: Whether the branch that goes on is the first half.
    """
    others = iter(tensors_in(plus(output, differences)))

    def join(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([tensor, next(others)] if first else [next(others), tensor])

    return map_tensors(join, output)


def halves_are_equal(sample: Batch) -> bool:
    """Return whether the two halves of a batch are equal, as guidance makes them. This waits for the device."""
    half, rest = divmod(len(sample), 2)
    return not rest and all(torch.equal(*pair) for pair in zip(sample[:half], sample[half:], strict=True))


def has_lists(output: Any) -> bool:
    """Return whether a network's output has its pictures in a list."""
    return any(isinstance(value, list) for value in (output.values() if isinstance(output, Mapping) else output))


def as_tensors(output: Any) -> Any:
    """Return a network's output with a tensor `(batch, ...)` instead of each list of pictures."""
    if isinstance(output, list):
        return torch.stack(output)
    if isinstance(output, Mapping):
        return _like(output, {key: as_tensors(item) for key, item in output.items()})
    return tuple(map(as_tensors, output)) if isinstance(output, tuple) else output


def as_lists(output: Any) -> Any:
    """Undo `as_tensors`."""
    return map_tensors(lambda tensor: list(tensor.unbind()), output)  # type: ignore[arg-type, return-value]


def tensors_in(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested mappings, lists and tuples, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, list | tuple) else []


def map_tensors(change: Change, value: Any) -> Any:
    """Return `value` with `change` applied to each tensor in it, through nested mappings, lists and tuples."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return _like(value, {key: map_tensors(change, item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(change, item) for item in value)
    return value


def _like(value: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Return a mapping of the same class with these items. diffusers' outputs are dataclasses."""
    made: Any = type(value)
    return made(**items) if is_dataclass(value) else made(items)
