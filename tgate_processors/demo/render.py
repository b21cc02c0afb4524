"""Draw scenes of the embedded models' world.

A caption does not tell a thing's place, exact radius or phase of stripes, which are random. So a caption has many
correct pictures, and a model must decide on one of them.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tgate_processors.demo.world import DARK, PALETTE, RESOLUTION, SHAPES, Scene, Thing


RADIUS = {"small": (8.5, 9.3), "large": (12.0, 13.0)}  # half a shape's width and height, in pixels
CROSS_ARM = 0.4  # half the width of a cross's arm, in radii
OUTLINE = 1.3  # width in pixels
STRIPE_PERIOD = 6.0  # pixels from one dark stripe to the next below it
STRIPE_HALF_WIDTH = 1.3  # half the height of a dark stripe, in pixels
REACH = 14.5  # radius plus the largest shift of a shape from the middle of its half, in pixels, see `_centres`


def render(scenes: Sequence[Scene], generator: torch.Generator) -> Tensor:
    """Draw scenes with antialiasing -> (scenes, 3, RESOLUTION, RESOLUTION) in -1..1."""
    chance = torch.rand(len(scenes), 2, 4, generator=generator)
    picture = _rgb([scene.background for scene in scenes]).expand(-1, -1, RESOLUTION, RESOLUTION)
    for slot in range(2):
        shown = torch.tensor([len(scene.things) > slot for scene in scenes]).view(-1, 1, 1)
        things = [scene.things[min(slot, len(scene.things) - 1)] for scene in scenes]
        picture = _draw(picture, scenes, things, slot, shown, chance[:, slot])
    return picture * 2 - 1


def _draw(
    picture: Tensor, scenes: Sequence[Scene], things: list[Thing], slot: int, shown: Tensor, chance: Tensor
) -> Tensor:
    """Return `picture`, (count, 3, height, width) in 0..1, with one more thing in each.

    Args:
        picture: Pictures so far.
        scenes: Scene of each picture.
        things: Thing to add to each picture.
        slot: Index of the things in their scenes.
        shown: Whether a picture has a thing of this index, (count, 1, 1).
        chance: Random numbers in 0..1, (count, 4).
    """
    low, high = torch.tensor([RADIUS[thing.size] for thing in things]).unbind(1)
    radius = low + (high - low) * chance[:, 0]
    centre = _centres(scenes, slot, radius, chance[:, 1:3])  # (count, 2) as x, y
    axis = torch.arange(RESOLUTION) + 0.5
    x = (axis.view(1, 1, -1) - centre[:, :1, None]).expand(-1, RESOLUTION, -1)
    y = (axis.view(1, -1, 1) - centre[:, 1:, None]).expand(-1, -1, RESOLUTION)
    distance = _distance([thing.shape for thing in things], x, y, radius.view(-1, 1, 1))
    striped = torch.tensor([thing.striped for thing in things]).view(-1, 1, 1)
    lit = _coverage(distance + OUTLINE) * (1 - striped * _stripes(y, chance[:, 3]))
    fill = torch.lerp(_rgb(["dark"]), _rgb([thing.colour for thing in things]), lit.unsqueeze(1))
    return torch.lerp(picture, fill, (_coverage(distance) * shown).unsqueeze(1))


def _centres(scenes: Sequence[Scene], slot: int, radius: Tensor, chance: Tensor) -> Tensor:
    """Return the centres of the things -> (count, 2) as x, y in pixels.

    Each thing of a pair has one half of the picture, along the axis of the relation. A smaller thing has more room to
    move in its half. Two large things always keep some three pixels between them.
    """
    middle = RESOLUTION / 2
    home = torch.full((len(scenes), 2), middle)
    room = torch.full((len(scenes), 2), 10.0)
    for row, scene in enumerate(scenes):
        if scene.relation is not None:
            axis = 0 if scene.relation in ("left of", "right of") else 1
            before = (scene.relation in ("left of", "above")) == (slot == 0)
            home[row, axis] = middle * (0.5 if before else 1.5)
            room[row, axis], room[row, 1 - axis] = REACH - float(radius[row]), 6.0
    return home + (2 * chance - 1) * room


def _distance(shapes: Sequence[str], x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """Return each pixel's signed distance to the shape of its row, negative inside -> (count, height, width)."""
    arm = CROSS_ARM * radius
    across, down = x.abs(), y.abs()
    of_shape = {
        "circle": torch.hypot(x, y) - radius,
        "square": torch.maximum(across, down) - radius,
        "triangle": torch.maximum(y - radius, (2 * across - y - radius) / math.sqrt(5)),
        "cross": torch.minimum(torch.maximum(across - radius, down - arm), torch.maximum(across - arm, down - radius)),
    }
    chosen = torch.tensor([SHAPES.index(shape) for shape in shapes]).view(1, -1, 1, 1)
    every = torch.stack([of_shape[shape] for shape in SHAPES])  # (shapes, count, height, width)
    return every.gather(0, chosen.expand(1, *x.shape)).squeeze(0)


def _stripes(y: Tensor, phase: Tensor) -> Tensor:
    """Return how much of each pixel is in a dark stripe, 0..1."""
    turn = (y / STRIPE_PERIOD + phase.view(-1, 1, 1)) % 1.0
    return _coverage((turn - 0.5).abs() * STRIPE_PERIOD - STRIPE_HALF_WIDTH)


def _coverage(distance: Tensor) -> Tensor:
    """Return the share of a pixel inside an edge at this signed distance from the pixel's centre."""
    return (0.5 - distance).clamp(0, 1)


def _rgb(names: Sequence[str]) -> Tensor:
    """Return colours by name -> (names, 3, 1, 1) in 0..1."""
    return torch.tensor([DARK if name == "dark" else PALETTE[name] for name in names]).view(-1, 3, 1, 1)
