"""The demo's world: captions say everything, parsing is their inverse, training never sees the held-out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgate_processors.demo.render import render
from tgate_processors.demo.world import (
    COLOURS,
    RELATIONS,
    RESOLUTION,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    caption,
    is_held_out,
    parse,
    sample_scenes,
)


things = st.builds(Thing, *map(st.sampled_from, (SIZES, COLOURS, SHAPES)), st.booleans())
backgrounds = st.sampled_from(COLOURS)
scenes = st.one_of(
    st.builds(Scene, backgrounds, things),
    st.builds(Scene, backgrounds, things, st.sampled_from(RELATIONS), things),
)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(scenes)
def test_parsing_a_caption_gives_its_scene_back(scene: Scene) -> None:
    assert parse(caption(scene)) == scene


def test_a_caption_reads_like_a_sentence() -> None:
    scene = Scene("yellow", Thing("large", "red", "circle", True), "left of", Thing("small", "blue", "square"))
    assert caption(scene) == ("a large striped red circle left of a small blue square on a yellow background")


def test_parsing_names_unknown_words_and_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"`text`.*unknown 'orange' in 'a .*'; the words are: .*yellow"):
        parse("a large orange circle on a yellow background")


def test_parsing_shows_a_right_caption_when_the_order_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"`text` must be a caption.*write it like 'a large"):
        parse("a circle red on a blue background")


def test_training_scenes_hold_nothing_that_is_held_out() -> None:
    assert not any(is_held_out(scene) for scene in sample_scenes(500, _generator()))
    assert all(is_held_out(scene) for scene in sample_scenes(500, _generator(), held_out=True))


def test_every_word_occurs_in_training() -> None:
    said = {word for scene in sample_scenes(500, _generator()) for word in caption(scene).split()}
    assert set(COLOURS) | set(SHAPES) | set(SIZES) <= said


def test_scenes_and_drawings_depend_on_the_generator_alone() -> None:
    drawn = sample_scenes(4, _generator(3))
    assert drawn == sample_scenes(4, _generator(3))
    assert torch.equal(render(drawn, _generator(5)), render(drawn, _generator(5)))
    assert not torch.equal(render(drawn, _generator(5)), render(drawn, _generator(6)))


def test_colours_of_a_scene_all_differ() -> None:
    for scene in sample_scenes(200, _generator(1)):
        used = [scene.background, *(thing.colour for thing in scene.things)]
        assert len(set(used)) == len(used)


def test_a_drawing_is_a_picture_in_the_range_of_the_pipeline() -> None:
    pictures = render(sample_scenes(8, _generator()), _generator())
    assert pictures.shape == (8, 3, RESOLUTION, RESOLUTION)
    assert -1 <= pictures.min() < pictures.max() <= 1
