"""Strategies of guidance alone: which half or call goes on, and what answers the other one. No network runs."""

import warnings

import pytest
import torch

from tgate_processors._guidance import Calls, Halves, Lists, Whole
from tgate_processors._modes import Phase


def doubled(*rows):
    """Return the inputs of a network whose sample has these rows twice, as guidance doubles them."""
    sample = torch.tensor(rows, dtype=torch.float).reshape(-1, 1)
    return (torch.cat([sample, sample]), 5), {}


def asked(strategy, inputs, does_guidance, step=1, call=0, most_calls=1):
    return strategy.has_halves(inputs, does_guidance, step=step, call=call, most_calls=most_calls)


@pytest.mark.parametrize(
    ("branch", "positive_first", "first"),
    [("negative", False, True), ("positive", False, False), ("negative", True, False), ("positive", True, True)],
)
def test_the_half_that_goes_on_is_that_of_the_branch(branch, positive_first, first):
    strategy = Halves(branch, positive_first=positive_first)
    batch = torch.arange(4)
    assert strategy.half(batch, Phase.FIDELITY).tolist() == ([0, 1] if first else [2, 3])
    (folded, timestep), text = strategy.fold(((batch.float(), 5), {"text": batch}), Phase.FIDELITY)
    assert folded.tolist() == text["text"].tolist() == ([0, 1] if first else [2, 3])
    assert timestep == 5


@pytest.mark.parametrize("branch", ["negative", "positive"])
@pytest.mark.parametrize("positive_first", [False, True])
def test_before_guidance_begins_the_positive_branch_is_computed(branch, positive_first):
    strategy = Halves(branch, positive_first=positive_first)
    assert strategy.half(torch.arange(2), Phase.UNGUIDED).tolist() == ([0] if positive_first else [1])


def test_a_pipeline_that_is_known_is_believed():
    different = ((torch.tensor([[1.0], [2.0]]), 5), {})
    assert asked(Halves("negative"), different, True) is True
    assert asked(Halves("negative"), doubled(1, 2), False) is False


def test_an_odd_batch_has_no_halves():
    assert asked(Halves("negative"), ((torch.ones(3, 1), 5), {}), True) is False


def test_a_controlnet_in_guess_mode_has_no_halves():
    sample, _ = doubled(1)
    assert asked(Halves("negative"), (sample, {"guess_mode": True}), True) is False


def test_a_later_call_for_a_timestep_has_no_halves():
    assert asked(Halves("negative"), doubled(1), True, call=1, most_calls=2) is False


def test_a_pipeline_that_nobody_tried_must_show_equal_halves_after_its_first_step():
    strategy = Halves("negative", is_tried=False)
    assert asked(strategy, doubled(1, 2), True, step=0) is None
    assert asked(strategy, doubled(1, 2), True) is True
    other = Halves("negative", is_tried=False)
    assert asked(other, ((torch.tensor([[1.0], [2.0]]), 5), {}), True) is False
    assert asked(other, doubled(1), True) is False  # the halves are compared only once for each batch size


def test_an_argument_that_may_be_batched_or_not_is_never_halved():
    sample, _ = doubled(1)
    inputs = sample, {"cross_attention_kwargs": {"regions": torch.ones(2, 4)}}
    with pytest.warns(UserWarning, match="`regions` among the attention arguments may or may not have a row"):
        assert asked(Halves("negative"), inputs, True) is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(Halves("negative"), (sample, {"cross_attention_kwargs": {"scale": torch.ones(2)}}), True) is True


def test_without_looks_the_other_half_is_equal():
    strategy = Halves("negative")
    strategy.note(0, (torch.tensor([[1.0], [3.0]]),), step=2)  # nothing is kept
    assert strategy.unfold((torch.tensor([[5.0]]),), step=3)[0].tolist() == [[5], [5]]


