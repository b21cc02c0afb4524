"""The world of the embedded models: scenes of one or two outlined shapes, and captions that describe them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch


RESOLUTION = 64  # pixels a side
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
PALETTE: dict[str, tuple[float, float, float]] = {  # red, green, blue in 0..1
    "red": (0.85, 0.10, 0.12),
    "pink": (1.00, 0.50, 0.72),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.10, 0.62, 0.20),
    "cyan": (0.25, 0.85, 0.90),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.58, 0.15, 0.75),
    "white": (0.97, 0.97, 0.97),
}
COLOURS = tuple(PALETTE)
DARK = (0.08, 0.08, 0.10)  # outlines and stripes
GLUE = ("a", "striped", "left", "right", "of", "above", "below", "on", "background")
WORDS = (*GLUE, *SIZES, *COLOURS, *SHAPES)

# Combinations that no training caption has: pairs of colour and shape, triples of size, colour and shape, and triples
# of the first thing's colour, its shape and its relation.
HELD_OUT_PAIRS = {("red", "triangle"), ("blue", "circle")}
HELD_OUT_SIZED = {
    ("small", "green", "square"),
    ("large", "yellow", "cross"),
    ("large", "purple", "circle"),
    ("small", "cyan", "triangle"),
}
HELD_OUT_RELATED = {
    ("white", "square", "left of"),
    ("pink", "cross", "right of"),
    ("green", "circle", "above"),
    ("cyan", "cross", "below"),
}

_T = TypeVar("_T")


@dataclass(frozen=True)
class Thing:
    """One shape, with all that a caption says about it."""

    size: str
    colour: str
    shape: str
    striped: bool = False

    def __str__(self) -> str:
        return " ".join(["a", self.size, *["striped"] * self.striped, self.colour, self.shape])


@dataclass(frozen=True)
class Scene:
    """One or two things on a background. `relation` tells where the first is, seen from the second."""

    background: str
    first: Thing
    relation: str | None = None
    second: Thing | None = None

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)


def caption(scene: Scene) -> str:
    """Return the sentence that names everything that the checker reads from the scene's picture."""
    things = f" {scene.relation} ".join(str(thing) for thing in scene.things)
    return f"{things} on a {scene.background} background"


_THING = rf"a ({'|'.join(SIZES)}) (striped )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_CAPTION = re.compile(rf"{_THING}(?: ({'|'.join(RELATIONS)}) {_THING})? on a ({'|'.join(COLOURS)}) background")


def parse(text: str) -> Scene:
    """Return the scene that a caption describes. This is the inverse of `caption`.

    Raises:
        ValueError: `text` is no caption of this world.
    """
    words = text.lower().split()
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(
            f"`text` must use this world's words only, got the unknown {', '.join(map(repr, unknown))} in {text!r}; "
            f"the words are: {', '.join(WORDS)}."
        )
    found = _CAPTION.fullmatch(" ".join(words))
    if found is None:
        raise ValueError(
            f"`text` must be a caption of this world, got {text!r}; write it like "
            "'a large striped red circle left of a small blue square on a yellow background'."
        )
    part = found.groups()
    second = _thing(part[5:9]) if part[4] else None
    return Scene(background=part[9], first=_thing(part[:4]), relation=part[4], second=second)


def _thing(part: Sequence[str | None]) -> Thing:
    size, striped, colour, shape = part
    return Thing(str(size), str(colour), str(shape), striped is not None)


def is_held_out(scene: Scene) -> bool:
    """Return whether the scene has one of the `HELD_OUT_...` combinations, which training never shows."""
    first = scene.first
    return (first.colour, first.shape, scene.relation) in HELD_OUT_RELATED or any(
        (thing.colour, thing.shape) in HELD_OUT_PAIRS or (thing.size, thing.colour, thing.shape) in HELD_OUT_SIZED
        for thing in scene.things
    )


def sample_scenes(count: int, generator: torch.Generator, *, held_out: bool = False) -> list[Scene]:
    """Return `count` scenes that training may show or, with `held_out`, that it never shows."""
    scenes: list[Scene] = []
    while len(scenes) < count:
        # Each pass draws two candidates for each of `count` scenes, however many of them are still missing.
        drawn = (_scene(row) for row in torch.rand(2 * count, 12, generator=generator).tolist())
        scenes += [scene for scene in drawn if is_held_out(scene) == held_out]
    return scenes[:count]


def _scene(chance: Sequence[float]) -> Scene:
    """Return the scene that twelve uniform numbers choose. Colours are drawn without replacement, so they differ."""
    colours = list(COLOURS)
    background, colour, other = (colours.pop(int(u * len(colours))) for u in chance[:3])
    first = Thing(_pick(SIZES, chance[3]), colour, _pick(SHAPES, chance[4]), chance[5] < 0.5)
    if chance[6] < 0.3:
        return Scene(background, first)
    second = Thing(_pick(SIZES, chance[7]), other, _pick(SHAPES, chance[8]), chance[9] < 0.5)
    return Scene(background, first, _pick(RELATIONS, chance[10]), second)


def _pick(choices: Sequence[_T], chance: float) -> _T:
    return choices[int(chance * len(choices))]
