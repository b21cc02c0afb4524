"""Arithmetic of a network's evaluations, counted on a copy without weights that runs on the meta device.

The copy is stock: the cost of a reused layer is subtracted afterwards. The user's own objects neither run nor change.
Processors of diffusers are copied, and any other processor is counted as diffusers' default.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from tgate_processors import _deepcache as dc
from tgate_processors._folding import Inputs, batch_of, map_tensors, sample_of, take_half, tensors_in
from tgate_processors._layers import attention_layers, cross_attention_layers, is_joint
from tgate_processors._modes import AttentionMode, StepMode
from tgate_processors._record import Evaluation
from tgate_processors._store import kinds
from tgate_processors._tables import Shown, Table


# Operators of Linear and Conv layers. Attention's two products and similar matrix products are other operators.
LINEAR_AND_CONV = {"aten.convolution", "aten.addmm", "aten.mm"}


@dataclass(frozen=True)
class Cost(Shown):
    """Cost of some evaluations. Costs can be added.

    Args:
        macs: Multiply-accumulates, including attention's matrix products.
        linear_and_conv_macs: Multiply-accumulates of Linear and Conv layers alone. The papers count these, because
            their tool calflops does not see `scaled_dot_product_attention`.
        cross_computed, cross_reused: Number of calls of cross-attention layers.
        self_computed, self_reused: Number of calls of self-attention layers.
    """

    macs: int = 0
    linear_and_conv_macs: int = 0
    cross_computed: int = 0
    cross_reused: int = 0
    self_computed: int = 0
    self_reused: int = 0

    def _parts(self) -> Iterator[Table]:
        yield Table(
            [
                ("GMACs", f"{self.macs / 1e9:.3f}"),
                ("GMACs, Linear and Conv only", f"{self.linear_and_conv_macs / 1e9:.3f}"),
                ("cross-attention", f"{self.cross_computed} calls computed, {self.cross_reused} reused"),
                ("self-attention", f"{self.self_computed} calls computed, {self.self_reused} reused"),
            ],
            has_heading=False,
        )

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class _Layer:
    """Cost and output size of an attention layer's calls in an evaluation that computes everything."""

    is_cross: bool
    is_gated: bool
    calls: int = 0
    macs: int = 0
    linear_and_conv_macs: int = 0
    output_bytes: int = 0


@dataclass
class _Profile:
    """Cost of an evaluation that computes everything."""

    macs: int = 0
    linear_and_conv_macs: int = 0
    layers: dict[str, _Layer] = field(default_factory=dict)

    def cost(self, mode: StepMode, missed: Iterable[str] = ()) -> Cost:
        """Return the cost of the evaluation in a mode. The layers in `missed` compute in a mode that reuses, too."""
        counted, modes = Cost(self.macs, self.linear_and_conv_macs), dict(kinds(mode))
        for name, layer in self.layers.items():
            kind = "cross" if layer.is_cross else "self"
            if modes[layer.is_cross] is AttentionMode.REUSE and layer.is_gated and name not in missed:
                counted += Cost(-layer.macs, -layer.linear_and_conv_macs, **{f"{kind}_reused": layer.calls})
            else:
                counted += Cost(**{f"{kind}_computed": layer.calls})
        return counted


