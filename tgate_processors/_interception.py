"""Interception of a module's calls, outside of compilation, offloading and hooks.

A forward hook would be inside: `module.compile()` traces it, and it cannot leave out the forward pass. So the module
gets a subclass of its own class with another `__call__`, as in `torch.nn.utils.parametrize` and FSDP. The subclass
compares equal to the class below, because `from_pipe` looks up `type(module)` in a list. It copies and pickles as that
class. `release` removes it even if another class has been put over it since.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from tgate_processors._disguise import disguised


class Interceptor(Protocol):
    """Object that answers the calls of a module."""

    def around(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the caller gets.

        Args:
            forward: The module's own call.
            args, kwargs: Arguments of the call.
        """


def interceptor_of(module: torch.nn.Module) -> Any:
    """Return the interceptor of a module, or of the module that `torch.compile` wrapped; None if there is none."""
    for candidate in (module, getattr(module, "_orig_mod", module)):
        interceptor = getattr(type(candidate), "_tgate_interceptor", None)
        if interceptor is not None:
            return interceptor
    return None


def intercept(module: torch.nn.Module, interceptor: Interceptor) -> None:
    """Let `interceptor` answer every call of `module`, until `release`."""
    _set_class(module, _intercepted_class(type(module), weakref.ref(module), interceptor))


def release(module: torch.nn.Module) -> None:
    """Undo `intercept`. Safe to call twice."""
    mro = type(module).__mro__
    ours = next((cls for cls in mro if "_tgate_interceptor" in vars(cls)), None)
    if ours is None:
        return
    below = ours.__bases__[0]
    if type(module) is ours:
        _set_class(module, below)
    for above in mro:  # FSDP and parametrizations put a class over this one, for this module alone
        if ours in above.__bases__:
            above.__bases__ = tuple(below if base is ours else base for base in above.__bases__)


@contextmanager
def attributes_restored(network: torch.nn.Module, *names: str) -> Iterator[None]:
    """Remove, on exit, each attribute of these names from every module of the network that did not have it before."""
    absent = [(module, name) for module in network.modules() for name in names if vars(module).get(name) is None]
    try:
        yield
    finally:
        for module, name in absent:
            vars(module).pop(name, None)


def _set_class(module: torch.nn.Module, cls: type) -> None:
    # `OptimizedModule.__setattr__` would write to the module that it wraps.
    object.__setattr__(module, "__class__", cls)


def _intercepted_class(base: Any, intercepted: "weakref.ref[torch.nn.Module]", interceptor: Interceptor) -> type:
    # Not `recursive`, so that `torch.compile` of the intercepted module compiles the call inside.
    @torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call, untyped-decorator]  # of torch
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        if intercepted() is not self:  # another module of this class, such as a copy, is not intercepted
            return base.__call__(self, *args, **kwargs)
        return interceptor.around(functools.partial(base.__call__, self), args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        return object.__new__, (base,), *base.__reduce_ex__(self, 2)[2:]

    # The same name, so that `save_pretrained` writes the class that can be loaded.
    same = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    own = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "_tgate_interceptor": interceptor}
    cls: type = disguised(base, base.__name__, (base,), same | own)
    return cls
