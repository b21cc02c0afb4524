"""Read from a picture of the embedded models' world which attributes of its caption it shows.

The checker uses no network and has learnt nothing. It gives each pixel the nearest colour of the palette, divides
everything but the background into connected components, and measures each component. A thing must be well drawn to
count: a smear in the correct colour is no circle.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tgate_processors.demo.render import CROSS_ARM, STRIPE_PERIOD
from tgate_processors.demo.world import COLOURS, DARK, PALETTE, SHAPES, SIZES, Scene


THING_ATTRIBUTES = ("shape", "colour", "size", "pattern")
ATTRIBUTES = ("count", "background", "relation", *THING_ATTRIBUTES)
SAME_SHADE = 0.54  # largest distance of a pixel to a colour of the palette, both in -1..1
SPECK = 50  # pixels; a smaller component is no thing
SIZE_BORDER = 10.4  # pixels; a thing is large if its mean radius, half the mean of width and height, is above this
LEAST_OVERLAP = 0.75  # intersection over union with the best shape; below it a thing has no shape
PLAIN_BELOW, STRIPED_ABOVE = 0.07, 0.16  # see `_stripe_contrast`; a thing between the two has no pattern
NOTHING = -1  # index of a value that could not be read


@dataclass(frozen=True)
class Reading:
    """Which attributes of the pictures are correct.

    Attributes:
        right: Whether an attribute is correct, boolean (pictures, attributes) in the order of `ATTRIBUTES`. For two
            things it must be correct in both.
        named: Whether the caption names an attribute, of the same shape. One thing has no relation.
    """

    right: Tensor
    named: Tensor

    @property
    def whole(self) -> Tensor:
        """Whether all attributes that the caption names are correct -> (pictures,)."""
        return (self.right | ~self.named).all(1)


@dataclass(frozen=True)
class _Parts:
    """Measurements of the two largest components of each picture. Values are indices into the world's tuples."""

    count: Tensor  # (pictures,)
    background: Tensor  # (pictures,)
    values: Tensor  # (pictures, 2, thing attributes)
    centre: Tensor  # (pictures, 2, 2) as x, y in pixels


def read(pictures: Tensor, scenes: Sequence[Scene]) -> Reading:
    """Check pictures, (count, 3, height, width) in -1..1, against the scenes that they should show.

    Raises:
        ValueError: `pictures` has another shape, or not as many pictures as scenes.
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3 or len(pictures) != len(scenes):
        raise ValueError(
            f"`pictures` must be ({len(scenes)}, 3, height, width), one for each scene, "
            f"got {tuple(pictures.shape)}; stack the pictures and pass their scenes."
        )
    parts = _measure(pictures.float())
    pair = torch.tensor([len(scene.things) == 2 for scene in scenes])
    expected = torch.tensor([[_indices(scene, slot) for slot in range(2)] for scene in scenes])
    ways = torch.stack([parts.values == expected, parts.values.flip(1) == expected], 1)
    ways = ways | ~torch.stack([torch.ones_like(pair), pair], 1)[:, None, :, None]
    related = torch.stack([_related(parts.centre, scenes), _related(parts.centre.flip(1), scenes)], 1)
    # Assign the components to the things in the order that matches better. The relation decides between equal scores.
    score = 2 * ways.sum((2, 3)) + (related & pair[:, None])
    best = score.argmax(1)
    rows = torch.arange(len(scenes))
    things = ways[rows, best].all(1)  # (pictures, thing attributes)
    count = parts.count == pair.long() + 1
    background = parts.background == torch.tensor([COLOURS.index(scene.background) for scene in scenes])
    right = torch.cat([torch.stack([count, background, related[rows, best]], 1), things], 1)
    named = torch.ones_like(right)
    named[:, ATTRIBUTES.index("relation")] = pair
    return Reading(right, named)


def _indices(scene: Scene, slot: int) -> list[int]:
    thing = scene.things[min(slot, len(scene.things) - 1)]
    return [
        SHAPES.index(thing.shape),
        COLOURS.index(thing.colour),
        SIZES.index(thing.size),
        int(thing.striped),
    ]


def _related(centre: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Return whether the first component is where the relation says -> (pictures,)."""
    offset = centre[:, 0] - centre[:, 1]
    directions = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1), None: (0, 0)}
    wanted = torch.tensor([directions[scene.relation] for scene in scenes], dtype=offset.dtype)
    along = (offset * wanted).sum(1)
    return (along > 8) & (along >= offset.abs().amax(1))


def _measure(pictures: Tensor) -> _Parts:
    shades = torch.tensor([*PALETTE.values(), DARK]).mul(2).sub(1)  # (colours and dark, 3)
    gap = (pictures.unsqueeze(1) - shades.view(1, -1, 3, 1, 1)).square().sum(2)
    # A blend at an edge may be near to a third colour, so a pixel far from every colour has none.
    gap, nearest = gap.min(1)  # (pictures, height, width)
    nearest = nearest.masked_fill(gap > SAME_SHADE**2, len(COLOURS))
    background = _background(nearest)
    label = _components(nearest != background.view(-1, 1, 1))
    area = torch.zeros(len(label), label[0].numel() + 1).scatter_add_(
        1, label.flatten(1), torch.ones(label.flatten(1).shape)
    )
    area[:, 0] = 0  # the background's label
    count = (area >= SPECK).sum(1)
    size, chosen = area.topk(2)
    masks = (label.unsqueeze(1) == chosen[:, :, None, None]) & (size >= SPECK)[:, :, None, None]
    low, high = _box(masks)
    colour = _colour(masks, nearest)
    values = torch.stack(
        [
            _shape(masks, low, high),
            colour,
            ((high - low).mean(-1) / 2 > SIZE_BORDER).long(),
            _pattern(_stripe_contrast(pictures, masks, shades, colour)),
        ],
        -1,
    ).masked_fill((size < SPECK)[..., None], NOTHING)
    return _Parts(count, background, values, (low + high) / 2)


