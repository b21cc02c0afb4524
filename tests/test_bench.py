"""The benchmark: every contestant in turn, ratios of what belongs together, and who fails says so."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from tgate_processors import ConfigError, TGateConfig
from tgate_processors.cli import main
from tgate_processors.measure import contestants, ways
from tgate_processors.measure.architectures import Architecture, architecture, resized
from tgate_processors.measure.bench import Laps, _phases, bench, paired
from tgate_processors.measure.contestants import Contestant, by_way
from tgate_processors.measure.rig import Rig, reduced


SMALL = {"block_out_channels": [32, 32], "attention_head_dim": 4, "cross_attention_dim": 16, "layers_per_block": 1}
UNET = SMALL | {
    "sample_size": 8,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
XL = UNET | {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}
PIXART = {
    "sample_size": 8,
    "num_layers": 2,
    "caption_channels": 12,
    "cross_attention_dim": 16,
    "num_attention_heads": 4,
    "attention_head_dim": 4,
    "out_channels": 8,
}
TINY = {
    "sd": Architecture("UNet2DConditionModel", UNET, 64, 64, tokens=7, steps=4),
    "sdxl": Architecture("UNet2DConditionModel", XL, 64, 64, tokens=7, steps=4),
    "pixart": Architecture("PixArtTransformer2DModel", PIXART, 64, 64, tokens=7, steps=4),
}
NO_UNET = {"DeepCache, interval 3", "tgate_processors and DeepCache", "tomesd, ratio 0.5"}


def rig(name, **changes):
    return Rig(name=name, known=TINY[name], config=TGateConfig(gate_step=2), **changes)


@pytest.mark.parametrize("name", TINY)
def test_every_contestant_is_in_the_report(name):
    report = bench(rig(name), rounds=2)
    failed = {row.name for row in report.rows if row.error}
    cannot = NO_UNET if name == "pixart" else set()
    assert failed - {"tgate 1.0.0"} == cannot  # that package may be there or not
    line = f"Report({len(report.rows)} contestants, arithmetic {report.mac_speed_up:.3f}x less when gated)"
    assert repr(report) == line
    for row in report.rows:
        assert row.name in str(report)
        assert row.name in report._repr_html_()
        if row.error is None:
            assert row.run > 0
            are_not_alike = any(name in row.name for name in ("fewer", "DeepCache", "Pyramid"))
            assert (row.planning_step is None) == are_not_alike
            assert row.speed_up.least <= row.speed_up.median <= row.speed_up.most
    stock = report.rows[0]
    assert (stock.name, stock.speed_up.median) == ("stock", 1.0)
    assert json.loads(json.dumps(report.as_dict()))["settings"]["gate step"] == 2
    assert report.mac_speed_up > 1


def test_the_limit_and_the_gate_do_the_same_work():
    """The surgical limit's fidelity step computes what the gated one does: half a batch, no cross-attention."""
    from torch.utils.flop_counter import FlopCounterMode

    def flops(prepare):
        run = prepare(rig("sd"), False)
        counter, marks = FlopCounterMode(display=False), []
        with counter:
            run(lambda: marks.append(counter.get_total_flops()))
        return [after - before for before, after in zip([0, *marks], marks, strict=False)]

    gated = flops(by_way(ways.gated(rig("sd").config, "")))
    assert gated == flops(contestants.surgical_limit)
    dropped, stock = flops(by_way(ways.dropping_guidance(2))), flops(by_way(ways.stock()))
    assert dropped[:2] == stock[:2]
    assert dropped[2] * 2 == stock[2]
    assert dropped[2] > gated[2]


def test_contestants_share_weights_and_nothing_else():
    one = rig("sd")
    first, second = one.pipeline(), one.pipeline()
    assert first.unet.conv_in.weight is second.unet.conv_in.weight
    assert first.unet.conv_in is not second.unet.conv_in
    by_way(ways.gated(one.config, ""))(one, False)
    kwargs = one.call()
    assert torch.equal(first(**kwargs).images, second(**kwargs).images)


def test_watching_is_timed_where_there_are_steps_enough():
    known = replace(TINY["sd"], steps=6)
    watched = bench(Rig("sd", known, TGateConfig(gate_step=2)), rounds=1, only=["watching"]).rows[1]
    assert watched.planning_to_stock is not None
    assert watched.fidelity_step is None
    assert [c.name for c in contestants.contestants(rig("sd"), 2) if "watching" in c.name] == []


