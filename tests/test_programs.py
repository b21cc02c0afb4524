"""Random programs: whatever is done with a pipeline and its siblings, each run is equal to that of a fresh one."""

import copy
import os
import tempfile
import warnings
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import diffusers
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from programs import (
    CONFIGS,
    KINDS,
    Call,
    Picture,
    answer,
    draw,
    end,
    first_of,
    fresh,
    fresh_answer,
    fresh_summary,
    held_by,
    is_equal,
    last_of,
    middle_of,
    networks_of,
    part_of,
    sibling,
    twin,
)
from tiny import fingerprint, left_behind

from tgate_processors import ConfigError, StateError, apply_tgate
from tgate_processors._pipelines import takes_callback


PROGRAMS = int(os.environ.get("TGATE_PROGRAMS", "28"))  # of all kinds together; a long run has thousands
STEPS = 12  # of a program

# The pipeline that a program is about, a sibling with a scheduler of its own, and one that shares the scheduler.
pipelines = st.sampled_from(["main", "main", "main", "own", "shared"])
calls = st.builds(Call, st.integers(1, 6), st.integers(1, 2), st.integers(0, 3), st.booleans())
configs = st.integers(0, len(CONFIGS) - 1)
passed = st.sampled_from(["alone", "before", "after", "forgotten"])
few = st.integers(0, 3)
times = st.sampled_from(["of its own", "first", "this", "next"])
direct = st.tuples(st.just("direct"), st.integers(0, 1), times)  # of which network, and what time it is given
own_business = st.one_of(
    direct,
    direct,
    st.tuples(st.just("copies"), st.booleans()),
    st.tuples(st.just("talks"), st.booleans()),
    st.tuples(st.just("saves"), st.booleans()),
)
events = st.one_of(own_business, st.tuples(st.just("draws_another"), pipelines, calls, passed, st.booleans()))


class Stop(Exception):
    pass


