"""Copies of networks whose forward can be run without weights, and writes to nothing of the original."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0

from tgate_processors._layers import attention_layers, is_of_diffusers
from tgate_processors._record import to_meta
from tgate_processors.errors import UnsupportedPipelineError


# In the names of diffusers' processors whose kernels are not of torch, and do not run without values.
OTHER_KERNELS = ("NPU", "XFormers", "XLA")


def meta_copy(network: Any, processors: Mapping[str, Any] | None = None) -> Any:
    """A network as it is now, adapters too, on the meta device in single precision.

    Quantized layers are Linear and Conv layers there, whose arithmetic they replace.

    Args:
        network: The network; nothing of it is written to.
        processors: The attention processors to copy, by the names of the layers; for one that is not of diffusers'
            own classes, or has a kernel of others, and is not to be run, the layer's default stands in. Without,
            those that it has.
    """
    model = structural_copy(network, to_meta, _as_plain)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.requires_grad_()  # torch runs it as one product then, whatever the strides of its input
    for name, layer in attention_layers(model).items():
        processor = layer.processor if processors is None else processors.get(name)
        layer._modules.pop("processor", None)
        layer.processor = _copy_of(processor) if _is_run(processor) else default_processor(layer)
    return model


def default_processor(layer: Any) -> Any:
    """The processor that diffusers gives a layer of this class.

    Raises:
        UnsupportedPipelineError: It gives none.
    """
    default = AttnProcessor2_0 if isinstance(layer, Attention) else getattr(layer, "_default_processor_cls", None)
    if default is None:
        raise UnsupportedPipelineError(f"{type(layer).__name__} has no default processor that could be counted")
    return default()


def _is_run(processor: Any) -> bool:
    """Whether a copy of a processor is run: it is of diffusers, and its kernel is of torch."""
    return is_of_diffusers(processor) and not any(kernel in type(processor).__name__ for kernel in OTHER_KERNELS)


def _copy_of(processor: Any) -> Any:
    if isinstance(processor, torch.nn.Module):
        copied = structural_copy(processor, to_meta)
    else:
        copied = copy.copy(processor)
        vars(copied).update(structural_copy(vars(processor), to_meta))
    if hasattr(copied, "_attention_backend"):
        copied._attention_backend = "native"  # others are not counted, or do not run without values
    return copied


def structural_copy(
    network: Any,
    change: Callable[[torch.Tensor], torch.Tensor],
    replace: Callable[[torch.nn.Module], torch.nn.Module | None] = lambda module: None,
) -> Any:
    """A network of the same modules with `change` applied to every tensor.

    What compiles, offloads or hooks its forwards is left behind.

    Args:
        network: The network, or what keeps parts of one in lists and dicts.
        change: Makes the copy's tensors.
        replace: Gives another module in a module's place, or None to copy it.
    """
    return _Copier(change, replace).copied(network)


class _Copier:
    """Copies modules and what they keep in lists and dicts, so that the copy's forward writes to nothing of theirs.

    What stands in several places is copied once.

    Args:
        change, replace: As `structural_copy` has them.
    """

    def __init__(
        self,
        change: Callable[[torch.Tensor], torch.Tensor],
        replace: Callable[[torch.nn.Module], torch.nn.Module | None],
    ) -> None:
        self._change = change
        self._replace = replace
        self._copies: dict[int, Any] = {}

    def copied(self, value: Any) -> Any:
        """A copy of a module, a tensor, a list, a dict, a generator or a part; anything else is itself."""
        if isinstance(value, torch.Tensor):
            return self._change(value)
        if isinstance(value, torch.nn.Module):
            value = getattr(value, "_orig_mod", value)  # torch.compile wraps it
        if id(value) in self._copies:
            return self._copies[id(value)]
        return self._module(value) if isinstance(value, torch.nn.Module) else self._holder(value)

    def _holder(self, value: Any) -> Any:
        """A copy of what may hold tensors."""
        if isinstance(value, torch.Generator):
            self._copies[id(value)] = value.clone_state()
        elif type(value) is list:
            copies = self._copies[id(value)] = []
            copies.extend(map(self.copied, value))
        elif type(value) is dict:
            self._copies[id(value)] = {}
            self._copies[id(value)].update({key: self.copied(item) for key, item in value.items()})
        elif _is_part(value):
            self._copies[id(value)] = copied = object.__new__(type(value))
            vars(copied).update({name: self.copied(item) for name, item in vars(value).items()})
        return self._copies.get(id(value), value)

    def _module(self, module: torch.nn.Module) -> torch.nn.Module:
        other = self._replace(module)
        if other is not None:
            self._copies[id(module)] = other
            return other
        copied: torch.nn.Module = object.__new__(type(module))
        self._copies[id(module)] = copied
        for name, value in vars(module).items():
            if "_hooks" in name:
                vars(copied)[name] = OrderedDict()
            elif name in ("_parameters", "_buffers", "_modules"):
                vars(copied)[name] = {key: self.copied(item) for key, item in value.items()}
            elif name not in ("forward", "_compiled_call_impl", "_diffusers_hook"):
                vars(copied)[name] = self.copied(value)
        return copied


def _is_part(value: Any) -> bool:
    """Whether a value is a part of a diffusers model that is no module: Z-Image's positions, which keep tensors."""
    is_object = hasattr(value, "__dict__") and not isinstance(value, Enum)
    return is_object and type(value).__module__.startswith("diffusers.models.")


def _as_plain(module: Any) -> torch.nn.Module | None:
    """The layer of torch, on the meta device, that a quantized one stands for; None where it is no such layer."""
    kind = type(module)
    if hasattr(module, "base_layer") or kind.__module__.startswith(("torch.nn.modules.", "diffusers.models.")):
        return None
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return torch.nn.Linear(module.in_features, module.out_features, device="meta")
    if isinstance(module, torch.nn.Conv2d):
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        return torch.nn.Conv2d(**{name: getattr(module, name) for name in names}, device="meta")
    return None


def build_on_meta(denoiser: Any, config: Any) -> Any:
    """A model of the diffusers class `denoiser` with this config, on the meta device."""
    with torch.device("meta"):
        return denoiser.from_config(config).to("meta").eval()
