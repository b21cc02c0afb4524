"""What quality reports: shared runs, arithmetic, intervals, the frontier, and ways that fail."""

import json
import math
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import pytest
import torch
import zoo_transformers  # noqa: F401  # its pipelines register themselves
from diffusers import UniPCMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image
from tiny import fingerprint, left_behind, seeded, tiny
from torch.nn import functional
from zoo import ENTRIES
from zoo import seeded as seeded_pipeline

from tgate_processors import ConfigError, TGateConfig, apply_tgate
from tgate_processors.cli import main
from tgate_processors.demo import experiments
from tgate_processors.demo.embedded import load_demo_pipeline
from tgate_processors.demo.evaluate import generate, held_out_scenes
from tgate_processors.demo.world import caption
from tgate_processors.measure import likeness, quality_plot, ways
from tgate_processors.measure.intervals import difference, estimate
from tgate_processors.measure.plotting import new_figure
from tgate_processors.measure.quality import Drawn, chosen_ways, compare, draw, quality_of_pipeline, ways_for
from tgate_processors.measure.quality_plot import plot_quality
from tgate_processors.measure.quality_report import Quality, Report, Row
from tgate_processors.measure.samplers import SAMPLERS, sampler_on
from tgate_processors.measure.ways import Way, named


STEPS = 6
SETTINGS = {"num_inference_steps": STEPS, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def whole(pipe, **kwargs):
    """-> 0..1."""
    scenes = held_out_scenes(3, 5)
    return (generate(pipe, [caption(s) for s in scenes], range(5, 8), **SETTINGS | kwargs) + 1) / 2


# Ways


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_the_control_drops_guidance(pipe, sampler):
    def drop(pipe, step_index, timestep, kwargs):
        if step_index + 1 == 2 * pipe.scheduler.order:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[1]
        return kwargs

    with sampler_on(pipe, sampler):
        expected = whole(pipe, callback_on_step_end=drop, callback_on_step_end_tensor_inputs=["prompt_embeds"])
        with ways.dropping_guidance(2).on(pipe) as changes:
            assert torch.allclose(whole(pipe, **changes), expected, rtol=0, atol=1e-4)


def test_ways_leave_no_trace(pipe):
    before = fingerprint(pipe.unet)
    for way in ways_for(STEPS, has_unet=True):
        if "tomesd" in way.name:
            continue  # its own `remove_patch` leaves attributes behind
        with way.on(pipe) as changes:
            pipe(**SETTINGS | {"prompt": "a circle", "output_type": "latent"} | changes)
        assert left_behind(before, pipe.unet) == {}, way.name


def test_a_batch_decides_together_and_is_drawn_alone(pipe):
    prompts = [caption(scene) for scene in held_out_scenes(3, 0)]
    sizes = []

    def arguments(chunk):
        sizes.append(len(prompts[chunk]))
        return SETTINGS | {"prompt": prompts[chunk], "generator": [seeded(s) for s in range(3)[chunk]]}

    auto = next(way for way in ways_for(STEPS, has_unet=True) if way.name == "gate step auto")
    assert auto.is_alone
    assert len(draw(pipe, auto, 3, arguments, batch_size=2).pictures) == 3
    assert set(sizes) == {1}
    sizes.clear()
    draw(pipe, ways.stock(), 3, arguments, batch_size=2)
    assert sizes == [2, 1, 1]  # and once more to be counted


# Samplers


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_is_there_for_a_while(pipe, name):
    own = pipe.scheduler
    with sampler_on(pipe, name):
        assert type(pipe.scheduler).__name__ == SAMPLERS[name][0]
        assert pipe.scheduler.config.prediction_type == own.config.prediction_type
        assert pipe.scheduler.config.get("use_karras_sigmas", False) is ("karras" in name)
        assert torch.isfinite(whole(pipe)).all()
    assert pipe.scheduler is own


def test_a_sampler_is_what_its_name_says_whatever_the_pipeline_has():
    pipe = load_demo_pipeline()
    with sampler_on(pipe, "dpm++-2m-sde-karras"):
        with sampler_on(pipe, "dpm++-2m-karras"):
            assert pipe.scheduler.config.algorithm_type == "dpmsolver++"
        with sampler_on(pipe, "euler"):
            assert pipe.scheduler.config.use_karras_sigmas is False


def test_an_unknown_sampler_lists_the_known_ones(pipe):
    with (
        pytest.raises(ConfigError, match=r"`sampler` must be one of ddim, dpm\+\+-2m-karras, .*, got 'dpm'"),
        sampler_on(pipe, "dpm"),
    ):
        pass


@pytest.mark.parametrize("name", ["LTXPipeline", "WanPipeline"])
def test_a_sampler_that_does_not_suit_the_model_is_refused(name):
    pipe = seeded_pipeline(ENTRIES[name].build)
    if name == "WanPipeline":
        pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with (
        pytest.raises(ConfigError, match=r"`sampler` must suit the pipeline's \w+Scheduler, got 'ddim'"),
        sampler_on(pipe, "ddim"),
    ):
        pass


def test_arithmetic_is_counted_run_by_run(pipe):
    prompts = ["a large red circle on a blue background"] * 2

    def arguments(chunk):
        return SETTINGS | {"prompt": prompts[chunk], "generator": [seeded(s) for s in range(2)[chunk]]}

    stock = draw(pipe, ways.stock(), 2, arguments)
    with apply_tgate(pipe, TGateConfig(gate_step=2)) as tgate:
        pipe(**arguments(slice(0, 1)), callback_on_step_end=tgate)
        summary = tgate.summary()
    assert stock.macs == summary.stock_macs
    assert draw(pipe, ways.gated(TGateConfig(gate_step=2), "x"), 2, arguments).macs == summary.cost.macs
    assert draw(pipe, ways.fewer_steps(3), 2, arguments).macs == stock.macs / 2
    auto = draw(pipe, ways.gated(TGateConfig(gate_step="auto", tolerance=0.9), "x"), 2, arguments)
    assert auto.gate_steps == (4, 4)
    with apply_tgate(pipe, TGateConfig(gate_step=4)) as tgate:
        pipe(**arguments(slice(0, 1)), callback_on_step_end=tgate)
        assert auto.macs == tgate.summary().cost.macs
    assert draw(pipe, ways.token_merging(0.5), 2, arguments).macs < stock.macs
    assert draw(pipe, ways.deep_cache(3), 2, arguments).macs < stock.macs


def test_runs_that_close_at_different_steps_are_counted_apart(pipe):
    steps = 10
    prompts = [caption(scene) for scene in held_out_scenes(6, 0)]

    def arguments(chunk):
        generators = [torch.Generator().manual_seed(seed) for seed in range(chunk.start, chunk.stop)]
        return {"prompt": prompts[chunk], "generator": generators, "num_inference_steps": steps}

    drawn = draw(pipe, ways.gated(TGateConfig(gate_step="auto"), "auto"), 6, arguments)
    assert len(set(drawn.gate_steps)) > 1
    by_step = {
        step: draw(pipe, ways.gated(TGateConfig(gate_step=step), ""), 1, arguments).macs for step in drawn.gate_steps
    }
    assert drawn.macs == pytest.approx(sum(by_step[step] for step in drawn.gate_steps) / 6, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "config", "sampler"),
    [
        ("the mean of the halves stored (the papers')", TGateConfig(gate_step=9), "ddim"),
        ("looks at 11, 17, 23; fade measured", TGateConfig(gate_step=6, look_interval=6), "euler-a"),
        ("looks at 11, 17, 23; fade measured", TGateConfig(gate_step=6, look_interval=6), "dpm++-2m-karras"),
        ("looks every 4 from 2 on; fade measured (8 steps)", TGateConfig(gate_step=3, look_interval=4), "ddim"),
        ("looks every 4 from 2 on; fade measured (8 steps)", TGateConfig(gate_step=3, look_interval=4), "heun"),
    ],
)
def test_the_experiments_loop_draws_what_the_pipeline_draws(name, config, sampler):
    """The variants that the library offers come out of the loop of the experiments too."""
    scenes = held_out_scenes(2, 9)
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": experiments.STEPS, "guidance_scale": experiments.SCALE}
    with sampler_on(pipe, sampler), apply_tgate(pipe, config) as tgate:
        expected = generate(pipe, [caption(s) for s in scenes], range(9, 11), **settings, callback_on_step_end=tgate)
    with torch.no_grad():
        loop = experiments.Loop(load_demo_pipeline(), scenes, 9, sampler)
        loop.stock()
        drawn = loop.run(next(variant for variant in experiments.VARIANTS if variant.name == name))
    assert torch.allclose(drawn * 2 - 1, expected.clamp(-1, 1), rtol=0, atol=1e-3)