class Program(RuleBasedStateMachine):
    """Things are done with pipelines that share their networks; every answer is compared with a fresh pipeline's.

    Attributes:
        kind: Of its pipelines.
        pipes: By their names; siblings are made when they are first spoken of.
        gates: The handle of each gated pipeline, and which of `CONFIGS` it has.
        schedulers: Which of the kind's each pipeline has.
        processors: Which of the kind's the networks have.
        held: These processors themselves.
        setting: That of the run which is going on, if any.
        step: The step that is going on, or has ended.
        is_perturbed: Whether a failed run has left processors on the denoiser, as the stock pipeline does.
        is_replaced: Whether processors were put on that no run has met yet.
        last: Of each gated pipeline, the picture that it has finished last.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.pipes = {"main": kind.build()}
        self.gates = {}
        self.schedulers = dict.fromkeys(("main", "own", "shared"), 0)
        self.processors = 0
        self.networks = networks_of(self.pipes["main"])
        self.held = [held_by(network) for network in self.networks]
        self.setting, self.step = None, 0
        self.is_perturbed = self.is_replaced = False
        self.last = {}
        self.draws("main", Call(kind.fewest), "alone")  # diffusers leaves a registry of its hooks at the first run
        self.untouched = list(map(fingerprint, self.networks)), self.held

    # Rules

    @initialize(config=configs)
    def begin(self, config):
        self.apply("main", config)

    @rule(who=pipelines, config=configs)
    def apply(self, who, config):
        """Gate a pipeline; one that is gated already, or cannot be gated so, says it and stays as it is."""
        pipe = self.pipe(who)
        if who in self.gates:
            with pytest.raises(StateError, match="must not be gated already"):
                apply_tgate(pipe, CONFIGS[config])
        else:
            self.gates[who] = apply_tgate(pipe, CONFIGS[config]), config

    @rule(who=pipelines, config=st.none() | configs)
    def remove(self, who, config=None):
        """Take a gate off, twice; after the last one there is no trace. Another may follow."""
        if who in self.gates:
            tgate, _ = self.gates.pop(who)
            self.last.pop(who, None)
            with self.saying_what_was_replaced():
                tgate.remove()
                tgate.remove()
        if not self.gates:
            self.has_no_trace()
        if config is not None:
            self.apply(who, config)

    @rule(who=pipelines, call=calls, passed=passed, events=st.lists(st.tuples(few, events), max_size=3))
    def run(self, who, call, passed, events):
        """Run a pipeline, with things going on in its callback."""
        self.draws(who, call, passed, events)

    @rule(call=calls, passed=passed, at=few, number=st.integers(0, 1), time=times)
    def run_with_a_call_in_its_callback(self, call, passed, at, number, time):
        """Call a network in the callback of the run that evaluates it."""
        self.draws("main", call, passed, [(at, ("direct", number, time))])

    @rule(
        who=pipelines,
        call=calls,
        passed=passed,
        how=st.sampled_from(["cancel", "remove"]),
        at=few,
        looks=st.booleans(),
    )
    def run_that_is_ended(self, who, call, passed, how, at, looks):
        """A run that is cancelled, or whose gate is removed, in its callback."""
        call = call.of(self.kind)
        if how == "cancel" and not hasattr(self.pipe(who), "interrupt"):
            how = "remove"
        with self.saying_what_was_replaced():
            self.draws(who, call, passed, end=(how, at % call.steps))
        if how == "remove" and who in self.gates:
            if "removed" in repr(self.gates[who][0]):
                del self.gates[who]
                self.is_perturbed |= call.perturbs(self.kind)  # it put back what it found
            if not self.gates:
                self.has_no_trace()
            return
        if who in self.gates and passed in ("alone", "after"):
            assert self.gates[who][0].gate.cache_bytes == 0  # the handle has seen it
        if looks:
            self.leaves_nothing(who)

    @rule(
        who=pipelines,
        call=calls,
        passed=passed,
        where=st.sampled_from(["first", "attention", "last", "side", "scheduler", "callback"]),
        at=st.integers(0, 8),
        error=st.sampled_from([Stop, KeyboardInterrupt]),
        looks=st.booleans(),
    )
    def run_that_fails(self, who, call, passed, where, at, error, looks):
        """A run that fails in an evaluation, in the scheduler or in a callback, if it comes so far."""
        try:
            with self.failing(who, where, error, at) as events:
                self.draws(who, call, passed, events)
        except error:
            self.is_perturbed |= call.of(self.kind).perturbs(self.kind)
            self.last.pop(who, None)
            if looks:
                self.leaves_nothing(who)

    @rule(who=pipelines, call=calls, passed=passed, at=st.integers(0, 8), event=own_business)
    def run_with_something_in_an_evaluation(self, who, call, passed, at, event):
        """In the middle of the network, as a hook of somebody's may do."""
        countdown = iter(range(at, -1, -1))

        def does(*_):
            if next(countdown, -1) == 0:
                hook.remove()
                self.step = at
                self.does(who, call.of(self.kind), event)

        hook = middle_of(self.networks[0]).register_forward_pre_hook(does)
        try:
            self.draws(who, call, passed)
        finally:
            hook.remove()

    @rule(who=pipelines, step=few, event=own_business)
    def between_runs(self, who, step, event):
        """Call a network on one's own, copy a pipeline and run the copy, save a network, ask what was done."""
        self.is_tidy()
        self.step = step
        self.does(who, Call(2).of(self.kind), event)

    @rule(who=st.sampled_from(["main", "own"]), scheduler=st.integers(0, 5))
    def change_the_scheduler(self, who, scheduler):
        scheduler %= len(self.kind.schedulers)
        self.pipe(who).scheduler = self.kind.schedulers[scheduler]()
        self.schedulers[who] = scheduler
        if who == "main":
            self.schedulers["shared"] = scheduler
            if "shared" in self.pipes:
                self.pipes["shared"].scheduler = self.pipes["main"].scheduler

    @rule(processors=st.integers(0, 1), by_default=st.booleans())
    def change_the_processors(self, processors, by_default):
        """By `set_attn_processor`, or back to the plainest ones, where the network has a method for it."""
        self.is_tidy()
        for network in self.networks:
            if by_default and hasattr(network, "set_default_attn_processor"):
                processors = 1
                network.set_default_attn_processor()
            else:
                network.set_attn_processor(self.kind.processors[processors]())
        self.processors, self.is_replaced = processors, True
        self.held = [held_by(network) for network in self.networks]

    @rule(who=pipelines, call=calls, then=st.sampled_from(["back", "remove and apply", "apply and remove"]))
    def change_the_denoiser(self, who, call, then):
        """For a copy. A gated pipeline says it at the next run, or runs as stock where it cannot be told of it."""
        self.is_tidy()
        pipe, part = self.pipe(who), part_of(self.pipe(who))
        original = getattr(pipe, part)
        setattr(pipe, part, copy.deepcopy(original))
        tgate, config = self.gates.pop(who, (None, None))
        if tgate is None:
            self.draws(who, call, "forgotten")
        else:
            self.says_that_it_has_another_denoiser(who, call, tgate)
            assert tgate.summary().notes
            if then == "apply and remove":
                self.gates[who] = apply_tgate(pipe, CONFIGS[config]), config
            if then != "back":
                with self.saying_what_was_replaced():
                    tgate.remove()
            if then == "remove and apply":
                self.gates[who] = apply_tgate(pipe, CONFIGS[config]), config
            if then != "back":
                self.draws(who, call, "alone")
                self.remove_from_another_denoiser(who)
        setattr(pipe, part, original)
        if then == "back" and tgate is not None:
            self.gates[who] = tgate, config

    def teardown(self):
        """With all gates removed it is the stock pipeline, without a trace."""
        for who in self.pipes:
            self.remove(who)
        for who in self.pipes:
            self.draws(who, Call(3), "alone")
        self.has_no_trace()

    # What is done

    def draws(self, who, call, passed, events=(), end=None):
        """Run a pipeline, and compare the latents."""
        pipe, call = self.pipe(who), call.of(self.kind)
        tgate, _ = self.gates.get(who, (None, None))
        picture = self.picture(who, call, end=end)
        if self.is_perturbed and not call.perturbs(self.kind):
            self.is_tidy()
        outer, self.setting = self.setting, call.setting
        self.last.pop(who, None)
        try:
            if picture.is_too_short:
                with pytest.raises(ConfigError, match="num_inference_steps"):
                    draw(pipe, call.kwargs(self.kind), tgate, None, passed)
                self.is_perturbed |= call.perturbs(self.kind)
                return
            latents = draw(
                pipe, call.kwargs(self.kind), tgate, partial(self.does_in_a_callback, who, call, events, end), passed
            )
        finally:
            self.setting = outer
        assert torch.equal(latents, fresh(picture))
        if tgate is not None and end is None:
            self.last[who] = picture
            if networks_of(pipe) == self.networks and not call.perturbs(self.kind):  # it puts back what it found
                self.is_replaced = False  # they were gated in turn
            if call.steps > 1 or passed != "forgotten":  # nobody says that one evaluation was all
                assert repr(tgate).endswith(f"over, {call.steps} steps")
                assert tgate.gate.cache_bytes == 0

    def does_in_a_callback(self, who, call, events, ending, pipe, step):
        for at, event in events:
            if at % call.steps == step:
                self.step = step
                self.does(who, call, event)
        if ending is not None and ending[1] == step:
            end(ending[0], pipe, self.gates.get(who, (None,))[0])

    def does(self, who, call, event):
        name, *arguments = event
        getattr(self, name)(who, call, *arguments)

    def direct(self, who, call, number, time):
        """Call a network of one's own accord; the time may be one that the scheduler has."""
        number %= len(self.networks)
        timesteps = self.pipe(who).scheduler.timesteps
        step = {"first": 0, "this": self.step, "next": self.step + 1}.get(time)
        is_known = step is not None and timesteps is not None  # PNDM has none before its first run
        timestep = timesteps[step % len(timesteps)] if is_known else torch.tensor(7)
        within = self.setting if self.kind.perturbs else None
        answered = answer(self.pipe(who), self.kind, number, timestep, within or 0)
        assert is_equal(answered, fresh_answer(self.kind, self.processors, number, timestep.item(), within))

    def draws_another(self, who, call, other, inner, passed, fails):
        """A picture of another pipeline, meanwhile; it may fail.

        Two runs at once on one scheduler are too much for the stock pipelines too, but for DDIM and as many steps.
        """
        shares_scheduler = {who, other} == {"main", "shared"}
        if shares_scheduler and type(self.pipe(who).scheduler) is diffusers.DDIMScheduler:
            inner = replace(inner, steps=call.steps)
        elif shares_scheduler or other == who:
            other = "own" if who != "own" else "main"
        if self.kind.perturbs:  # the processors that the run has put on are made for its own parts
            inner, fails = replace(inner, setting=call.setting), False
        inner = inner.of(self.kind)
        if self.picture(other, inner).is_too_short:
            return
        if not fails:
            self.draws(other, inner, passed)
            return
        with pytest.raises(Stop), self.failing(other, "last", Stop, 0):
            self.draws(other, inner, passed)

    def copies(self, who, call, is_gated):
        """A copy is not gated, and can be."""
        copied, call = twin(self.pipe(who)), Call(3, setting=call.setting)
        stock = fresh(self.picture(who, call, config=None))
        assert torch.equal(draw(copied, call.kwargs(self.kind)), stock)
        if is_gated:
            with apply_tgate(copied, CONFIGS[0]) as tgate:
                gated = fresh(self.picture(who, call, config=0))
                assert torch.equal(draw(copied, call.kwargs(self.kind), tgate), gated)
            assert torch.equal(draw(copied, call.kwargs(self.kind)), stock)

    def talks(self, who, call, counts):
        """Ask a handle what was done. Of a finished run it says what it says of a fresh pipeline's."""
        for name, (tgate, _) in self.gates.items():
            assert repr(tgate)
            if counts:  # takes a while
                said = str(tgate.summary())
                assert name not in self.last or said == fresh_summary(self.last[name])

    def saves(self, who, call, by_its_type):
        """What is saved can be loaded, by the class that the network seems to have too."""
        network = self.networks[0]
        cls = type(network) if by_its_type else getattr(diffusers, type(network).__name__)
        with tempfile.TemporaryDirectory() as folder:
            network.save_pretrained(folder)
            loaded = cls.from_pretrained(folder).eval()
        saved = self.kind.build()
        setattr(saved, part_of(saved), loaded)
        assert is_equal(answer(saved, self.kind, 0, torch.tensor(7)), fresh_answer(self.kind, 0, 0, 7))

    def raises(self, who, call, error):
        raise error

    @contextmanager
    def failing(self, who, where, error, at):
        """Have a run fail at evaluation or step `at`; gives the events of its callback."""
        countdown = iter(range(at, -1, -1))

        def fails(*_):
            if next(countdown, -1) == 0:
                raise error

        if where == "callback":
            yield [(at, ("raises", error))]
        elif where == "scheduler":
            scheduler, step = self.pipe(who).scheduler, self.pipe(who).scheduler.step
            scheduler.step = lambda *args, **kwargs: fails() or step(*args, **kwargs)
            try:
                yield ()
            finally:
                del scheduler.step
        else:
            network = self.networks[-1 if where == "side" else 0]
            modules = {"first": first_of, "attention": middle_of, "last": last_of, "side": middle_of}
            hook = modules[where](network).register_forward_pre_hook(fails)
            try:
                yield ()
            finally:
                hook.remove()

    def says_that_it_has_another_denoiser(self, who, call, tgate):
        pipe, call = self.pipe(who), call.of(self.kind)
        if takes_callback(pipe):
            with pytest.raises(StateError, match="`apply_tgate` again"):
                draw(pipe, call.kwargs(self.kind), tgate)
        else:
            assert torch.equal(draw(pipe, call.kwargs(self.kind)), fresh(self.picture(who, call, config=None)))

    def remove_from_another_denoiser(self, who):
        tgate, _ = self.gates.pop(who)
        self.last.pop(who, None)
        tgate.remove()

    # What is looked at

    def leaves_nothing(self, who):
        """After a run that did not come to its end a network is stock, and nothing is kept once it was called."""
        self.is_tidy()
        self.direct(who, None, 0, "of its own")
        if who in self.gates:
            assert self.gates[who][0].gate.cache_bytes == 0

    def has_no_trace(self):
        """The very processors are back that were put on last, and nothing else differs from before the first gate."""
        self.is_tidy()
        before, processors = self.untouched
        for network, held, original, traces in zip(self.networks, self.held, processors, before, strict=True):
            now = held_by(network)
            assert all(now[name] is processor for name, processor in held.items())
            network.set_attn_processor(dict(original))
            assert left_behind(traces, network) == {}
            network.set_attn_processor(dict(held))

    def is_tidy(self):
        """Undo what a failed run with perturbed attention leaves in the stock pipeline as well."""
        if self.is_perturbed and self.setting is None:
            for network, held in zip(self.networks, self.held, strict=True):
                network.set_attn_processor(dict(held))
            self.is_perturbed, self.is_replaced = False, True

    @contextmanager
    def saying_what_was_replaced(self):
        """`remove` says so where processors were changed meanwhile, and only there."""
        with warnings.catch_warnings():
            if self.is_replaced or self.is_perturbed:
                warnings.filterwarnings("ignore", ".*attention processors were replaced while the pipeline was gated")
            yield

    def picture(self, who, call, **changes):
        """What a run of a pipeline has to draw."""
        config = self.gates.get(who, (None, None))[1]
        picture = Picture(self.kind, self.schedulers[who], self.processors, call, config)
        return replace(picture, **changes)

    def pipe(self, who):
        """A pipeline by its name."""
        if who not in self.pipes:
            main = self.pipes["main"]
            own = self.kind.schedulers[self.schedulers["own"]]()
            self.pipes[who] = sibling(main, main.scheduler if who == "shared" else own)
        return self.pipes[who]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_programs(kind):
    run_state_machine_as_test(
        partial(Program, kind),
        settings=settings(
            max_examples=max(1, PROGRAMS // len(KINDS)),
            stateful_step_count=STEPS,
            suppress_health_check=list(HealthCheck),
        ),
    )
