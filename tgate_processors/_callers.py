"""Which pipeline makes a call: Python's own stack says it."""

import sys
from collections.abc import Iterator
from typing import Any

from diffusers import DiffusionPipeline, ModularPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback


class StepCallback:
    """A step callback that is an object of this library: what is called within it is no call of the loop."""


PIPELINES = (DiffusionPipeline, ModularPipeline)
CALLBACKS = (MultiPipelineCallbacks, PipelineCallback, StepCallback)


def callers() -> Iterator[Any]:
    """The pipelines, and the callback objects, whose methods are running in this thread, innermost first.

    A pipeline's loop is a method of it, so a call of a network belongs to the first pipeline here; where a callback is
    before it, the call is the callback's.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            if isinstance(owner, PIPELINES + CALLBACKS):
                yield owner
        frame = frame.f_back  # type: ignore[assignment]  # None at the end
