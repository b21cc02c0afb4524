"""What evaluations of a denoiser cost, counted by running its architecture on the meta device, without weights."""

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tgate_processors import deepcache as dc
from tgate_processors.gate import Gate
from tgate_processors.guidance import Inputs, map_tensors, sample_of, take_half
from tgate_processors.layers import attention_layers, cross_attention_layers, set_processors
from tgate_processors.processors import GatedProcessor, gated_processors
from tgate_processors.schedule import StepMode, TGateConfig


# What counts as Linear and Conv; attention's two products and the like are matrix products beside these.
LINEAR_AND_CONV = {"aten.convolution", "aten.addmm", "aten.mm"}


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser: what its attention did, what batch it computed, whether DeepCache skipped layers."""

    mode: StepMode
    batch: int
    shallow: bool = False


@dataclass(frozen=True)
class Cost:
    """What evaluations cost; costs add up.

    Args:
        macs: Multiply-accumulates, attention's matrix products among them.
        linear_and_conv_macs: Those of Linear and Conv layers alone, the convention of the papers (calflops does not
            see `scaled_dot_product_attention`).
        cross_computed, cross_reused: Calls of cross-attention layers.
        self_computed, self_reused: Calls of self-attention layers.
    """

    macs: int = 0
    linear_and_conv_macs: int = 0
    cross_computed: int = 0
    cross_reused: int = 0
    self_computed: int = 0
    self_reused: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: value + getattr(other, name) for name, value in vars(self).items()})


def on_meta(inputs: Inputs) -> Inputs:
    """A denoiser's inputs without their values."""
    args, kwargs = inputs
    return tuple(map_tensors(_to_meta, args)), map_tensors(_to_meta, kwargs)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    # the architecture is built in single precision, whatever the run's
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)


def meta_copy(network: Any) -> Any:
    """A network as it is now, adapters and replaced processors too, on the meta device in single precision."""
    return structural_copy(network, _to_meta)


def structural_copy(network: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A network of the same modules with `change` applied to every tensor.

    What compiles, offloads or hooks its forwards is left behind.
    """
    network = getattr(network, "_orig_mod", network)  # torch.compile wraps it
    copy = network.__class__.__new__(network.__class__)
    for name, value in vars(network).items():
        if name.endswith("_hooks"):
            vars(copy)[name] = OrderedDict()
        elif name not in ("forward", "_compiled_call_impl"):
            vars(copy)[name] = change(value) if isinstance(value, torch.Tensor) else value
    for kind in ("_parameters", "_buffers"):
        tensors = getattr(network, kind)
        setattr(copy, kind, {name: None if t is None else change(t) for name, t in tensors.items()})
    children = network._modules.items()
    copy._modules = {name: None if child is None else structural_copy(child, change) for name, child in children}
    return copy


def build_on_meta(denoiser: Any, config: Any) -> Any:
    """A model of the diffusers class `denoiser` with this config, on the meta device."""
    with torch.device("meta"):
        return denoiser.from_config(config).to("meta").eval()


def total(costs: Mapping[Evaluation, Cost], evaluations: Iterable[Evaluation]) -> Cost:
    """What these evaluations cost together."""
    return sum((costs[evaluation] for evaluation in evaluations), Cost())


def evaluation_costs(
    model: Any, config: TGateConfig, inputs: Inputs, evaluations: Sequence[Evaluation], deepcache: Any = None
) -> tuple[dict[Evaluation, Cost], int]:
    """The cost of each kind of evaluation among `evaluations`, each run once, and the bytes kept at the peak.

    Args:
        model: From `meta_copy` or `build_on_meta`; it is gated here.
        config: The gate's settings.
        inputs: What the ungated evaluation is given, both branches of guidance, on the meta device.
        evaluations: Evaluations in the order of a run, in which the first reuse follows the first store.
        deepcache: The `DeepCacheSDHelper` of the run, where there is one.
    """
    gate = Gate(config)
    set_processors(model, gated_processors(model, gate))
    full_batch = sample_of(inputs).shape[0]
    costs = {}
    with ExitStack() as stack:
        helper = None if deepcache is None else _beside(model, deepcache, stack)
        for evaluation in dict.fromkeys(evaluations):
            gate.enter(evaluation.mode)
            given = inputs
            if evaluation.batch < full_batch:
                given = take_half(inputs, full_batch, first=True)
            if helper is not None:
                given = _for_deepcache(given, helper, evaluation.shallow)
            costs[evaluation] = _count(model, given)
    gate.stop()
    return costs, gate.peak_cache_bytes


def _beside(model: Any, deepcache: Any, stack: ExitStack) -> Any:
    """The same helper on the model, in a run of two timesteps: a full one at 0, a shallow one at 1."""
    pipe = SimpleNamespace(unet=model, scheduler=SimpleNamespace(timesteps=[0, 1]))
    helper = type(deepcache)(pipe=pipe)
    helper.params = deepcache.params
    stack.enter_context(dc.enabled(helper))
    return helper


def _for_deepcache(inputs: Inputs, helper: Any, shallow: bool) -> Inputs:
    if not shallow:
        dc.make_next_step_full(helper)
    (sample, _, *rest), kwargs = inputs
    return (sample, torch.tensor(int(shallow)), *rest), kwargs  # DeepCache reads the timestep's value


def _count(model: torch.nn.Module, inputs: Inputs) -> Cost:
    args, kwargs = map_tensors(lambda tensor: tensor, inputs)  # HunyuanDiT empties the list of its controls
    calls: Counter[str] = Counter()
    cross = cross_attention_layers(model)
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, _, kind="cross" if name in cross else "self": calls.update([_kind_of_call(layer, kind)])
        )
        for name, layer in attention_layers(model).items()
    ]
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    operations = {str(operator): flops // 2 for operator, flops in counter.get_flop_counts()["Global"].items()}
    linear_and_conv = sum(macs for operator, macs in operations.items() if operator in LINEAR_AND_CONV)
    return Cost(macs=sum(operations.values()), linear_and_conv_macs=linear_and_conv, **calls)


def _kind_of_call(layer: Any, kind: str) -> str:
    reuses = isinstance(layer.processor, GatedProcessor) and layer.processor.reuses
    return f"{kind}_{'reused' if reuses else 'computed'}"
