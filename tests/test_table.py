"""The benchmark table: rows counted at full size, timed at reduced size, drawn on the embedded model of their kind."""

import json

import pytest
import torch
from PIL import Image

from tgate_processors import MissingPackageError, TGateConfig
from tgate_processors.cli import main
from tgate_processors.demo import table
from tgate_processors.demo.embedded import EMBEDDED
from tgate_processors.demo.table import KINDS, measure_table
from tgate_processors.measure import published
from tgate_processors.measure.architectures import Architecture
from tgate_processors.measure.published import PUBLISHED, PublishedRow, base_of, count_row


BY_NAME = {row.name: row for row in PUBLISHED if row.name != "LCM w/ TGATE"}  # two have this name


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.name)
def test_a_row_at_full_size(row):
    counted = count_row(row)
    difference = counted.tmacs / row.tmacs - 1
    if row.cache_interval is None:
        assert abs(difference) < 0.0005
    else:
        # Published for DeepCache's own pipeline; the helper's shallow steps do less.
        assert -0.13 < difference < -0.04
    assert counted.tmacs_with_attention > counted.tmacs
    if row.parameters is not None:
        assert counted.parameters == pytest.approx(row.parameters, rel=2e-3)  # SDXL's are published in whole 10 M


def test_what_each_row_is_compared_with():
    assert base_of(BY_NAME["SD-XL w/ TGATE, second version"]).name == "SD-XL"
    assert base_of(BY_NAME["SD-XL"]).name == "SD-XL"
    assert base_of(BY_NAME["DeepCache (SD-XL)"]).name == "SD-XL"
    assert base_of(BY_NAME["DeepCache w/ TGATE"]).name == "DeepCache (SD-XL)"
    assert [base_of(row).name for row in PUBLISHED if row.name == "LCM w/ TGATE"] == [
        "LCM (SD-XL)",
        "LCM (Pixart-Alpha)",
    ]


def test_every_kind_of_the_table_is_embedded():
    assert {row.model for row in PUBLISHED} == set(KINDS)
    assert set(KINDS.values()) == set(EMBEDDED)


UNET = {
    "sample_size": 8,
    "block_out_channels": [160, 160],
    "attention_head_dim": 5,
    "cross_attention_dim": 16,
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
FEW = (
    PublishedRow("stock", "sd-1.5", 2, 1, 8, 20),
    PublishedRow("gated", "sd-1.5", 1, 1, 4, 21, TGateConfig(gate_step=1)),
    PublishedRow("cached", "sd-1.5", 1, None, 2, 22, None, 3),
)


@pytest.fixture
def few(monkeypatch):
    """Three rows of a tiny architecture, in three steps."""
    known = Architecture("UNet2DConditionModel", UNET, 64, 64, tokens=7, steps=3)
    for module in (table, published):
        monkeypatch.setattr(module, "PUBLISHED", FEW)
        monkeypatch.setattr(module, "architecture", lambda name: known)
    monkeypatch.setattr(table, "PIXELS", 64)


def test_the_command(few, tmp_path, capsys):
    arguments = ["table", "--count", "2", "--rounds", "2"]
    assert main([*arguments, "--json"]) == 0
    stock, gated, cached = json.loads(capsys.readouterr().out)["rows"]
    assert stock["speed_up"] == {"median": 1, "least": 1, "most": 1}
    assert gated["published"]["speed_up"] == 2
    assert gated["speed_up"]["least"] <= gated["speed_up"]["median"] <= gated["speed_up"]["most"]
    assert stock["pictures"]["to_base"] is stock["pictures"]["psnr"] is None
    assert gated["pictures"]["psnr"]["low"] < gated["pictures"]["psnr"]["mean"] < 60
    assert -1 <= cached["pictures"]["to_base"]["mean"] <= 1
    assert gated["counted"]["tmacs"] < stock["counted"]["tmacs"]
    picture = tmp_path / "table.png"
    assert main([*arguments, "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    for name in ("stock", "gated", "cached"):
        assert sum(line.startswith(f"{name}  ") for line in printed.splitlines()) == 2  # at full size, and measured
    with Image.open(picture) as image:
        assert image.width > 1000


def test_a_row_that_fails_says_why(few, monkeypatch, capsys):
    def missing(*_):
        raise MissingPackageError("`DeepCache` must be installed.")

    monkeypatch.setattr("tgate_processors._deepcache.make_helper", missing)
    monkeypatch.setattr(table, "count_row", lambda row: published.Counted(1, 1, 1))
    measured = measure_table(count=2, seed=0, rounds=1, device="cpu", dtype=torch.float32)
    stock, gated, cached = measured.rows
    assert (stock.error, gated.error, cached.error) == (None, None, "`DeepCache` must be installed.")
    assert cached.speed_up is cached.pictures is None
    assert gated.speed_up is not None
    assert "cached: `DeepCache` must be installed." in str(measured)
    assert repr(measured) == "Table(3 rows)"
    assert measured._repr_html_().count("<table>") == 2


@pytest.mark.parametrize(("option", "least"), [("--count", 2), ("--rounds", 1)])
def test_bad_arguments(option, least, capsys):
    assert main(["table", option, "0"]) == 2
    assert f"`{option}` must be a whole number of at least {least}, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["scipy", "torchmetrics.functional"])
def test_a_missing_package_is_told_before_the_work(package, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setattr(table, "count_row", None)
    assert main(["table"]) == 1
    assert "`pip install 'tgate-processors[quality]'`" in capsys.readouterr().err
