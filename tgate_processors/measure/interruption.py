"""Ctrl-C in long work: it ends, and what is done is kept."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any


INTERRUPTED = 130  # the exit code of a command, as a shell has it


@contextmanager
def keeping(done: Sized, settings: dict[str, Any]) -> Iterator[None]:
    """Ctrl-C ends the block and is noted in `settings`; it is raised where nothing is done yet."""
    try:
        yield
    except KeyboardInterrupt:
        if not len(done):
            raise
        settings["interrupted"] = True
