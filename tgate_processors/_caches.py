"""Integration of caches that keep outputs of the denoiser's blocks: diffusers' own (0.42) and cache-dit (1.5).

A cached output fits only the batch and the branches that it was computed for. So this module clears the caches where
these change: at the gate, at looks, and after a run that ends with one branch or before its last step. The step that
stores cross-attention computes every block, because the layers of a skipped block store nothing. At these times the
pipeline is inside the caches' context, so clearing must not end that context.
"""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.hooks.hooks import StateManager

from tgate_processors._modes import StepMode
from tgate_processors.errors import StateError


class Caches:
    """The caches of one denoiser, in one run.

    Args:
        denoiser: The denoiser.
        has_cross_attention: Whether the gate stores cross-attention in it.
    """

    def __init__(self, denoiser: torch.nn.Module, *, has_cross_attention: bool) -> None:
        self._denoiser = denoiser
        self._has_cross_attention = has_cross_attention
        self._batch: int | None = None
        self._mode: StepMode | None = None

    def before(self, batch: int, mode: StepMode, call: int) -> None:
        """Clear the caches if they do not fit the next evaluation, so that it computes every block.

        Only the first call for a timestep decides this. A later call would clear what the first one has just cached.

        Args:
            batch: Batch of the evaluation.
            mode: Mode of the evaluation.
            call: Number of the call for its timestep, from 0.
        """
        if call:
            return
        last, self._mode = self._mode, mode
        # A pipeline with several loops begins each loop with the caches of the loop before, which hold both branches.
        had_one_branch, had_batch = (False, batch) if last is None else (last.phase.has_one_branch, self._batch)
        stores = self._has_cross_attention and mode.cross_attention.stores and mode is not last
        changes = batch != had_batch or mode.phase.has_one_branch != had_one_branch or stores
        if changes:
            _reset_hooks(self._denoiser, begins=last is None)
        if changes or last is None:
            _reset_dit(self._denoiser, begins=last is None)
        self._batch = batch

    def left_out(self) -> None:
        """Count a call that was left out, because cache-dit tells the branches apart by counting calls."""
        for context in _dit_contexts(self._denoiser):
            if context.cache_config.enable_separate_cfg:
                context.transformer_executed_steps += 1
                context.accumulated_transformer_executed_steps += 1
                if context.cache_config.cfg_compute_first:
                    context.executed_steps += 1
                    context.accumulated_executed_steps += 1

    def was_shallow(self) -> bool:
        """Return False, because the caches do not tell which blocks were computed."""
        return False

    def forget(self, *, ended: bool) -> None:
        """Clear diffusers' caches if they hold one branch, or if the run did not reach its end.

        cache-dit's caches stay, because its own summary reads them after the run.

        Args:
            ended: Whether the run reached its last evaluation.
        """
        if self._mode is not None and (self._mode.phase.has_one_branch or not ended):
            _reset_hooks(self._denoiser, begins=True)


def caches_of(denoiser: torch.nn.Module, *, has_cross_attention: bool) -> Caches | None:
    """Return the caches that are enabled on a denoiser, however they were enabled; None if there are none."""
    if any(_hooks(denoiser)) or _dit_contexts(denoiser):
        return Caches(denoiser, has_cross_attention=has_cross_attention)
    return None


def check_drops_no_guidance(denoiser: torch.nn.Module) -> None:
    """Check that no cache drops guidance itself.

    Raises:
        StateError: FasterCache is enabled on the denoiser and leaves out the negative branch.
    """
    for _, hook in _hooks(denoiser):
        if type(hook).__name__ == "FasterCacheDenoiserHook" and not hook.is_guidance_distilled:
            raise StateError(
                f"`pipe` must not have FasterCache enabled on its {type(denoiser).__name__} together with T-GATE: "
                "FasterCache leaves out the negative branch itself, and takes every batch for two branches. Pass "
                "`FasterCacheConfig(is_guidance_distilled=True, ...)`, or disable one of the two."
            )


def _hooks(denoiser: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Any]]:
    """Yield the stateful hooks of diffusers, each with its module."""
    for module in denoiser.modules():
        registry: Any = vars(module).get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            if hook._is_stateful:
                yield module, hook


def _reset_hooks(denoiser: torch.nn.Module, *, begins: bool) -> None:
    # `_reset_stateful_cache` would end the context that the pipeline is in
    for module, hook in _hooks(denoiser):
        managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
        contexts = [(manager, _context_of(manager), dict(manager._state_cache)) for manager in managers]
        hook.reset_state(module)
        kind = type(hook).__name__
        for manager, context, states in contexts:
            manager.set_context(context)
            if kind == "MagCacheHeadHook" and not begins:
                for name, state in states.items():  # MagCache has a ratio for each step, so its count must go on
                    fresh = manager._state_cls(*manager._init_args, **manager._init_kwargs)
                    fresh.step_index = state.step_index
                    manager._state_cache[name] = fresh
        if kind == "FasterCacheBlockHook" and hook.is_guidance_distilled and not begins:
            hook.state.iteration = hook.block_skip_range  # at 0 it would skip a block that has no cached output


def _context_of(manager: StateManager) -> Any:
    return manager._context if hasattr(manager, "_context") else manager._current_context  # before diffusers 0.41


def _reset_dit(denoiser: Any, *, begins: bool) -> None:
    for context in _dit_contexts(denoiser):
        if begins:  # if cache-dit was enabled on the transformer alone, its contexts outlive a run
            kwargs = {name: value for name, value in context._init_kwargs.items() if name != "name"}
            denoiser._context_manager.reset_context(context.name, *context._init_args, **kwargs)
            continue
        context.clear_buffers()
        for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
            if calibrator is not None:
                calibrator.reset_cache()
        mask, step = context.cache_config.steps_computation_mask, context.executed_steps
        if mask is not None and step < len(mask):  # the mask may let this step reuse, with nothing cached
            context.cache_config = copy.copy(context.cache_config)  # every run shares the user's configuration
            context.cache_config.steps_computation_mask = [*mask[:step], 1, *mask[step + 1 :]]


def _dit_contexts(denoiser: Any) -> list[Any]:
    """Return cache-dit's contexts of a denoiser, one for each list of blocks."""
    manager = getattr(denoiser, "_context_manager", None)
    if manager is None:
        return []
    known = manager._cached_context_manager
    return [known[name] for name in denoiser._context_names if name in known]
