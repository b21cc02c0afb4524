"""Which pipeline makes a call of a network, found on Python's call stack."""

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
    """Base of this library's classes whose methods call networks or user code outside the pipeline's loop."""


PIPELINES = (DiffusionPipeline, ModularPipeline)
OTHERS = (MultiPipelineCallbacks, PipelineCallback, NotTheLoop)
LIBRARIES = tuple(str(Path(file).parent) for file in (torch.__file__, diffusers.__file__, __file__))


def callers(but: Any = None) -> Iterator[Any]:
    """Yield the pipelines whose methods are running in this thread, innermost first, and callers between them.

    A pipeline's loop is one of its methods, so a network call belongs to the first object that this yields. If the
    first object is a callback, or a network that is being evaluated, the call belongs to no loop. A callback may be
    any function. It is recognised by its file, which is neither the pipeline's nor one of torch, diffusers or this
    library.

    Args:
        but: Object to leave out.
    """
    strangers: set[str] = set()
    for frame, owner in _frames():
        code = frame.f_code
        if isinstance(owner, PIPELINES):
            if strangers - {code.co_filename} and isinstance(owner, DiffusionPipeline):
                yield code  # a callback; a modular pipeline has no callbacks, and its blocks may be in other files
            yield owner
            strangers = set()
        elif isinstance(owner, OTHERS):
            if owner is not but:
                yield owner
        elif not isinstance(owner, torch.nn.Module) and not code.co_filename.startswith(LIBRARIES):
            strangers.add(code.co_filename)


def local_of(owner: Any, name: str) -> Any:
    """Return a local variable of a pipeline method that is running in this thread; None if no method has it.

    If several methods have it, the innermost counts. The methods of a modular pipeline are those of its blocks.
    """
    for frame, frame_owner in _frames():
        if (frame_owner is owner or isinstance(frame_owner, ModularPipelineBlocks)) and name in frame.f_locals:
            return frame.f_locals[name]
    return None


def _frames() -> Iterator[tuple[FrameType, Any]]:
    """Yield each frame of this thread, innermost first, with the object whose method it runs, or None."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        is_method = code.co_argcount and code.co_varnames[0] == "self"
        yield frame, frame.f_locals.get("self") if is_method else None
        frame = frame.f_back
