"""Interception of a module's calls, alone: what the module's class appears to be, during it and afterwards."""

import copy
import pickle

import torch
from small import Small, inputs, small
from tiny import fingerprint, left_behind

from tgate_processors._interception import attributes_restored, intercept, interceptor_of, release


class Notes:
    """Interceptor that passes every call on and records it."""

    def __init__(self):
        self.calls = []

    def around(self, forward, args, kwargs):
        self.calls.append((args, kwargs))
        return forward(*args, **kwargs)


class Answers:
    """Interceptor that leaves out every call."""

    def around(self, forward, args, kwargs):
        return "an answer"


def test_every_call_goes_through_and_has_its_arguments():
    module, notes = small(), Notes()
    sample, text = inputs()
    own = module(sample, 5, text)[0]
    intercept(module, notes)
    assert interceptor_of(module) is notes
    assert torch.equal(module(sample, 5, encoder_hidden_states=text)[0], own)
    assert notes.calls == [((sample, 5), {"encoder_hidden_states": text})]


def test_a_call_may_be_left_out():
    module, ran = small(), []
    module.register_forward_hook(lambda *_: ran.append(True))
    intercept(module, Answers())
    assert module(*inputs()) == "an answer"
    assert ran == []


def test_the_modules_own_hooks_stay_inside():
    module, notes, order = small(), Notes(), []
    module.register_forward_pre_hook(lambda *_: order.append(len(notes.calls)))
    intercept(module, notes)
    sample, text = inputs()
    module(sample, 5, text)
    assert order == [1]  # the interceptor comes before the hook


def test_the_class_is_taken_for_the_one_below():
    module = small()
    intercept(module, Notes())
    assert type(module) == Small  # noqa: E721  # diffusers compares like this
    assert type(module) in [Small]
    assert isinstance(module, Small)
    assert type(module).__name__ == "Small"
    assert type(module).__module__ == Small.__module__


def test_another_module_of_the_class_is_not_intercepted():
    notes, module, other = Notes(), small(), small()
    intercept(module, notes)
    sample, text = inputs()
    other(sample, 5, text)
    assert interceptor_of(other) is None
    type(module)()(sample, 5, text)  # nor is a new module of the class that the intercepted one has now
    assert notes.calls == []


def test_copies_and_pickles_are_of_the_class_below():
    module, notes = small(), Notes()
    sample, text = inputs()
    own = module(sample, 5, text)[0]
    intercept(module, notes)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is Small
        assert torch.equal(twin(sample, 5, text)[0], own)
    assert notes.calls == []


def test_released_it_is_what_it_was():
    module = small()
    before = fingerprint(module)
    intercept(module, Notes())
    assert type(module) is not Small
    release(module)
    release(module)  # safe to call twice
    assert type(module) is Small
    assert interceptor_of(module) is None
    assert left_behind(before, module) == {}


def test_it_comes_off_from_under_a_class_that_was_put_over_it():
    """FSDP and parametrizations put such a class over it."""
    module, notes = small(), Notes()
    intercept(module, notes)
    module.__class__ = over = type("Over", (type(module),), {"is_over": True})
    release(module)
    assert type(module) is over
    assert over.__bases__ == (Small,)
    sample, text = inputs()
    module(sample, 5, text)
    assert module.is_over
    assert notes.calls == []


def test_attributes_that_a_module_had_stay_and_others_go():
    module = small()
    module.attn1.mark = "mine"
    with attributes_restored(module, "mark"):
        module.attn1.mark = "yours"
        module.attn2.mark = "yours"
    assert module.attn1.mark == "yours"
    assert "mark" not in vars(module.attn2)
