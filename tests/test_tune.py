"""What tune chooses, what it draws for it, and its command."""

import json
import math
from dataclasses import replace

import pytest
import torch
import zoo_transformers  # noqa: F401  # its pipelines register themselves
from PIL import Image
from tiny import fingerprint, left_behind, seeded, tiny
from zoo import ENTRIES
from zoo import seeded as seeded_pipeline

from tgate_processors import ConfigError, StateError, TGateConfig, UnsupportedPipelineError, apply_tgate
from tgate_processors._installation import is_gated
from tgate_processors.cli import main
from tgate_processors.demo.embedded import load_demo_pipeline
from tgate_processors.demo.evaluate import held_out_scenes
from tgate_processors.demo.world import caption
from tgate_processors.measure import likeness
from tgate_processors.measure.samplers import SAMPLERS, sampler_on
from tgate_processors.measure.tune import GATES, LOOKS, Tried, Tuning, candidates, tune


MODULE = "tgate_processors.measure.tune"
STEPS, SEED, SAMPLER = 6, 5, "euler-a"
PROMPTS = [caption(scene) for scene in held_out_scenes(2, SEED)]
SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": 5.0}
NO_PICTURES = torch.zeros(2, 3, 8, 8)


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def few(monkeypatch):
    """Two settings, the dearer one first: a gate at 4, and looks at every second step from the first on."""
    monkeypatch.setattr(f"{MODULE}.GATES", (0.6,))
    monkeypatch.setattr(f"{MODULE}.LOOKS", ((0.1, 2),))


# The choice


def tried(gate_step, arithmetic, *psnr):
    return Tried(TGateConfig(gate_step=gate_step), arithmetic, torch.tensor(psnr), NO_PICTURES)


CHEAP, MIDDLE, WORSE, DEAR = (
    tried(1, 0.5, 19.0, 21.0),
    tried(2, 0.6, 29.0, 31.0),
    tried(3, 0.7, 24.0, 26.0),
    tried(4, 0.8, 39.0, 41.0),
)


def tuning(*rows, **budget):
    return Tuning({"pipeline": "toy", "steps": 9}, NO_PICTURES, rows or (CHEAP, MIDDLE, WORSE, DEAR), **budget)


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        ({"psnr": 15}, CHEAP),
        ({"psnr": 20}, CHEAP),  # the mean, not the least
        ({"psnr": 20.5}, MIDDLE),
        ({"psnr": 24}, MIDDLE),
        ({"psnr": 30.5}, DEAR),
        ({"psnr": 40.5}, None),
        ({"arithmetic": 1.0}, DEAR),
        ({"arithmetic": 0.8}, DEAR),
        ({"arithmetic": 0.79}, MIDDLE),  # the likest, not the dearest
        ({"arithmetic": 0.55}, CHEAP),
        ({"arithmetic": 0.45}, None),
        ({"psnr": 25, "arithmetic": 1.0}, MIDDLE),  # the cheapest, with both
        ({"psnr": 35, "arithmetic": 0.8}, DEAR),
        ({"psnr": 35, "arithmetic": 0.7}, None),
        ({"psnr": 20, "arithmetic": 0.4}, None),
    ],
)
def test_the_choice_by_hand(budget, chosen):
    assert tuning(**budget).chosen is chosen


def test_of_two_that_are_as_cheap_the_likest_is_chosen():
    like, unlike = tried(1, 0.5, 30.0), tried(2, 0.5, 25.0)
    assert tuning(unlike, like, psnr=20).chosen is like
    assert tuning(like, unlike, psnr=20).chosen is like


def test_the_table_says_what_keeps_the_budget():
    lines = str(tuning(psnr=24, arithmetic=0.75)).splitlines()
    assert lines[0] == "pipeline toy, steps 9"
    marks = {line.split()[0]: line.split()[-1] for line in lines if line.startswith("gate_step=")}
    assert marks == {"gate_step=1": "32.7)", "gate_step=2": "chosen", "gate_step=3": "within", "gate_step=4": "52.7)"}
    assert lines[-1] == "tgate = apply_tgate(pipe, TGateConfig(gate_step=2))"


