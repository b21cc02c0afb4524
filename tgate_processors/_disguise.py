"""Classes that stand over another one, and are taken for it where people compare classes."""

from typing import Any


class Disguised(type):
    """Metaclass of classes that compare equal to the class below them.

    diffusers looks for `type(module)`, and for the classes of processors, in lists of classes it knows (`from_pipe`,
    `set_default_attn_processor`). The class below is the base that the class names as `stands_over`.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, type) and vars(cls).get("stands_over") is other)

    # Its own: torch keeps FSDP's wrappers by class.
    __hash__ = type.__hash__


def disguised(base: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    """A class of these bases that is taken for `base`, one of them."""
    kinds = {type(one) for one in bases} - {type, Disguised}
    meta = type("Disguised", (Disguised, *kinds), {}) if kinds else Disguised
    return meta(name, bases, namespace | {"stands_over": base})
