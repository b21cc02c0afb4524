"""Gradient checkpointing: a block that runs again in the backward pass must find the gate as it was.

A checkpoint runs its block again when the gradients are computed, after the evaluation has ended. So an evaluation
with gradients wraps each block's checkpointing function. The wrapper puts the evaluation's modes and stored outputs
back into the layers while the block runs again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tgate_processors.errors import StateError


@contextmanager
def checkpoints_kept(network: torch.nn.Module, again: Callable[[], Any], is_gated: bool) -> Iterator[None]:
    """Wrap the checkpoints of one evaluation, so that their blocks run again inside of `again()`.

    Args:
        network: The network that is evaluated.
        again: Returns a context manager that puts the evaluation's modes and stored outputs into the layers, and takes
            them out at its end.
        is_gated: Whether any layer stores or reuses in the evaluation.
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
                        "gradient checkpointing must not be reentrant with T-GATE, because its stored outputs then "
                        f"have no gradients, got `use_reentrant=True` in {type(network).__name__}. "
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
