"""Copies of networks whose forward runs without weights and changes nothing in the original."""

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


# Parts of the names of diffusers' processors whose kernels come from outside torch, and do not run without weights.
OTHER_KERNELS = ("NPU", "XFormers", "XLA")


def meta_copy(network: Any, processors: Mapping[str, Any] | None = None) -> Any:
    """Return a copy of a network with its adapters, on the meta device in single precision.

    The copy has a Linear or Conv layer for each quantized one.

    Args:
        network: The network, which is not changed.
        processors: Attention processors to copy, by layer name; None takes those that the network has. If a processor
            is not of a diffusers class, or its kernel comes from outside torch, the layer's default processor
            replaces it.
    """
    model = structural_copy(network, to_meta, _as_plain)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.requires_grad_()  # torch then runs it as one product for any strides of its input
    for name, layer in attention_layers(model).items():
        processor = layer.processor if processors is None else processors.get(name)
        layer._modules.pop("processor", None)
        layer.processor = _copy_of(processor) if _is_run(processor) else default_processor(layer)
    return model


def default_processor(layer: Any) -> Any:
    """Return the processor that diffusers gives a layer of this class.

    Raises:
        UnsupportedPipelineError: diffusers has no default processor for the class.
    """
    default = AttnProcessor2_0 if isinstance(layer, Attention) else getattr(layer, "_default_processor_cls", None)
    if default is None:
        raise UnsupportedPipelineError(f"{type(layer).__name__} has no default processor that could be counted")
    return default()


def _is_run(processor: Any) -> bool:
    """Return whether a copy of the processor can run: its class is of diffusers and its kernel is of torch."""
    return is_of_diffusers(processor) and not any(kernel in type(processor).__name__ for kernel in OTHER_KERNELS)


def _copy_of(processor: Any) -> Any:
    if isinstance(processor, torch.nn.Module):
        copied = structural_copy(processor, to_meta)
    else:
        copied = copy.copy(processor)
        vars(copied).update(structural_copy(vars(processor), to_meta))
    if hasattr(copied, "_attention_backend"):
        copied._attention_backend = "native"  # other backends are not counted, or do not run without weights
    return copied


def structural_copy(
    network: Any,
    change: Callable[[torch.Tensor], torch.Tensor],
    replace: Callable[[torch.nn.Module], torch.nn.Module | None] = lambda module: None,
) -> Any:
    """Return a copy of a network's modules with `change` applied to every tensor.

    The copy has no hooks, and no forwards that compilation or offloading replaced.

    Args:
        network: The network, or a list or dict that holds parts of one.
        change: Makes a tensor of the copy from a tensor of the network.
        replace: Returns another module to use instead of the one given, or None to copy that one.
    """
    return _Copier(change, replace).copied(network)


class _Copier:
    """Copies modules, and the lists and dicts in them, so that the copy's forward changes nothing in the original.

    An object that occurs in several places is copied once.

    Args:
        change, replace: As in `structural_copy`.
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
        """Copy a module, tensor, list, dict, generator or part of a model. Return any other value as it is."""
        if isinstance(value, torch.Tensor):
            return self._change(value)
        if isinstance(value, torch.nn.Module):
            value = getattr(value, "_orig_mod", value)  # torch.compile wraps it
        if id(value) in self._copies:
            return self._copies[id(value)]
        return self._module(value) if isinstance(value, torch.nn.Module) else self._holder(value)

    def _holder(self, value: Any) -> Any:
        """Copy a value that may hold tensors."""
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
    """Return whether a value is an object of a diffusers model but no module, such as Z-Image's positions."""
    is_object = hasattr(value, "__dict__") and not isinstance(value, Enum)
    return is_object and type(value).__module__.startswith("diffusers.models.")


def _as_plain(module: Any) -> torch.nn.Module | None:
    """Return the torch layer, on the meta device, that a quantized layer replaced; None for any other module."""
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
    """Return a model of the diffusers class `denoiser` with this config, on the meta device."""
    with torch.device("meta"):
        return denoiser.from_config(config).to("meta").eval()
