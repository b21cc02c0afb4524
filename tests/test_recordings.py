"""Every recording of the original in which the original is right is matched, after every step and at the end."""

import functools
import re
from contextlib import nullcontext

import pytest
from recorded import NAMES, config_of, load_case

from tgate_processors import _deepcache as deepcache
from tgate_processors import apply_tgate


# Allows for another build of torch; here all but guidance rescaling match to the last bit.
RELATIVE = 1e-5


def original_is_right(name, variant):
    order_2 = "heun" in name
    averages_pictures = name.endswith("nocfg_b2")
    never_stores = ":g0" in variant
    raised = load_case(name).variants[variant]["error"] is not None
    ungated = variant == "stock" or variant.startswith("dc:")
    return not (ungated or order_2 or averages_pictures or never_stores or raised)


RIGHT = [(name, variant) for name in NAMES for variant in load_case(name).variants if original_is_right(name, variant)]


@pytest.fixture(scope="module")
def differences():
    """The largest relative difference of each recording; `pytest -s` prints what they come to."""
    largest = {}
    yield largest
    exact = sum(difference == 0 for difference in largest.values())
    print(f"\n{len(largest)} recordings matched, {exact} to the last bit, the rest within {max(largest.values()):.1e}")


def test_there_are_recordings():
    assert len(RIGHT) == 135


@pytest.mark.parametrize(("name", "variant"), RIGHT)
def test_matches_the_original(name, variant, monkeypatch, differences):
    case = load_case(name)
    pipe = pipe_of(name)
    latents = keep_steps(pipe.scheduler, monkeypatch)
    helper = deepcache_of(variant, pipe)
    with (
        nullcontext() if helper is None else deepcache.enabled(helper),
        apply_tgate(pipe, config_of(variant), deepcache=helper) as tgate,
    ):
        final = pipe(**case.kwargs(), callback_on_step_end=tgate, return_dict=False)[0]

    steps = case.tensors[f"steps.{variant}"]
    assert len(latents) == len(steps)
    ours, theirs = [*latents, final], [*steps, case.tensors[f"out.{variant}"]]
    differences[name, variant] = max(map(relative_difference, ours, theirs))
    assert differences[name, variant] <= RELATIVE


def deepcache_of(variant, pipe):
    """The helper of a variant such as `v1dc:g5_i3b0`: DeepCache with interval 3 and branch 0."""
    found = re.search(r"_i(\d)b(\d)", variant)
    return deepcache.make_helper(pipe, *map(int, found.groups())) if found else None


@functools.cache
def pipe_of(name):
    return load_case(name).pipe()


def keep_steps(scheduler, monkeypatch):
    """A list that fills with the latents after each step of the scheduler."""
    latents = []
    step = scheduler.step

    @functools.wraps(step)
    def kept(*args, **kwargs):
        output = step(*args, **kwargs)
        latents.append(output[0].clone())
        return output

    monkeypatch.setattr(scheduler, "step", kept)
    return latents


def relative_difference(ours, theirs):
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