def test_where_nothing_keeps_the_budget_it_says_what_is_possible():
    nothing = tuning(psnr=35, arithmetic=0.7)
    assert str(nothing).splitlines()[-1] == (
        "no setting is within the budget (at least 35 dB, at most 0.7 of the arithmetic): the cheapest does 0.50 of "
        "the arithmetic, the nearest to stock has 40.0 dB"
    )
    assert nothing.as_dict()["chosen"] is None
    assert "(at least 99 dB)" in str(tuning(psnr=99))
    assert repr(tuning(psnr=99)) == "Tuning(4 settings tried, chosen: none)"
    assert repr(tuning(psnr=20)) == f"Tuning(4 settings tried, chosen: {CHEAP.config})"
    assert "(at most 0.1 of the arithmetic)" in str(tuning(arithmetic=0.1))


def test_the_record_says_the_same():
    record = json.loads(json.dumps(tuning(psnr=24).as_dict()))
    assert record["budget"] == {"psnr": 24, "arithmetic": None}
    assert [one["keeps"] for one in record["tried"]] == [False, True, True, True]
    assert record["chosen"]["python"] == MIDDLE.python
    assert record["chosen"]["psnr"]["mean"] == 30


@pytest.mark.parametrize("psnr", [20, 99])
def test_what_is_pictured_is_what_is_chosen_or_else_the_likest(psnr):
    """Six pictures at most, of as many prompts."""
    rows = [
        Tried(one.config, one.arithmetic, one.psnr, torch.full((8, 3, 160, 160), grey))
        for one, grey in ((CHEAP, 0.2), (DEAR, 0.6))
    ]
    page = Tuning({"steps": 9}, torch.full((8, 3, 160, 160), 0.8), rows, psnr=psnr).pictures(["a circle"] * 8)
    greys = {colour[0]: count for count, colour in page.getcolors(1 << 20) if count >= 160 * 160}
    size = 6 * 160 * 160
    assert {grey for grey, count in greys.items() if count >= size} >= {204, 51 if psnr == 20 else 153}
    assert not set(greys) & {153 if psnr == 20 else 51}
    assert greys[204] < 7 * 160 * 160


# A real run


@pytest.fixture(scope="module")
def tuned(pipe):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{MODULE}.GATES", (0.6,))
        patch.setattr(f"{MODULE}.LOOKS", ((0.1, 2),))
        scheduler, before = pipe.scheduler, fingerprint(pipe.unet)
        found = tune(pipe, PROMPTS, psnr=20, sampler=SAMPLER, seed=SEED, **SETTINGS)
        assert pipe.scheduler is scheduler
        assert left_behind(before, pipe.unet) == {}
        return found


def drawn(pipe, callback=None, prompts=PROMPTS):
    pictures = []
    for number, prompt in enumerate(prompts):
        changes = {} if callback is None else {"callback_on_step_end": callback}
        generator = seeded(SEED + number)
        pictures.append(pipe(prompt, generator=generator, output_type="pt", **SETTINGS, **changes).images)
    return torch.cat(pictures)


def test_the_settings_are_tried_from_the_cheapest_on(tuned):
    assert sorted(str(one.config) for one in tuned.tried) == [
        "gate_step=1, look_interval=2",
        "gate_step=4",
    ]
    arithmetic = [one.arithmetic for one in tuned.tried]
    assert arithmetic == sorted(arithmetic)
    assert 0.5 < arithmetic[0] < arithmetic[-1] < 1
    assert tuned.settings["sampler"] == SAMPLER
    assert (tuned.settings["steps"], tuned.settings["prompts"], tuned.settings["seed"]) == (STEPS, 2, SEED)


def test_each_setting_draws_the_recorded_pictures_again(pipe, tuned):
    """Also the one that is chosen."""
    with sampler_on(pipe, SAMPLER):
        stock = drawn(pipe)
        assert torch.equal(stock, tuned.stock)
        for one in tuned.tried:
            with apply_tgate(pipe, one.config) as tgate:
                pictures = drawn(pipe, tgate)
                summary = tgate.summary()
            assert torch.equal(pictures, one.pictures)
            assert torch.equal(likeness.psnr(pictures, stock), one.psnr)
            assert one.arithmetic == pytest.approx(summary.cost.macs / summary.stock_macs)
    assert not torch.equal(drawn(pipe), stock)  # it was the sampler's


def test_the_cheapest_that_keeps_the_budget_is_chosen(tuned):
    assert [one.mean_psnr >= 20 for one in tuned.tried] == [True, True]
    assert tuned.chosen is tuned.tried[0]
    likest = max(one.mean_psnr for one in tuned.tried)
    assert replace(tuned, psnr=likest).chosen.mean_psnr == likest
    assert replace(tuned, psnr=likest + 0.1).chosen is None


