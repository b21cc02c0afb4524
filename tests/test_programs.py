"""Whatever is done with a pipeline, each run of it equals that of a fresh one."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fingerprint, tiny, widen

from tgate_processors import TGateConfig, apply_tgate


FAMILIES = ["sd", "pixart-alpha"]
CONFIGS = [TGateConfig(gate_step=1), TGateConfig(gate_step=2, sp_interval=2, fi_interval=2), TGateConfig(gate_step=9)]

calls = st.tuples(st.integers(2, 4), st.integers(1, 2))  # steps (the stock PixArt fails at one), pictures
actions = st.one_of(
    st.tuples(st.just("apply"), st.sampled_from(range(len(CONFIGS)))),
    st.tuples(st.just("run"), calls),
    st.tuples(st.just("fail"), st.tuples(calls, st.integers(0, 4))),
    st.tuples(st.just("remove"), st.none()),
)


class Stop(Exception):
    pass


def changes(family, call):
    steps, pictures = call
    inputs = {k: v for k, v in tiny(family).kwargs().items() if isinstance(v, torch.Tensor)}
    batch = {k: widen(v, pictures) if v.is_floating_point() else v.repeat(pictures, 1) for k, v in inputs.items()}
    return {"num_inference_steps": steps, **batch}


@cache
def fresh(family, config, call):
    subject = tiny(family)
    tgate = None if config is None else apply_tgate(subject.pipe, CONFIGS[config])
    return subject(tgate, **changes(family, call))


class Program:
    """A pipeline to which things are done; every run is compared with a fresh pipeline's."""

    def __init__(self, family):
        self.subject = tiny(family)
        self.untouched = fingerprint(self.subject.denoiser)
        self.tgate = self.config = None

    def apply(self, config):
        if self.tgate is None:
            self.tgate = apply_tgate(self.subject.pipe, CONFIGS[config])
            self.config = config

    def run(self, call):
        latents = self.subject(self.tgate, **changes(self.subject.family, call))
        assert torch.equal(latents, fresh(self.subject.family, self.config, call))

    def fail(self, where):
        call, evaluation = where
        evaluations = iter(range(99))

        def stop(*_):
            if next(evaluations) == evaluation:
                raise Stop

        last = getattr(self.subject.denoiser, "conv_out", None) or self.subject.denoiser.proj_out
        hook = last.register_forward_pre_hook(stop)
        try:
            self.run(call)
        except Stop:
            pass
        finally:
            hook.remove()

    def remove(self, _):
        if self.tgate is not None:
            self.tgate.remove()
        self.tgate = self.config = None
        assert fingerprint(self.subject.denoiser) == self.untouched


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(st.lists(actions, max_size=7))
def test_every_run_equals_a_fresh_pipelines(family, program):
    state = Program(family)
    for action, argument in program:
        getattr(state, action)(argument)
    state.remove(None)
