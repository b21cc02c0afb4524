"""Classes that compare equal to the class they derive from."""

from typing import Any


class Disguised(type):
    """Metaclass of classes that compare equal to the class below them.

    The class below is the base that the class names in `stands_over`. The classes compare equal because diffusers
    looks up `type(module)` and the classes of processors in lists of known classes (`from_pipe`,
    `set_default_attn_processor`).
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (isinstance(other, type) and vars(cls).get("stands_over") is other)

    # Each class keeps its own hash, because torch stores FSDP's wrappers by class.
    __hash__ = type.__hash__


def disguised(base: Any, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
    """Return a new class with these bases that compares equal to `base`, which is one of them."""
    kinds = {type(one) for one in bases} - {type, Disguised}
    meta = type("Disguised", (Disguised, *kinds), {}) if kinds else Disguised
    return meta(name, bases, namespace | {"stands_over": base})
