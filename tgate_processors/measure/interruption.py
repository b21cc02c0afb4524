"""Handling of Ctrl-C, which ends long work but keeps its results."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any


INTERRUPTED = 130  # exit code of an interrupted command, as in shells


@contextmanager
def keeping(done: Sized, settings: dict[str, Any]) -> Iterator[None]:
    """End the block on Ctrl-C, and set `settings["interrupted"]`. If `done` is empty, raise `KeyboardInterrupt`."""
    try:
        yield
    except KeyboardInterrupt:
        if not len(done):
            raise
        settings["interrupted"] = True
