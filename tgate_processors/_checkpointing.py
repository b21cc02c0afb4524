"""Gradient checkpointing: what is computed again in the backward pass must find the gate as it was.

A checkpoint runs a block again when its gradients are asked for, long after the evaluation. So for an evaluation with
gradients the blocks' checkpointing function is one that puts the evaluation's modes and outputs in again around that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tgate_processors.errors import StateError


@contextmanager
def checkpoints_kept(network: torch.nn.Module, again: Callable[[], Any], is_gated: bool) -> Iterator[None]:
    """For an evaluation: its checkpoints, when they are computed again, are so within `again()`, a context manager.

    Args:
        network: The network that is evaluated.
        again: Puts the evaluation's modes and outputs in, and takes them out.
        is_gated: Whether any layer does more than compute.
    """
    name = "_gradient_checkpointing_func"
    blocks = [module for module in network.modules() if callable(getattr(module, name, None))]
    before = [(block, vars(block)[name]) for block in blocks if name in vars(block)]
    inside = [True]

    def kept(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            def evaluated(*args: Any, **kwargs: Any) -> Any:
                if not inside:
                    with again():
                        return function(*args, **kwargs)
                if is_gated and not torch.is_grad_enabled():
                    raise StateError(
                        "gradient checkpointing must not be reentrant beside T-GATE, whose stored outputs then have "
                        f"no gradients, got `use_reentrant=True` in {type(network).__name__}. "
                        "Call `enable_gradient_checkpointing()` without an argument."
                    )
                return function(*args, **kwargs)

            return checkpoint(evaluated, *args, **kwargs)

        return checkpointed

    for block, checkpoint in before:
        vars(block)[name] = kept(checkpoint)
    try:
        yield
    finally:
        inside.clear()
        for block, checkpoint in before:
            vars(block)[name] = checkpoint
