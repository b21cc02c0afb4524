"""Which pipeline makes a call: Python's own stack says it."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline, ModularPipelineBlocks
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


class NotTheLoop:
    """An object of this library within whose methods a call is not the pipeline's loop's."""


PIPELINES = (DiffusionPipeline, ModularPipeline)
OTHERS = (MultiPipelineCallbacks, PipelineCallback, NotTheLoop)
LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, diffusers.__file__, __file__))


def callers(but: Any = None) -> Iterator[Any]:
    """The pipelines whose methods are running in this thread, innermost first, and what stands between.

    A pipeline's loop is a method of it, so a call of a network belongs to the first that is given here. Where that is
    a callback, or a network that is being evaluated, the call is no loop's. A callback may be any function: it is
    known by being of another file than the pipeline, and of none of the libraries that a loop calls through.

    Args:
        but: An object to pass over.
    """
    strangers: set[str] = set()
    for frame, owner in _frames():
        code = frame.f_code
        if isinstance(owner, PIPELINES):
            if strangers - {code.co_filename} and isinstance(owner, DiffusionPipeline):
                yield code  # somebody's callback; a modular pipeline has none, and blocks of other files
            yield owner
            strangers = set()
        elif isinstance(owner, OTHERS):
            if owner is not but:
                yield owner
        elif not isinstance(owner, torch.nn.Module) and not code.co_filename.startswith(LIBRARIES):
            strangers.add(code.co_filename)


def local_of(owner: Any, name: str) -> Any:
    """A local variable of a pipeline's innermost method that is running in this thread; None where none has it.

    A modular pipeline's methods are those of its blocks.
    """
    for frame, its in _frames():
        if (its is owner or isinstance(its, ModularPipelineBlocks)) and name in frame.f_locals:
            return frame.f_locals[name]
    return None


def _frames() -> Iterator[tuple[FrameType, Any]]:
    """What is running in this thread, innermost first: each frame, and the object that it is a method of, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        is_method = code.co_argcount and code.co_varnames[0] == "self"
        yield frame, frame.f_locals.get("self") if is_method else None
        frame = frame.f_back