def _background(nearest: Tensor) -> Tensor:
    """Return the most frequent colour of the palette along the picture's edge -> (pictures,)."""
    edge = torch.cat([nearest[:, :2].flatten(1), nearest[:, -2:].flatten(1), nearest[:, :, :2].flatten(1)], 1)
    return functional.one_hot(edge, len(COLOURS) + 1)[..., :-1].sum(1).argmax(1)


def _components(mask: Tensor) -> Tensor:
    """Return a label for each pixel: 0 where the mask is False, else one number for each connected component."""
    label = torch.arange(1.0, mask[0].numel() + 1).view(1, *mask.shape[1:]) * mask
    while True:
        # Each round the largest number of a component spreads by one pixel.
        spread = functional.max_pool2d(label.unsqueeze(1), 3, stride=1, padding=1).squeeze(1) * mask
        if torch.equal(spread, label):
            return label.long()
        label = spread


def _box(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two corners of each mask's bounding box -> (pictures, 2, 2) each, as x, y in pixels."""
    height, width = masks.shape[-2:]
    columns, rows = masks.any(2).float(), masks.any(3).float()
    low = torch.stack([columns.argmax(-1), rows.argmax(-1)], -1)
    far = torch.stack([columns.flip(-1).argmax(-1), rows.flip(-1).argmax(-1)], -1)
    return low.float(), torch.tensor([width, height]).float() - far


def _colour(masks: Tensor, nearest: Tensor) -> Tensor:
    """Return the most frequent colour in each mask, without outline and stripes -> (pictures, 2)."""
    is_colour = functional.one_hot(nearest, len(COLOURS) + 1)[..., :-1].float()  # (pictures, h, w, colours)
    return torch.einsum("pmhw,phwc->pmc", masks.float(), is_colour).argmax(-1)


def _shape(masks: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return the shape that overlaps each mask best if drawn into its box, or NOTHING -> (pictures, 2)."""
    height, width = masks.shape[-2:]
    half = ((high - low) / 2).clamp(min=1.0)
    middle = (low + high) / 2
    u = (torch.arange(width) + 0.5 - middle[..., :1]) / half[..., :1]  # (pictures, 2, width) in -1..1
    v = (torch.arange(height) + 0.5 - middle[..., 1:]) / half[..., 1:]
    u, v = u.unsqueeze(-2).expand(masks.shape), v.unsqueeze(-1).expand(masks.shape)
    inside = (u.abs() <= 1) & (v.abs() <= 1)
    templates = {
        "circle": u.square() + v.square() <= 1,
        "square": inside,
        "triangle": inside & (2 * u.abs() <= v + 1),
        "cross": inside & ((u.abs() <= CROSS_ARM) | (v.abs() <= CROSS_ARM)),
    }
    drawn = torch.stack([templates[shape] for shape in SHAPES], -1)  # (pictures, 2, h, w, shapes)
    same = (drawn & masks[..., None]).sum((2, 3)) / (drawn | masks[..., None]).sum((2, 3)).clamp(min=1)
    overlap, shape = same.max(-1)
    return shape.masked_fill(overlap < LEAST_OVERLAP, NOTHING)


def _stripe_contrast(pictures: Tensor, masks: Tensor, shades: Tensor, colour: Tensor) -> Tensor:
    """Return how strongly brightness varies with the stripes' period down each mask -> (pictures, 2).

    This is the size of the Fourier coefficient at that period. Brightness is scaled so that dark is 0 and the thing's
    colour is 1, and the outline is left out. Drawn stripes have about 0.3, a plain thing 0.
    """
    ramp = shades[colour] - shades[-1]  # (pictures, 2, 3)
    lit = torch.einsum("pchw,pmc->pmhw", pictures - shades[-1].view(1, 3, 1, 1), ramp)
    lit = lit / ramp.square().sum(-1)[..., None, None]
    inner = -functional.max_pool2d(-masks.float(), 5, stride=1, padding=2)
    total = inner.sum((2, 3)).clamp(min=1)
    swing = (lit - ((lit * inner).sum((2, 3)) / total)[..., None, None]) * inner
    angle = torch.arange(masks.shape[2]) * (2 * torch.pi / STRIPE_PERIOD)
    rows = swing.sum(3)  # (pictures, 2, height)
    return torch.hypot((rows * angle.cos()).sum(2), (rows * angle.sin()).sum(2)) / total


def _pattern(contrast: Tensor) -> Tensor:
    """Return 0 for plain, 1 for striped, NOTHING for neither."""
    unclear = (contrast >= PLAIN_BELOW) & (contrast <= STRIPED_ABOVE)
    return (contrast > STRIPED_ABOVE).long().masked_fill(unclear, NOTHING)
