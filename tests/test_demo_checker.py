"""The checker reads clean drawings perfectly and notices every attribute that a caption gets wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tgate_processors.demo.checker import ATTRIBUTES, read
from tgate_processors.demo.render import render
from tgate_processors.demo.world import Scene, Thing, sample_scenes


FIRST = Thing("large", "red", "circle", striped=True)
SECOND = Thing("small", "blue", "square")
SCENE = Scene("yellow", FIRST, "left of", SECOND)
WRONG = {
    "background": replace(SCENE, background="green"),
    "relation": replace(SCENE, relation="above"),
    "shape": replace(SCENE, first=replace(FIRST, shape="cross")),
    "colour": replace(SCENE, second=replace(SECOND, colour="white")),
    "size": replace(SCENE, second=replace(SECOND, size="large")),
    "pattern": replace(SCENE, first=replace(FIRST, striped=False)),
}


def _draw(scenes: list[Scene], seed: int = 0) -> torch.Tensor:
    return render(scenes, torch.Generator().manual_seed(seed))


def test_clean_drawings_are_read_without_a_mistake() -> None:
    scenes = sample_scenes(200, torch.Generator().manual_seed(0))
    assert read(_draw(scenes), scenes).whole.all()


@pytest.mark.parametrize("attribute", WRONG)
def test_one_wrong_attribute_is_noticed_and_no_other_blamed(attribute: str) -> None:
    right = read(_draw([WRONG[attribute]]), [SCENE]).right[0]
    wrong = [name for name, good in zip(ATTRIBUTES, right.tolist(), strict=True) if not good]
    assert wrong == [attribute]


def test_a_missing_thing_is_noticed() -> None:
    reading = read(_draw([Scene("yellow", FIRST)]), [SCENE])
    assert not reading.right[0, ATTRIBUTES.index("count")]
    assert not reading.whole.any()


def test_a_relation_of_one_thing_is_not_asked_for() -> None:
    scene = Scene("yellow", FIRST)
    reading = read(_draw([scene]), [scene])
    assert reading.whole.all()
    assert not reading.named[0, ATTRIBUTES.index("relation")]


def test_swapping_two_things_swaps_the_relation() -> None:
    swapped = Scene("yellow", SECOND, "left of", FIRST)
    assert not read(_draw([swapped]), [SCENE]).right[0, ATTRIBUTES.index("relation")]


def test_noise_is_nothing() -> None:
    noise = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert not read(noise, [SCENE] * 4).whole.any()


def test_pictures_and_scenes_must_be_as_many() -> None:
    with pytest.raises(ValueError, match=r"`pictures` must be \(2, 3, height, width\).*got \(1, 3, 64, 64\)"):
        read(_draw([SCENE]), [SCENE, SCENE])