def test_the_experiments_are_a_command(capsys, monkeypatch):
    monkeypatch.setattr(experiments, "VARIANTS", experiments.VARIANTS[:1] + experiments.VARIANTS[11:12])
    experiments.main(["--count", "2", "--seeds", "4", "--sampler", "euler-a", "ddim"])
    printed = capsys.readouterr().out
    rows = ["stock", "guidance dropped, cross-attention computed (the control)", "guidance kept by frequency", ""]
    assert [line.split("  ")[0] for line in printed.splitlines()] == ["sampler euler-a", *rows, "sampler ddim", *rows]


# Numbers


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_a_share_lies_in_its_interval(right):
    share = estimate(torch.tensor(right))
    assert -1e-12 <= share.low <= share.mean + 1e-12
    assert share.mean - 1e-12 <= share.high <= 1 + 1e-12
    assert share.high - share.low > 0


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=300))
def test_a_difference_lies_in_its_interval_which_is_one(pairs):
    values, others = torch.tensor(pairs).T
    change = difference(values, others)
    assert change.low <= change.mean + 1e-9
    assert change.mean - 1e-9 <= change.high
    assert change.high - change.low > 0
    back = difference(others, values)
    assert (back.mean, back.low, back.high) == pytest.approx((-change.mean, -change.high, -change.low))


