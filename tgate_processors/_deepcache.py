"""Integration of DeepCache (Ma et al. 2023, the `DeepCache` package 0.1.1), which skips the deep layers in most steps.

Two steps must be full ones. In the step that stores, every cross-attention layer must compute. In the step in which
the gate drops guidance, the batch is half as large, so the deep features of DeepCache's last full step do not fit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tgate_processors._interception import attributes_restored
from tgate_processors._modes import StepMode
from tgate_processors._validation import require_whole
from tgate_processors.errors import MissingPackageError, StateError


def is_enabled(denoiser: torch.nn.Module) -> bool:
    """Return whether a DeepCache helper wraps the denoiser's forward."""
    return getattr(denoiser.forward, "__qualname__", "").startswith("DeepCacheSDHelper.")


def make_helper(pipe: Any, cache_interval: int, cache_branch_id: int) -> Any:
    """Return a DeepCache helper for the pipeline, not yet enabled.

    Raises:
        ConfigError: An argument breaks its rule.
        MissingPackageError: The `DeepCache` package is not installed.
    """
    require_whole("cache_interval", cache_interval, least=1)
    require_whole("cache_branch_id", cache_branch_id, least=0)
    try:
        from DeepCache import DeepCacheSDHelper  # an optional extra, so imported only here
    except ImportError as error:
        raise MissingPackageError(
            "`DeepCache` must be installed to use it. Run `pip install 'tgate-processors[deepcache]'`."
        ) from error
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=cache_interval, cache_branch_id=cache_branch_id)
    return helper


@contextmanager
def enabled(helper: Any) -> Iterator[None]:
    """Enable DeepCache inside of the context.

    Afterwards each module has its own `forward` attribute again, or none if it had none before.

    Raises:
        StateError: A DeepCache helper is enabled on the pipeline already.
    """
    denoiser = helper.pipe.unet
    if is_enabled(denoiser):
        raise StateError(
            "`pipe` must not have DeepCache enabled already, got an enabled helper. Call its `disable()` first."
        )
    with attributes_restored(denoiser, "forward"):  # `disable` leaves a `forward` attribute on each module
        helper.enable()
        try:
            yield
        finally:
            helper.disable()


class DeepFeatures:
    """DeepCache's deep features in one run. They are cleared when they do not fit the gate.

    Args:
        helper: The `DeepCacheSDHelper` that is enabled on the denoiser.
    """

    def __init__(self, helper: Any) -> None:
        self._helper = helper
        self._batch: int | None = None
        self._mode: StepMode | None = None

    def before(self, batch: int, mode: StepMode, call: int) -> None:
        """Make the next evaluation a full one if the batch has changed or if cross-attention is stored."""
        if batch != self._batch or (mode.cross_attention.stores and mode is not self._mode):
            self._forget()
        self._batch, self._mode = batch, mode

    def left_out(self) -> None:
        """Do nothing, because no UNet that DeepCache supports has a call for each branch."""

    def was_shallow(self) -> bool:
        """Return whether the last evaluation skipped the deep layers."""
        since = self._helper.cur_timestep - self._helper.start_timestep
        return bool(since % self._helper.params["cache_interval"])

    def forget(self, *, ended: bool) -> None:
        """Clear the deep features."""
        self._forget()

    def _forget(self) -> None:
        """Clear the deep features. DeepCache's interval begins anew with the next evaluation."""
        self._helper.cached_output.clear()
        self._helper.start_timestep = None