def test_the_line_runs(pipe, tuned):
    for one in tuned.tried:
        names = {"pipe": pipe, "apply_tgate": apply_tgate, "TGateConfig": TGateConfig}
        exec(one.python, names)
        with names["tgate"] as tgate:
            assert tgate.config == one.config
            assert is_gated(pipe.unet)


def test_the_pipelines_own_sampler_is_tuned_where_none_is_named(pipe, few):
    found = tune(pipe, PROMPTS[:1], arithmetic=0.8, seed=SEED, **SETTINGS)
    assert torch.equal(found.stock, drawn(pipe, prompts=PROMPTS[:1]))
    assert found.settings["sampler"] == "its own"
    assert found.settings["scheduler"] == type(pipe.scheduler).__name__
    cheap, dear = found.tried
    assert cheap.arithmetic < 0.8 < dear.arithmetic
    assert cheap.mean_psnr < dear.mean_psnr  # which the budget does not allow
    assert found.chosen is cheap


# What is tried


@pytest.mark.parametrize("steps", [3, 6, 25, 50])
def test_every_setting_that_is_tried_closes_and_is_tried_once(pipe, steps):
    configs = candidates(pipe, steps)
    assert len(set(configs)) == len(configs)
    assert all(config.schedule(steps).gate_step < steps for config in configs)
    assert any(config.look_interval for config in configs)
    if steps >= 25:
        assert len(configs) == len(GATES) + len(LOOKS)


def test_a_pipeline_without_guidance_is_tried_without_looks():
    configs = candidates(seeded_pipeline(ENTRIES["SanaSprintPipeline"].build), 25)
    assert [config.gate_step for config in configs] == [5, 8, 10, 12, 15, 20]
    assert not any(config.look_interval for config in configs)


def test_a_pipeline_that_cannot_be_gated_is_refused_before_it_draws():
    subject = tiny("sd")
    with (
        apply_tgate(subject.pipe, TGateConfig(gate_step=2)),
        pytest.raises(StateError, match="`pipe` must not be gat"),
    ):
        tune(subject.pipe, ["a circle"], num_inference_steps=6, psnr=30)
    with pytest.raises(UnsupportedPipelineError, match="`pipe` must be a diffusers pipeline with a `unet`"):
        tune(object(), ["a circle"], num_inference_steps=6, psnr=30)


# Ctrl-C


def presses_ctrl_c(monkeypatch, call):
    """In the call of `draw` of this number, from 1 on."""
    from tgate_processors.measure.tune import draw

    numbers = iter(range(1, 99))

    def interrupted(*args, **kwargs):
        if next(numbers) == call:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    monkeypatch.setattr(f"{MODULE}.draw", interrupted)


def test_what_is_done_is_kept_after_ctrl_c(pipe, few, monkeypatch):
    presses_ctrl_c(monkeypatch, 3)
    scheduler, before = pipe.scheduler, fingerprint(pipe.unet)
    found = tune(pipe, PROMPTS[:1], psnr=1, sampler="ddim", **SETTINGS)
    assert found.settings["interrupted"] is True
    assert [str(one.config) for one in found.tried] == ["gate_step=4"]
    assert found.chosen is found.tried[0]
    assert pipe.scheduler is scheduler
    assert left_behind(before, pipe.unet) == {}


def test_ctrl_c_before_anything_is_done_ends_it(pipe, few, monkeypatch):
    presses_ctrl_c(monkeypatch, 2)
    scheduler = pipe.scheduler
    with pytest.raises(KeyboardInterrupt):
        tune(pipe, PROMPTS[:1], psnr=1, sampler="ddim", **SETTINGS)
    assert pipe.scheduler is scheduler


# The command


ARGUMENTS = ["tune", "--count", "2", "--steps", str(STEPS), "--seed", str(SEED), "--sampler", SAMPLER]