def test_a_difference_of_pairs_by_hand():
    """Bonett and Price: of 24 pairs that agree, 1/26 for each kind of disagreement."""
    agree = torch.ones(24, dtype=torch.bool)
    change = difference(agree, agree)
    assert change.mean == 0
    assert change.high == -change.low == pytest.approx(1.96 * math.sqrt(2 / 26 / 26))
    conditions = torch.stack([agree, ~agree])  # half right each time: one observation of a half
    assert difference(conditions, torch.stack([agree, agree])).mean == -0.5


def test_intervals_by_hand():
    share = estimate(torch.tensor([True] * 8 + [False] * 2))  # Wilson 1927, worked out: 0.490 to 0.943
    assert (share.mean, round(share.low, 3), round(share.high, 3)) == (0.8, 0.490, 0.943)
    mean = estimate(torch.tensor([1.0, 2.0, 3.0]))
    assert mean.mean == 2
    assert mean.high - 2 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)  # Student's t of two degrees of freedom
    alone = estimate(torch.tensor([1.0]))
    assert (alone.mean, alone.low, alone.high) == (1, -math.inf, math.inf)


def row(name, arithmetic, score, **more):
    return Row(name, arithmetic=arithmetic, scores={"all": torch.full((4,), float(score))}, **more)


LIKENESS = {"psnr": torch.arange(4.0), "ssim": torch.ones(4)}
REPORT = Report(
    "toy",
    "all",
    (
        row("stock", 1.0, 0.99),
        row("gate step 4", 0.6, 0.80, gate_step=4, **LIKENESS),
        row("gate step 5", 0.7, 0.93, gate_step=5, **LIKENESS),
        row("gate step 6", 0.8, 0.95, gate_step=6, **LIKENESS),
        row("fewer steps: 5", 0.7, 0.90, **LIKENESS),
        row("gate step auto", 0.75, 0.94, gate_steps=(4, 5, 7), **LIKENESS),
        Row("broken", "RuntimeError: no"),
    ),
    "gate step 5",
)