def test_a_contestant_that_fails_is_reported(monkeypatch):
    def fails(rig, compiles):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(
        "tgate_processors.measure.bench.contestants", lambda rig, steps: [one, Contestant("broken", fails)]
    )
    one = Contestant("stock", by_way(ways.stock()))
    report = bench(rig("sd"), rounds=1)
    assert report.rows[1].error == "RuntimeError: no kernel for this"
    assert "broken: RuntimeError: no kernel for this" in str(report)


def test_ratios_are_of_the_same_round():
    assert paired([2, 4, 9], [1, 2, 3]).median == 2
    assert paired([2, 4, 9], [1, 2, 3]).most == 3


def test_phases_are_least_steps_without_the_calls_beginning():
    laps = Laps(Contestant("x", by_way(ways.stock())), steps=[[50.0, 2.0, 1.0, 1.5]])
    assert _phases(laps, rig("sd")) == ([2.0], [1.0])


def test_compiled(monkeypatch):
    """Each contestant compiles its own denoiser; here without a compiler's backend."""
    compiled = []

    def compiles(module, fullgraph):
        compiled.append(module)
        torch.nn.Module.compile(module, backend="eager", fullgraph=fullgraph)

    monkeypatch.setattr(UNet2DConditionModel, "compile", compiles)
    report = bench(rig("sd"), rounds=1, compiles=True, only=["surgical"])
    assert [row.error for row in report.rows] == [None] * 2
    assert len(set(compiled)) == 3  # the limit has two


def test_reducing():
    assert reduced(architecture("sd-1.5"), 2).config["block_out_channels"] == [160, 320, 640, 640]
    assert reduced(architecture("sdxl"), 2).config["attention_head_dim"] == [5, 10, 20]
    assert reduced(architecture("sdxl"), 5).config["attention_head_dim"] == [1, 2, 4]
    pixart = reduced(architecture("pixart-alpha"), 2).config
    assert (pixart["num_attention_heads"], pixart["cross_attention_dim"]) == (8, 576)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reduced(architecture("sd-1.5"), 3), "`reduce` must leave the 320 channels"),
        (lambda: reduced(architecture("pixart-alpha"), 5), "`reduce` must divide the 16 heads"),
        (lambda: reduced(architecture("sd-1.5"), 0), "`reduce` must be a whole number of at least 1"),
        (lambda: bench(rig("sd"), rounds=0), "`rounds` must be a whole number of at least 1"),
        (lambda: bench(rig("sd"), only=["nobody"]), "`only` must hold parts of names, got 'nobody'. They are: stock,"),
        (lambda: rig("sd", batch=0), "`batch` must be a whole number of at least 1"),
        (
            lambda: Rig("sd", resized(TINY["sd"], steps=2, height=None, width=None), TGateConfig(gate_step=2)),
            "`gate_step` must be below the number of steps to time both phases, got 2 of 2",
        ),
        (
            lambda: Rig("lcm-sdxl", architecture("lcm-sdxl"), TGateConfig(gate_step=10)),  # without guidance
            "`gate_step` must be below the number of steps to time both phases, got 10 of 4",
        ),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_an_unknown_architecture_lists_the_known_ones(capsys):
    assert main(["bench", "--model", "sd-9"]) == 2
    assert "`--model` must be one of sd-1.5, sd-2.1, sdxl" in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    """A pipeline on disk, its configs alone; a picture."""
    from tgate_processors.demo.embedded import WEIGHTS

    picture = tmp_path / "bench.png"
    arguments = ["--model", str(WEIGHTS / "sd"), "--steps", "3", "--gate-step", "1", "--rounds", "1", "--json"]
    only = ["--only", "tgate_processors", "surgical"]
    assert main(["bench", *arguments, *only, "--plot", str(picture)]) == 0
    report = json.loads(capsys.readouterr().out)
    pairs = [f"tgate_processors and {name}" for name in ("DeepCache", "PyramidAttentionBroadcast")]
    names = ["stock", "tgate_processors", "surgical limit", *pairs]
    assert [row["name"] for row in report["rows"]] == names
    with Image.open(picture) as image:
        assert image.width > 1000
