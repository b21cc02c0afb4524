"""Running beside caches that keep what blocks of the denoiser put out: diffusers' own (0.42) and cache-dit (1.5).

What they keep fits the batch and the branches that it was kept for, so it is let go where these change: at the gate,
at looks, and after a run that ends with one branch, or too early. The step that stores cross-attention is evaluated
whole: a block that is skipped keeps nothing. The pipeline is in the caches' context then, which goes on.
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
        denoiser: The network.
        has_cross_attention: Whether cross-attention is stored.
    """

    def __init__(self, denoiser: torch.nn.Module, *, has_cross_attention: bool) -> None:
        self._denoiser = denoiser
        self._has_cross_attention = has_cross_attention
        self._batch: int | None = None
        self._mode: StepMode | None = None

    def before(self, batch: int, mode: StepMode, call: int) -> None:
        """Have the next evaluation computed whole, where what is kept does not fit it.

        It is decided in the first call for a timestep. A later one would take what the first has just kept.
        """
        if call:
            return
        last, self._mode = self._mode, mode
        # A pipeline of several loops begins each with what the last has kept: so does this, with both branches.
        had_one_branch, had_batch = (False, batch) if last is None else (last.phase.has_one_branch, self._batch)
        stores = self._has_cross_attention and mode.cross_attention.stores and mode is not last
        changes = batch != had_batch or mode.phase.has_one_branch != had_one_branch or stores
        if changes:
            _reset_hooks(self._denoiser, begins=last is None)
        if changes or last is None:
            _reset_dit(self._denoiser, begins=last is None)
        self._batch = batch

    def left_out(self) -> None:
        """Count a call that is left out, where cache-dit tells the branches apart by counting."""
        for context in _dit_contexts(self._denoiser):
            if context.cache_config.enable_separate_cfg:
                context.transformer_executed_steps += 1
                context.accumulated_transformer_executed_steps += 1
                if context.cache_config.cfg_compute_first:
                    context.executed_steps += 1
                    context.accumulated_executed_steps += 1

    def was_shallow(self) -> bool:
        """Never: which blocks were computed is not known."""
        return False

    def forget(self, *, ended: bool) -> None:
        """Let go what diffusers' caches keep of one branch, or of a run that was cut short.

        cache-dit's is read after the run, for its summary.
        """
        if self._mode is not None and (self._mode.phase.has_one_branch or not ended):
            _reset_hooks(self._denoiser, begins=True)


def caches_of(denoiser: torch.nn.Module, *, has_cross_attention: bool) -> Caches | None:
    """The caches that are on a denoiser, in whatever way they were put there; None where there are none."""
    if any(_hooks(denoiser)) or _dit_contexts(denoiser):
        return Caches(denoiser, has_cross_attention=has_cross_attention)
    return None


def check_drops_no_guidance(denoiser: torch.nn.Module) -> None:
    """Whether no cache does the gate's own work.

    Raises:
        StateError: FasterCache is on the denoiser, and leaves out the negative branch itself.
    """
    for _, hook in _hooks(denoiser):
        if type(hook).__name__ == "FasterCacheDenoiserHook" and not hook.is_guidance_distilled:
            raise StateError(
                f"`pipe` must not have FasterCache enabled on its {type(denoiser).__name__} beside T-GATE, which "
                "leaves out the negative branch itself and takes every batch for two branches. Pass "
                "`FasterCacheConfig(is_guidance_distilled=True, ...)`, or disable one of the two."
            )


def _hooks(denoiser: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, Any]]:
    """diffusers' hooks that keep something from call to call, and where they are."""
    for module in denoiser.modules():
        registry: Any = vars(module).get("_diffusers_hook")
        for hook in registry.hooks.values() if registry is not None else ():
            if hook._is_stateful:
                yield module, hook


def _reset_hooks(denoiser: torch.nn.Module, *, begins: bool) -> None:
    # not by `_reset_stateful_cache`, which ends the context that the pipeline is in
    for module, hook in _hooks(denoiser):
        managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
        contexts = [(manager, _context_of(manager), dict(manager._state_cache)) for manager in managers]
        hook.reset_state(module)
        kind = type(hook).__name__
        for manager, context, states in contexts:
            manager.set_context(context)
            if kind == "MagCacheHeadHook" and not begins:
                for name, state in states.items():  # its ratios are of a step: it goes on counting
                    fresh = manager._state_cls(*manager._init_args, **manager._init_kwargs)
                    fresh.step_index = state.step_index
                    manager._state_cache[name] = fresh
        if kind == "FasterCacheBlockHook" and hook.is_guidance_distilled and not begins:
            hook.state.iteration = hook.block_skip_range  # in the first it would skip, with nothing kept


def _context_of(manager: StateManager) -> Any:
    return manager._context if hasattr(manager, "_context") else manager._current_context  # before diffusers 0.41


def _reset_dit(denoiser: Any, *, begins: bool) -> None:
    for context in _dit_contexts(denoiser):
        if begins:  # those of a transformer that is enabled without its pipeline live on from run to run
            kwargs = {name: value for name, value in context._init_kwargs.items() if name != "name"}
            denoiser._context_manager.reset_context(context.name, *context._init_args, **kwargs)
            continue
        context.clear_buffers()
        for calibrator in (*context.get_calibrators(), *context.get_cfg_calibrators()):
            if calibrator is not None:
                calibrator.reset_cache()
        mask, step = context.cache_config.steps_computation_mask, context.executed_steps
        if mask is not None and step < len(mask):  # it would reuse in this step, with nothing kept
            context.cache_config = copy.copy(context.cache_config)  # the user's own serves every run
            context.cache_config.steps_computation_mask = [*mask[:step], 1, *mask[step + 1 :]]


def _dit_contexts(denoiser: Any) -> list[Any]:
    """cache-dit's contexts of a denoiser, one for each list of blocks."""
    manager = getattr(denoiser, "_context_manager", None)
    if manager is None:
        return []
    known = manager._cached_context_manager
    return [known[name] for name in denoiser._context_names if name in known]