def test_the_frontier_by_hand():
    names = [row.name for row in REPORT.frontier()]
    assert names == ["gate step 4", "gate step 5", "gate step auto", "gate step 6", "stock"]
    printed = str(REPORT)
    assert f"gate step {REPORT.gate_step()} has the largest fitted score minus half of the arithmetic" in printed
    assert "gate step auto: the gate closed at step 5 in the median run, 4 to 7 in all" in printed
    assert "broken: RuntimeError: no" in printed
    assert REPORT.as_dict()["frontier"] == names
    assert repr(REPORT) == "Report(sampler toy, 7 methods)"
    assert REPORT._repr_html_().startswith("<table>")


def test_samplers_together_by_hand():
    """Of two prompts the way draws one right under both samplers, and the other under none."""
    right = torch.tensor([True, True])
    report = Report(
        "one",
        "all",
        (
            Row("stock", arithmetic=1.0, scores={"all": right}),
            Row("papers", arithmetic=0.5, scores={"all": right}, psnr=torch.tensor([20.0, 22.0]), ssim=torch.ones(2)),
            Row("way", arithmetic=0.4, scores={"all": right & torch.tensor([True, False])}, **LIKENESS_OF_TWO),
            Row("broken", "no"),
        ),
        "papers",
    )
    quality = Quality({"model": "toy"}, (report, replace(report, sampler="two")))
    stock, papers, way = quality.together()
    assert (way.name, way.scores, way.together) == ("way", {"one": 0.5, "two": 0.5}, 0.5)
    assert way.arithmetic == pytest.approx(0.4)
    assert way.to_stock == way.to_papers
    assert way.to_stock.mean == -0.5
    assert way.psnr_to_papers.mean == 4
    assert stock.to_stock is None
    assert papers.to_stock.mean == 0
    assert papers.to_stock.high > 0 > papers.to_stock.low
    assert papers.to_papers is None
    assert "all samplers" in str(quality)
    assert repr(quality) == "Quality(4 methods under one, two)"
    assert "all samplers" not in str(replace(quality, reports=(report,)))


LIKENESS_OF_TWO = {"psnr": torch.tensor([24.0, 26.0]), "ssim": torch.ones(2)}


@given(st.floats(0.5, 0.9), st.floats(0.2, 2), st.lists(st.floats(-0.004, 0.004), min_size=14, max_size=14))
def test_the_gate_that_the_frontier_suggests(rate, size, noise):
    """Of losses that fall exponentially, with a little noise, it is the best one or a neighbour that is as good."""
    gates = range(1, 15)
    cost = {gate: size * rate**gate + gate / 100 for gate in gates}
    rows = [row(f"gate step {g}", g / 50, 1 - size * rate**g + noise[g - 1], gate_step=g) for g in gates]
    suggested = Report("", "all", (row("stock", 1, 1), *rows)).gate_step()
    assert cost[suggested] - min(cost.values()) < 0.01


def test_few_gates_suggest_nothing():
    assert Report("", "all", REPORT.rows[:3]).gate_step() is None


