"""Standing before and after a module's call, outside of whatever compiles, offloads or hooks its forward.

A forward hook stands inside: `module.compile()` traces it, and it cannot leave the forward out. So the module gets a
subclass of its own class whose `__call__` asks the interceptors, as `torch.nn.utils.parametrize` and FSDP do.
"""

import weakref
from typing import Any, Protocol

import torch

from tgate_processors.guidance import Inputs


class Interceptor(Protocol):
    """What is asked around a call."""

    def before(self, inputs: Inputs) -> Inputs | None:
        """The arguments to call with, or None to leave the call out."""

    def after(self, output: Any) -> Any:
        """What the caller gets. `output` is None where the call was left out."""


def interceptors(module: torch.nn.Module) -> list[Interceptor]:
    """Who stands around the module's calls, outermost first."""
    found: list[Interceptor] = getattr(type(module), "_tgate_interceptors", [])
    return found


def intercept(module: torch.nn.Module, interceptor: Interceptor) -> None:
    """Have `interceptor` asked around every call of `module`."""
    if not interceptors(module):
        # Past `OptimizedModule.__setattr__`, which would write to the module that it wraps.
        object.__setattr__(module, "__class__", _intercepted_class(module))
    interceptors(module).append(interceptor)


def release(module: torch.nn.Module, interceptor: Interceptor) -> None:
    """Undo `intercept`: after the last one the module has its own class again. Safe to call twice."""
    standing = interceptors(module)
    if interceptor in standing:
        standing.remove(interceptor)
        if not standing:
            object.__setattr__(module, "__class__", type(module).__base__)


def _intercepted_class(module: torch.nn.Module) -> type:
    base: Any = type(module)
    intercepted = weakref.ref(module)
    standing: list[Interceptor] = []

    # Not `recursive`: `torch.compile` of the intercepted module shall compile what is called here.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # of torch
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if intercepted() is not self:
            return base.__call__(self, *args, **kwargs)  # a deep copy: it has the class, and nobody asked for it
        inputs: Inputs | None = (args, kwargs)
        asked: list[Interceptor] = []
        for interceptor in standing:
            asked.append(interceptor)
            assert inputs is not None
            inputs = interceptor.before(inputs)
            if inputs is None:
                break
        output = None if inputs is None else base.__call__(self, *inputs[0], **inputs[1])
        for interceptor in reversed(asked):
            output = interceptor.after(output)
        return output

    # The same name, so that `save_pretrained` writes the class that can be loaded.
    same = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(base.__name__, (base,), {**same, "__call__": __call__, "_tgate_interceptors": standing})