def test_the_command_prints_the_line_and_writes_a_picture(few, tuned, tmp_path, capsys):
    picture = tmp_path / "t.png"
    assert main([*ARGUMENTS, "--psnr", "20", "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert tuned.chosen.python in printed.splitlines()
    assert printed.count("gate_step=") == len(tuned.tried) + 1
    assert f"pictures: {picture}" in printed
    with Image.open(picture) as page:
        assert page.size == tuned.pictures(PROMPTS).size
        assert min(page.size) > 150
        assert page.convert("RGB").tobytes() == tuned.pictures(PROMPTS).tobytes()


def test_the_command_prints_one_json_object(few, tuned, tmp_path, capsys):
    arguments = [*ARGUMENTS, "--arithmetic", "0.8", "--out", str(tmp_path / "t.png"), "--json"]
    assert main(arguments) == 0
    record = json.loads(capsys.readouterr().out)
    best = max((one for one in tuned.tried if one.arithmetic <= 0.8), key=lambda one: one.mean_psnr)
    assert record["chosen"]["python"] == best.python
    assert record["chosen"]["psnr"]["mean"] == pytest.approx(best.mean_psnr)
    assert record["budget"] == {"psnr": None, "arithmetic": 0.8}
    assert [one["arithmetic"] for one in record["tried"]] == [one.arithmetic for one in tuned.tried]
    assert (tmp_path / "t.png").is_file()


def test_the_command_says_that_nothing_keeps_the_budget(monkeypatch, tmp_path, capsys):
    """It is an answer, not a failure; the picture shows the likest."""
    monkeypatch.setattr("tgate_processors.cli.commands.tune", lambda pipe, prompts, **_: tuning(psnr=99))
    picture = tmp_path / "t.png"
    assert main([*ARGUMENTS, "--psnr", "99", "--out", str(picture)]) == 0
    assert "no setting is within the budget (at least 99 dB): the cheapest does 0.50" in capsys.readouterr().out
    assert picture.is_file()


def test_the_command_ends_with_what_is_done(few, monkeypatch, tmp_path, capsys):
    presses_ctrl_c(monkeypatch, 3)
    arguments = [*ARGUMENTS, PROMPTS[0], "--psnr", "1", "--out", str(tmp_path / "t.png"), "--json"]
    assert main(arguments) == 130
    said = capsys.readouterr()
    record = json.loads(said.out)
    assert record["chosen"]["python"] == "tgate = apply_tgate(pipe, TGateConfig(gate_step=4))"
    assert record["settings"]["interrupted"] is True
    assert "tgate-processors tune: interrupted: the report covers what was done until then" in said.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`--psnr` or `--arithmetic` must be given, got neither"),
        (["--psnr", "0"], "`--psnr` must be a positive number of dB, got 0.0"),
        (["--psnr", "nan"], "`--psnr` must be a positive number of dB, got nan"),
        (["--arithmetic", "1.5"], "`--arithmetic` must be a share of the stock run's, between 0 and 1, got 1.5"),
        (["--arithmetic", "0"], "`--arithmetic` must be a share of the stock run's, between 0 and 1, got 0.0"),
        (["--psnr", "30", "--steps", "2"], "`--steps` must be a whole number of at least 3, got 2"),
        (["--psnr", "30", "--count", "0"], "`--count` must be a whole number of at least 1, got 0"),
        (["--psnr", "30", "--sampler", "dpm"], f"`--sampler` must be one of {', '.join(SAMPLERS)}, got 'dpm'"),
        (
            ["--psnr", "30", "--out", "missing/t.png"],
            "`--out` must be a place that can be written to, got 'missing/t.png': No such file",
        ),
        (["--psnr", "30", "--out", "t.nothing"], "`--out` must end in the suffix of a format that can be written"),
    ],
)
def test_bad_arguments(arguments, message, capsys, monkeypatch, tmp_path):
    """Nothing is drawn for them, or written."""
    monkeypatch.chdir(tmp_path)
    presses_ctrl_c(monkeypatch, 1)
    assert main(["tune", *arguments]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"psnr": None}, "`psnr` or `arithmetic` must be given, got neither"),
        ({"psnr": -1}, "`psnr` must be a positive number of dB, got -1"),
        ({"arithmetic": math.nan}, "`arithmetic` must be a share of the stock run's, between 0 and 1, got nan"),
        ({"prompts": []}, r"`prompts` must be a list of at least one prompt, got \[\]"),
        ({"prompts": "a circle"}, "`prompts` must be a list of at least one prompt, got 'a circle'"),
        ({"num_inference_steps": 2}, "`num_inference_steps` must be a whole number of at least 3, got 2"),
        ({"sampler": "dpm"}, "`sampler` must be one of ddim, .*, got 'dpm'"),
    ],
)
def test_bad_arguments_of_the_function(pipe, changes, message, monkeypatch):
    presses_ctrl_c(monkeypatch, 1)
    with pytest.raises(ConfigError, match=message):
        tune(pipe, **{"prompts": PROMPTS, "psnr": 30, "num_inference_steps": 6} | changes)