@pytest.mark.parametrize("samplers", [1, 3])
def test_it_is_pictured(tmp_path, samplers):
    plot_quality(Quality({"model": "toy"}, [REPORT] * samplers), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_names_in_the_picture_lie_apart(tmp_path, monkeypatch):
    looks = [row(f"look: {gate}, every 5", 0.6 + gate / 1000, 0.9) for gate in range(4, 10)]
    report = Report("toy", "all", (*REPORT.rows[:2], *looks, row("gate step 1", 0.5, 0.3, gate_step=1)))
    figure = new_figure(9, 7)
    monkeypatch.setattr(quality_plot, "new_figure", lambda *size: figure)
    plot_quality(Quality({"model": "toy"}, [report]), tmp_path / "plot.png")
    names = figure.axes[0].texts
    assert {name.get_text() for name in names} == {"stock", "gate step 4", *(look.name for look in looks)}
    assert not any(one.overlaps(other) for one, other in combinations(map(Text.get_window_extent, names), 2))
    assert figure.axes[0].get_xlabel().endswith("below what is shown: gate step 1 30.0%")


def test_likeness_by_hand():
    pictures = torch.full((2, 3, 16, 16), 0.5)
    others = pictures.clone()
    others[1] += 0.1
    assert likeness.psnr(pictures, others).tolist() == [math.inf, pytest.approx(20, abs=1e-3)]
    assert likeness.ssim(pictures, others)[0] == pytest.approx(1)
    assert likeness.ssim(pictures, others)[1] < 1


def test_a_frechet_distance_by_hand():
    class Corner(torch.nn.Module):
        num_features = 2

        def forward(self, pictures):
            return pictures[:, :2, 0, 0]

    pictures = torch.rand(200, 3, 4, 4, generator=seeded(0), dtype=torch.float32)
    distance = likeness.FrechetDistance(pictures, Corner())
    assert distance(pictures) == pytest.approx(0, abs=1e-5)
    assert distance(pictures + 0.5) == pytest.approx(0.5, abs=1e-3)
    assert distance(pictures) == pytest.approx(0, abs=1e-5)  # with nothing of the pictures before


# Ways that fail


def test_a_way_that_fails_is_reported():
    @contextmanager
    def on(pipe):
        raise RuntimeError("no kernel\nfor this")
        yield

    pictures = torch.rand(2, 3, 16, 16, generator=seeded(0))

    def draw_way(way):
        with way.on(None):
            return Drawn(pictures, 10)

    rows = compare(
        [ways.stock(), Way("broken", on), ways.stock()],
        draw_way,
        lambda drawn, stock: {"all": torch.tensor([True, False])},
        "all",
        "toy",
        settings={},
    ).rows
    assert [row.error for row in rows] == [None, "RuntimeError: no kernel for this", None]
    assert rows[2].psnr.tolist() == [math.inf] * 2


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchmetrics.functional", None)
    with pytest.raises(ImportError, match=r"`torchmetrics` must be installed.*tgate-processors\[quality\]"):
        likeness.psnr(torch.zeros(1), torch.zeros(1))


def test_names_choose():
    candidates = ways_for(STEPS, has_unet=True)
    chosen = named(candidates, ["Deep"])
    assert [way.name for way in chosen] == ["stock", "DeepCache, interval 3", "DeepCache, interval 3, gated"]
    assert [way.name for way in named(candidates, ["tomesd"])][1:] == ["tomesd, ratio 0.5", "tomesd, ratio 0.5, gated"]
    assert not any("tomesd" in way.name for way in chosen_ways(STEPS, [], has_unet=True))
    with pytest.raises(
        ConfigError, match=r"`only` must hold parts of names, got 'nobody'\. They are: stock, gate step 2"
    ):
        named(candidates, ["nobody"])


# The command


def test_quality_of_the_demo(tmp_path, capsys):
    picture = tmp_path / "q.png"
    arguments = ["quality", "--count", "2", "--steps", "6", "--seed", "5", "--only", "gate step", "look: 1", "tomesd"]
    assert main([*arguments, "--sampler", "ddim", "euler-a", "--json", "--plot", str(picture)]) == 0
    quality = json.loads(capsys.readouterr().out)
    assert list(quality["samplers"]) == ["ddim", "euler-a"]
    for report in quality["samplers"].values():
        rows = {row["name"]: row for row in report["rows"]}
        assert next(iter(rows)) == "stock"
        assert {f"gate step {step}" for step in range(1, 6)} | {"gate step auto"} <= rows.keys()
        assert all(row["error"] is None for row in rows.values())
        assert rows["gate step 1"]["arithmetic"] < rows["gate step 5"]["arithmetic"] < 1
        assert rows["gate step 1"]["psnr"]["mean"] < rows["gate step 5"]["psnr"]["mean"]
        assert {"shape", "colour", "size", "pattern", "accuracy"} <= rows["stock"]["scores"].keys()
        assert rows["gate step 2"]["to_papers"] is None
        assert rows["gate step 5"]["psnr_to_papers"]["mean"] > 0
        assert report["gate_step"] in range(1, 6)
    assert {row["name"] for row in quality["together"]} == rows.keys()
    assert picture.is_file()


def test_quality_of_ones_own_pipeline(tmp_path, capsys):
    """The demo's model saved as any pipeline is, with prompts of one's own."""
    folder, prompts = tmp_path / "model", tmp_path / "prompts.txt"
    load_demo_pipeline().save_pretrained(folder)
    prompts.write_text("a large red circle on a blue background\na small green cross on a white background\n")
    arguments = ["quality", "--model", str(folder), "--prompts", str(prompts), "--steps", "5", "--guidance", "5"]
    assert main([*arguments, "--only", "gate step", "guidance"]) == 0
    printed = capsys.readouterr().out
    assert (
        "pipeline StableDiffusionPipeline, scheduler DDIMScheduler, guidance_scale 5.0, steps 5, prompts 2" in printed
    )
    assert "sampler its own" in printed
    assert "likeness" in printed
    assert "gate step 2" in printed


def test_clip_scores_where_a_model_is_at_hand(tmp_path):
    """A tiny CLIP of random weights, from disk."""
    import transformers
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    # its name where torchvision is not at hand: early versions of transformers 5 know one alone
    image_processor = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    tokenizer = load_demo_pipeline().tokenizer
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 20,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 16})
    model = CLIPModel(config)
    size = {"shortest_edge": 32}
    processor = CLIPProcessor(image_processor(size=size, crop_size=32), tokenizer)
    pictures = torch.rand(4, 3, 48, 48, generator=seeded(0))
    prompts = ["a red circle", "a large blue square", "a small cross", "a green triangle"]
    model.visual_projection.weight.data.copy_(-model.text_projection.weight.data)  # so that some are positive
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    expected = []
    for picture, prompt in zip((pictures * 255).round().to(torch.uint8), prompts, strict=True):
        inputs = processor(text=[prompt], images=[picture], return_tensors="pt", padding=True)
        with torch.no_grad():
            output = model(**inputs)
        cosine = float(functional.cosine_similarity(output.image_embeds, output.text_embeds))
        expected.append(max(0.0, 100 * cosine))
    assert any(expected)
    assert likeness.ClipScore(str(tmp_path))(pictures, prompts).tolist() == pytest.approx(expected, abs=1e-3)


def test_a_clip_model_that_is_missing_is_said_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "tgate_processors.measure.quality.draw", lambda *args, **kwargs: pytest.fail("drawing has begun")
    )
    with pytest.raises(OSError, match=str(tmp_path)):
        quality_of_pipeline(load_demo_pipeline(), ["a small cross"], num_inference_steps=5, clip=str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a circle"], "`PROMPT` must be left out for an embedded model"),
        (["--count", "1"], "`--count` must be a whole number of at least 2, got 1"),
        (["--steps", "3"], "`--steps` must be a whole number of at least 5, got 3"),
        (["--steps", "6", "--only", "nobody"], "`--only` must hold parts of names, got 'nobody'"),
        (["--sampler", "ddim", "dpm"], "`--sampler` must be one of ddim, dpm++-2m-karras, "),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["quality", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_prompts_are_needed():
    with pytest.raises(ConfigError, match="`prompts` must be a list of at least one prompt"):
        quality_of_pipeline(tiny("sd").pipe, [], num_inference_steps=5)