class NetworkCost:
    """Counter of the cost of one network's evaluations. It runs each kind of evaluation once.

    Args:
        model: Copy of the network, from `meta_copy` or `build_on_meta`.
        inputs: Inputs that the pipeline gave the network, with both branches of guidance, on the meta device.
        deepcache: The run's `DeepCacheSDHelper`, if any.
    """

    def __init__(self, model: Any, inputs: Sequence[Inputs], deepcache: Any = None) -> None:
        self._model = model
        self._inputs = inputs
        self._deepcache = deepcache
        self._profiles: dict[tuple[int, int, bool], _Profile] = {}

    def of(self, evaluations: Iterable[Evaluation]) -> Cost:
        """Return the total cost of these evaluations."""
        return sum((self._profile(e).cost(e.mode, e.missed) for e in evaluations), Cost())

    def stock(self, given: Iterable[int]) -> Cost:
        """Return the total cost of the stock network's calls.

        Args:
            given: Index into `inputs` for each call.
        """
        calls = (Evaluation(StepMode.PLANNING, self._batch_of(index), given=index) for index in given)
        return self.of(calls)

    def peak_cache_bytes(self, evaluations: Iterable[Evaluation]) -> int:
        """Return the largest number of bytes of attention output that a run keeps at a time, in single precision."""
        kept, peak = {True: 0, False: 0}, 0
        for evaluation in evaluations:
            layers = self._profile(evaluation).layers.values()
            for cross, mode in kinds(evaluation.mode):
                if mode.stores:
                    put_out = sum(layer.output_bytes for layer in layers if layer.is_cross is cross)
                    kept[cross] = put_out if mode is AttentionMode.STORE else put_out // 2
                elif mode is AttentionMode.COMPUTE:
                    kept[cross] = 0
            peak = max(peak, sum(kept.values()))
        return peak

    def _batch_of(self, given: int) -> int:
        return batch_of(self._inputs[given])

    def _profile(self, evaluation: Evaluation) -> _Profile:
        key = (evaluation.given, evaluation.batch, evaluation.shallow)
        if key not in self._profiles:
            inputs, batch = self._inputs[evaluation.given], self._batch_of(evaluation.given)
            if evaluation.batch < batch:
                inputs = take_half(inputs, batch, first=True)
            with ExitStack() as stack:
                if self._deepcache is not None:
                    inputs = _with_deepcache(self._model, self._deepcache, inputs, evaluation.shallow, stack)
                self._profiles[key] = _count(self._model, inputs)
        return self._profiles[key]


def _with_deepcache(model: Any, deepcache: Any, inputs: Inputs, shallow: bool, stack: ExitStack) -> Inputs:
    """Enable DeepCache on the model with the same settings, and return the inputs of a full or a shallow step.

    The model then has a run of two timesteps: 0 is a full step, and 1 is a shallow one.
    """
    pipe = SimpleNamespace(unet=model, scheduler=SimpleNamespace(timesteps=[0, 1]))
    helper = type(deepcache)(pipe=pipe)
    helper.params = deepcache.params
    stack.enter_context(dc.enabled(helper))
    (sample, _, *rest), kwargs = inputs  # DeepCache reads the timestep's value
    if shallow:
        with torch.no_grad():
            model(sample, torch.tensor(0), *rest, **kwargs)
    return (sample, torch.tensor(int(shallow)), *rest), kwargs


def _count(model: Any, inputs: Inputs) -> _Profile:
    args, kwargs = map_tensors(lambda tensor: tensor, inputs)  # new lists, because HunyuanDiT empties that of controls
    if hasattr(model, "_tome_info"):  # tomesd records the sample's size in a hook, which the copy does not have
        model._tome_info["size"] = tensors_in(sample_of(inputs))[0].shape[2:]
    profile = _Profile()
    counter = FlopCounterMode(display=False)
    cross = cross_attention_layers(model)
    with ExitStack() as stack:
        for name, layer in attention_layers(model).items():
            profile.layers[name] = counted = _Layer(name in cross, is_gated=not is_joint(layer))
            for hook in _count_calls(layer, counted, counter):
                stack.callback(hook.remove)
        with torch.no_grad(), counter:
            model(*args, **kwargs)
    profile.macs, profile.linear_and_conv_macs = _macs(counter)
    return profile


def _count_calls(layer: torch.nn.Module, counted: _Layer, counter: FlopCounterMode) -> tuple[RemovableHandle, ...]:
    def subtract(*_: Any) -> None:
        macs, linear_and_conv_macs = _macs(counter)
        counted.macs -= macs
        counted.linear_and_conv_macs -= linear_and_conv_macs

    def add(layer: Any, args: Any, output: Any) -> None:
        macs, linear_and_conv_macs = _macs(counter)
        counted.macs += macs
        counted.linear_and_conv_macs += linear_and_conv_macs
        counted.calls += 1
        counted.output_bytes += sum(tensor.nbytes for tensor in tensors_in(output))

    return layer.register_forward_pre_hook(subtract), layer.register_forward_hook(add)


def _macs(counter: FlopCounterMode) -> tuple[int, int]:
    flops = {str(operator): flops for operator, flops in counter.flop_counts["Global"].items()}
    linear_and_conv = sum(count for operator, count in flops.items() if operator in LINEAR_AND_CONV)
    return sum(flops.values()) // 2, linear_and_conv // 2
