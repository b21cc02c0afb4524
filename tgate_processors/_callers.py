"""Which pipeline makes a call: Python's own stack says it."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


class NotTheLoop:
    """An object of this library within whose methods a call is not the pipeline's loop's."""


PIPELINES = (DiffusionPipeline, ModularPipeline)
OTHERS = (MultiPipelineCallbacks, PipelineCallback, NotTheLoop)


def callers(but: Any = None) -> Iterator[Any]:
    """The pipelines whose methods are running in this thread, innermost first, and what stands between.

    A pipeline's loop is a method of it, so a call of a network belongs to the first that is given here. Where that is
    a callback, or a network that is being evaluated, the call is no loop's.

    Args:
        but: An object to pass over.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        names = code.co_varnames[: code.co_argcount]
        if names[:1] == ("self",):
            owner = frame.f_locals.get("self")
            if isinstance(owner, PIPELINES + OTHERS) and owner is not but:
                yield owner
            names = names[1:]
        if len(names) == 4 and isinstance(frame.f_locals.get(names[0]), DiffusionPipeline):
            yield code  # somebody's `callback_on_step_end(pipe, step_index, timestep, callback_kwargs)`
        frame = frame.f_back
