"""Multiply-accumulates of a gated run, counted by running the denoiser's architecture on the meta device."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from tgate_processors.gate import Gate
from tgate_processors.guidance import Inputs, map_tensors, sample_of, take_branch
from tgate_processors.processors import gated_processors
from tgate_processors.schedule import StepMode, TGateConfig


@dataclass(frozen=True)
class Evaluation:
    """One call of the denoiser: what its attention did, and the batch that it computed."""

    mode: StepMode
    batch: int


@dataclass(frozen=True)
class RunMacs:
    """Multiply-accumulates of a run, attention's matrix products among them, and of the same run ungated."""

    gated: int
    stock: int

    @property
    def saved(self) -> float:
        """The part of the stock run's arithmetic that was not done, 0 to 1."""
        return 1 - self.gated / self.stock


def on_meta(inputs: Inputs) -> Inputs:
    """A denoiser's inputs without their values."""
    args, kwargs = inputs
    return tuple(map_tensors(_to_meta, args)), map_tensors(_to_meta, kwargs)


def _to_meta(tensor: torch.Tensor) -> torch.Tensor:
    # the architecture is built in single precision, whatever the run's
    return torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)


def run_macs(denoiser: Any, config: TGateConfig, inputs: Inputs, evaluations: Sequence[Evaluation]) -> RunMacs:
    """Count a run by the evaluations that it made.

    Args:
        denoiser: A diffusers model; its architecture is built anew from its config, without weights.
        config: The settings that the run was gated with.
        inputs: What a planning evaluation of the denoiser was given, both branches, on the meta device.
        evaluations: The evaluations of the run, in their order.
    """
    model = meta_denoiser(denoiser)
    gate = Gate(config)
    model.set_attn_processor(gated_processors(model, gate))
    full = sample_of(inputs).shape[0]

    def macs(evaluation: Evaluation) -> int:
        gate.enter(evaluation.mode)
        folded = evaluation.batch < full
        args, kwargs = take_branch(inputs, full, "negative") if folded else inputs
        return _count(model, args, kwargs)

    stock = macs(Evaluation(StepMode.PLANNING, full))
    # In the order of the run the first reuse follows the first store, so each kind is run once.
    each = {evaluation: macs(evaluation) for evaluation in dict.fromkeys(evaluations)}
    return RunMacs(gated=sum(each[e] for e in evaluations), stock=stock * len(evaluations))


def meta_denoiser(denoiser: Any) -> Any:
    """The architecture of a diffusers model on the meta device: no weights, nothing computed."""
    model = getattr(denoiser, "_orig_mod", denoiser)  # torch.compile wraps it
    with torch.device("meta"):
        return type(model).from_config(model.config).to("meta").eval()


def _count(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(*args, **kwargs)
    return counter.get_total_flops() // 2  # a multiply-accumulate is two operations