@pytest.mark.parametrize(
    ("branch", "positive_first", "expected"),
    [
        ("negative", False, [[10], [12]]),  # 12 - 10 = 3 - 1
        ("positive", False, [[8], [10]]),
        ("negative", True, [[8], [10]]),
        ("positive", True, [[10], [12]]),
    ],
)
def test_with_looks_the_other_half_differs_by_what_was_seen(branch, positive_first, expected):
    """Guidance that is equal in two steps does not fade: r = (2 * 2) / (2 * 2) = 1."""
    strategy = Halves(branch, positive_first=positive_first, looks=True)
    for step in (2, 3):
        strategy.note(0, (torch.tensor([[1.0], [3.0]]),), step=step)
    assert strategy.unfold((torch.tensor([[10.0]]),), step=4)[0].tolist() == expected


def test_guidance_fades_as_fast_as_it_was_seen_to_fade():
    """Guidance is 4 at step 2 and 2 at step 4. Half is left after two steps, so 1 is left at step 6."""
    strategy = Halves("negative", looks=True)
    for step, guidance in ((2, 4.0), (4, 2.0)):
        strategy.note(0, (torch.tensor([[0.0], [guidance]]),), step=step)
    both = strategy.unfold((torch.tensor([[10.0]]),), step=6)[0]
    assert torch.allclose(both, torch.tensor([[10.0], [11.0]]))


def test_an_output_of_another_size_is_doubled():
    strategy = Halves("negative", looks=True)
    strategy.note(0, (torch.tensor([[1.0], [3.0]]),), step=2)
    assert strategy.unfold((torch.ones(2, 1),), step=3)[0].tolist() == [[1]] * 4


def test_a_side_networks_output_is_not_guided():
    strategy = Halves("negative", looks=True, is_denoiser=False)
    strategy.note(0, (torch.tensor([[1.0], [3.0]]),), step=2)
    assert strategy.unfold((torch.tensor([[5.0]]),), step=3)[0].tolist() == [[5], [5]]


@pytest.mark.parametrize(("looks", "expected"), [(False, [[2]]), (True, [[1]])])
def test_a_layer_keeps_the_mean_of_both_branches_or_with_looks_the_one_that_goes_on(looks, expected):
    assert Halves("negative", looks=looks).reduce(torch.tensor([[1.0], [3.0]])).tolist() == expected


def test_lists_of_pictures_stay_lists():
    strategy = Lists("negative", looks=True)
    for step in (2, 3):
        strategy.note(0, ([torch.tensor([1.0]), torch.tensor([3.0])],), step=step)
    (pictures,) = strategy.unfold(([torch.tensor([10.0])],), step=4)
    assert isinstance(pictures, list)
    assert [picture.tolist() for picture in pictures] == [[10], [12]]


def test_of_calls_the_first_is_made_and_the_others_are_answered():
    strategy = Calls(looks=False)
    assert [strategy.leaves_out(call) for call in range(3)] == [False, True, True]
    first = (torch.tensor([[5.0]]),)
    assert strategy.answer(1, first, step=3) is first


def test_with_looks_each_call_is_answered_with_its_own_guidance():
    strategy = Calls(looks=True)
    for step in (2, 3):
        for call, value in enumerate((1.0, 3.0, 7.0)):
            strategy.note(call, (torch.tensor([[value]]),), step=step)
    first = (torch.tensor([[10.0]]),)
    assert [strategy.answer(call, first, step=4)[0].item() for call in (1, 2)] == [12, 16]


def test_layers_of_several_calls_keep_the_mean_or_with_looks_the_first():
    stored = [{"layer": [torch.tensor([[1.0]])]}, {"layer": [torch.tensor([[3.0]])]}]
    assert Calls(looks=False).merge(stored)["layer"][0].item() == 2
    assert Calls(looks=True).merge(stored) is stored[0]


def test_whole_leaves_nothing_out():
    strategy, output = Whole(), (torch.ones(2, 1),)
    assert asked(strategy, doubled(1), True) is False
    assert not strategy.leaves_out(1)
    assert strategy.unfold(output, step=3) is output
