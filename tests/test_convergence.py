"""Measuring convergence: what is measured, what it suggests, and that a run decides as it says."""

import json
import tempfile
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from safetensors.torch import save_file
from tiny import fingerprint, left_behind, seeded, tiny
from torch.nn import functional

from tgate_processors import ConfigError, StateError, TGateConfig, apply_tgate
from tgate_processors._layers import cross_attention_layers
from tgate_processors.cli import main
from tgate_processors.demo import convergence as side_by_side
from tgate_processors.demo.embedded import EMBEDDED, load_demo_pipeline
from tgate_processors.measure.convergence import Convergence, measure_convergence, plot_convergence


PROMPTS = [
    "a large red circle left of a small blue square on a yellow background",
    "a small striped green cross on a white background",
]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def measured(pipe):
    return measure_convergence(pipe, PROMPTS, num_inference_steps=10, seed=3, guidance_scale=5.0)


def record(changes, steps=None):
    """Of one prompt and one layer."""
    tensor = torch.tensor(changes).view(1, -1, 1)
    return Convergence(tensor, ("attn2",), {"pipeline": "P", "scheduler": "S", "prompts": ["x"]})


def test_it_is_the_change_of_each_layers_output(pipe, measured):
    """Against the outputs that forward hooks see in the stock pipeline."""
    outputs = []
    layers = cross_attention_layers(pipe.unet)
    hooks = [pipe.unet.register_forward_pre_hook(lambda *_: outputs.append({}))]
    hooks += [
        layer.register_forward_hook(lambda *args, name=name: outputs[-1].update({name: args[-1]}))
        for name, layer in layers.items()
    ]
    pipe(PROMPTS[1], generator=seeded(4), num_inference_steps=10, guidance_scale=5.0, output_type="latent")
    for hook in hooks:
        hook.remove()
    assert measured.layers == tuple(layers)
    assert measured.changes.shape == (2, 9, 7)
    for step in range(9):
        for layer, name in enumerate(layers):
            before, now = outputs[step][name].flatten(1), outputs[step + 1][name].flatten(1)
            change = ((now - before).norm(dim=1) / before.norm(dim=1)).max() * 10 / 25
            assert measured.changes[1, step, layer] == pytest.approx(float(change), rel=1e-4)


def test_nothing_is_left_behind(pipe):
    before = fingerprint(pipe.unet)
    measure_convergence(pipe, PROMPTS[:1], num_inference_steps=5)
    assert left_behind(before, pipe.unet) == {}


def test_a_run_decides_as_the_record_says(pipe, measured):
    for tolerance in (0.05, 0.1, 0.2):
        for index, gate_step in enumerate(measured.gate_steps(tolerance)):
            with apply_tgate(pipe, TGateConfig(gate_step="auto", tolerance=tolerance)) as tgate:
                pipe(
                    PROMPTS[index],
                    generator=seeded(3 + index),
                    num_inference_steps=10,
                    guidance_scale=5.0,
                    callback_on_step_end=tgate,
                )
                assert (tgate.summary().gate_closed_at or 10) == gate_step
    assert len({measured.gate_step(tolerance) for tolerance in (0.05, 0.1, 0.2)}) > 1


def test_runs_of_20_and_50_steps_agree_after_scaling(pipe):
    """The change in a twenty-fifth of the run, at the same part of the run."""
    short, long = (
        measure_convergence(pipe, PROMPTS, num_inference_steps=steps, guidance_scale=5.0) for steps in (20, 50)
    )
    # a step of the short run covers two and a half of the long one
    pooled = functional.interpolate(long.median()[None, None], size=19, mode="area")[0, 0]
    assert float(torch.corrcoef(torch.stack([short.median(), pooled]))[0, 1]) > 0.8
    assert float(pooled.mean() / short.median().mean()) == pytest.approx(1, abs=0.2)
    assert abs(short.gate_step() / 20 - long.gate_step() / 50) < 0.15


def test_the_gate_step_by_hand():
    falling = record([0.5, 0.3, 0.2, 0.09, 0.08, 0.07, 0.06, 0.05, 0.04])  # of steps 1 to 9
    assert falling.gate_step(0.1) == 7  # steps 4 and 5 stay under it, step 6 stores
    assert falling.gate_step(0.6) == 4
    assert falling.gate_step(0.01) == 10  # never
    assert record([0.05, 0.5, 0.05, 0.05, 0.5, 0.05]).gate_step(0.1) == 6


def test_it_is_saved_with_its_settings(measured, tmp_path):
    path = tmp_path / "convergence.safetensors"
    measured.save(path)
    loaded = Convergence.load(path)
    assert torch.equal(loaded.changes, measured.changes)
    assert (loaded.layers, loaded.settings) == (measured.layers, measured.settings)
    assert loaded.settings["prompts"] == PROMPTS
    assert loaded.settings["guidance_scale"] == 5.0
    assert loaded.num_inference_steps == 10


def test_it_is_pictured(measured, tmp_path):
    plot_convergence(measured, tmp_path / "plot.png", tolerance=0.1)
    with Image.open(tmp_path / "plot.png") as picture:
        assert min(picture.size) > 800
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 100


def test_calibrate(tmp_path, capsys):
    out, picture = tmp_path / "c.safetensors", tmp_path / "c.png"
    arguments = ["calibrate", "--count", "2", "--steps", "10", "--tolerance", "0.2", "--plot", str(picture)]
    assert main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    convergence = Convergence.load(out)
    gate_step = convergence.gate_step(0.2)
    assert gate_step < 10
    assert f"gate step {gate_step} of 10: the median of 2 prompts (" in printed
    assert f"TGateConfig(gate_step={gate_step})" in printed
    assert picture.is_file()
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["gate_step"] == gate_step
    with apply_tgate(load_demo_pipeline(), TGateConfig(gate_step=gate_step)) as tgate:
        tgate.pipe(convergence.settings["prompts"][0], num_inference_steps=10, callback_on_step_end=tgate)
        assert said["macs_saved"] == pytest.approx(tgate.summary().macs_saved)


def test_calibrate_says_where_nothing_converges(capsys):
    assert main(["calibrate", PROMPTS[0], "--steps", "5", "--tolerance", "0.001"]) == 0
    assert "does not stay under 0.001" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tolerance", "1"], "`--tolerance` must be a number between 0 and 1, got 1.0"),
        (["--steps", "4"], "`--steps` must be a whole number of at least 5, got 4"),
        (["--count", "0"], "`--count` must be a whole number of at least 1, got 0"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["calibrate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_measured():
    subject = tiny("sd")
    with pytest.raises(ConfigError, match="`prompts` must be a list of at least one prompt, got 'a cat'"):
        measure_convergence(subject.pipe, "a cat", num_inference_steps=6)
    with pytest.raises(ConfigError, match="`prompts` must be a list of at least one prompt, got \\[\\]"):
        measure_convergence(subject.pipe, [], num_inference_steps=6)
    with apply_tgate(subject.pipe, TGateConfig(gate_step=2)), pytest.raises(StateError, match="not be gated already"):
        measure_convergence(subject.pipe, ["a cat"], num_inference_steps=6)
    for name in list(subject.denoiser.attn_processors):
        layer = subject.denoiser.get_submodule(name.removesuffix(".processor"))
        layer.is_cross_attention = False
    with pytest.raises(ConfigError, match="it has no cross-attention of its own that a run could watch"):
        measure_convergence(subject.pipe, ["a cat"], num_inference_steps=6)


# Files


SAVED = Convergence(
    torch.tensor([[[0.5, 0.25], [0.0, 0.125]]]),
    ("attn2", "mid.attn2"),
    {"pipeline": "P", "scheduler": "S", "num_inference_steps": 3, "seed": 0, "prompts": ["x"]},
)


def refused(path):
    """What is said of a file that `save` did not write."""
    with pytest.raises(ConfigError, match=f"`path` must be a file that `save` wrote, got {str(path)!r}") as error:
        Convergence.load(path)
    return str(error.value)


def test_no_file(tmp_path):
    assert "no file. Pass a file." in refused(tmp_path / "none")
    assert "no file. Pass a file." in refused(tmp_path)


def test_a_file_that_cannot_be_written_is_the_systems_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SAVED.save(tmp_path / "nowhere" / "x")


def test_a_cut_off_file(tmp_path):
    path = tmp_path / "x"
    SAVED.save(path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path)
    path.write_bytes(whole + b"more")
    refused(path)


@given(st.binary(max_size=99))
def test_arbitrary_bytes(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        for written in (data, len(data).to_bytes(8, "little") + data):
            path.write_bytes(written)
            refused(path)


RIGHT = {"layers": json.dumps(SAVED.layers), "settings": json.dumps(SAVED.settings)}


def read(path):
    """What is loaded, of which all can be read that others read; None where it is refused."""
    try:
        loaded = Convergence.load(path)
    except ConfigError:
        return None
    settings = loaded.settings
    assert loaded.changes.shape == (len(settings["prompts"]), loaded.num_inference_steps - 1, len(loaded.layers))
    assert len(loaded.gate_steps(0.1)) == len(settings["prompts"])
    assert all(isinstance(name, str) for name in (*loaded.layers, *settings["prompts"]))
    assert isinstance(settings["pipeline"] + settings["scheduler"], str)
    assert settings["num_inference_steps"] >= 1
    return loaded


def write_header(path, header, data=b""):
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + data)


SIZES = st.lists(st.sampled_from([0, 1, 2, 2**31, 2**63, 2**64 - 1, 2**64, -1, 0.5]), max_size=4)
TENSOR = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F64", "F32", "F16", "F8_E5M2", "F6_E2M3", "F4", "U64", "BOOL", "C64", "X"]),
        "shape": SIZES | st.sampled_from([[1, 1, 2], [1, 2, 1], [2, 1, 1], [0, 2**63], [6]]),
        "data_offsets": st.sampled_from([[0, 0], [0, 8], [0, 4], [0, 2], [0, 1], [8, 0], [0, 99], None]),
    }
)


@given(TENSOR, st.binary(min_size=8, max_size=8))
@example({"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]}, b"")
@example({"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}, b"123")
@example({"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}, b"1")
def test_arbitrary_tensors(tensor, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        ends = tensor["data_offsets"] or [0, 0]
        write_header(path, {"changes": tensor, "__metadata__": RIGHT}, data[: ends[1]])
        assert read(path) is None or (tensor["dtype"], tensor["shape"]) == ("F32", [1, 1, 2])


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
CHANGED = st.dictionaries(st.sampled_from(list(SAVED.settings)), VALUES)
METADATA = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "layers": st.just(RIGHT["layers"]) | VALUES.map(json.dumps) | st.text(max_size=9),
        "settings": CHANGED.map(lambda changed: json.dumps(SAVED.settings | changed))
        | VALUES.map(json.dumps)
        | st.text(max_size=9),
        "more": st.text(max_size=3),
    },
)


@given(METADATA)
def test_arbitrary_metadata(metadata):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        save_file({"changes": SAVED.changes}, path, metadata)
        read(path)


def changed(**settings):
    return RIGHT | {"settings": json.dumps(SAVED.settings | settings)}


def without(name):
    return RIGHT | {"settings": json.dumps({key: value for key, value in SAVED.settings.items() if key != name})}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        (None, "'layers'"),
        ({"layers": RIGHT["layers"]}, "'settings'"),
        (RIGHT | {"layers": "attn2"}, "JSONDecodeError"),
        (RIGHT | {"layers": "[" * 10**5}, "RecursionError"),
        (RIGHT | {"layers": "[]"}, "no names of 2 layers"),
        (RIGHT | {"layers": '["attn2"]'}, "no names of 2 layers"),
        (RIGHT | {"layers": '"ab"'}, "no names of 2 layers"),
        (RIGHT | {"layers": "[1, 2]"}, "no names of 2 layers"),
        (RIGHT | {"layers": "2"}, "no names of 2 layers"),
        (RIGHT | {"settings": "["}, "JSONDecodeError"),
        (RIGHT | {"settings": "[]"}, "settings that are no object"),
        (RIGHT | {"settings": "null"}, "settings that are no object"),
        (without("pipeline"), "settings without pipeline and scheduler"),
        (changed(scheduler=1), "settings without pipeline and scheduler"),
        (without("num_inference_steps"), "num_inference_steps None"),
        (changed(num_inference_steps=0), "num_inference_steps 0"),
        (changed(num_inference_steps=3.0), "num_inference_steps 3.0"),
        (changed(num_inference_steps=True), "num_inference_steps True"),
        (without("prompts"), "no 1 prompts"),
        (changed(prompts="x"), "no 1 prompts"),
        (changed(prompts=[]), "no 1 prompts"),
        (changed(prompts=["x", "y"]), "no 1 prompts"),
        (changed(prompts=[1]), "no 1 prompts"),
    ],
)
def test_metadata_of_something_else(metadata, said, tmp_path):
    save_file({"changes": SAVED.changes}, tmp_path / "x", metadata)
    assert said in refused(tmp_path / "x")


READS_NO_TENSORS = pytest.mark.skipif(
    Version(safetensors.__version__) < Version("0.5"), reason="an older safetensors cannot read a file without tensors"
)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        pytest.param({}, "changes", marks=READS_NO_TENSORS),
        ({"x": SAVED.changes}, "changes"),
        *(({"changes": SAVED.changes.to(dtype)}, str(dtype)) for dtype in (torch.float16, torch.bool, torch.int64)),
        ({"changes": SAVED.changes.to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn"),
        ({"changes": SAVED.changes[0].clone()}, "shape (2, 2)"),
        ({"changes": torch.tensor(1.0)}, "shape ()"),
        ({"changes": SAVED.changes[None]}, "shape (1, 1, 2, 2)"),
        ({"changes": torch.zeros(0, 2, 2)}, "shape (0, 2, 2)"),
        ({"changes": torch.zeros(1, 0, 2)}, "shape (1, 0, 2)"),
        ({"changes": torch.zeros(1, 2, 0)}, "shape (1, 2, 0)"),
        ({"changes": torch.zeros(1, 2, 3)}, "no names of 3 layers"),
        ({"changes": torch.zeros(2, 2, 2)}, "no 2 prompts"),
        *(
            ({"changes": torch.tensor([[[0.5, 0.5], [0.5, value]]])}, "negative or not finite")
            for value in (float("nan"), float("inf"), -float("inf"), -0.125)
        ),
    ],
)
def test_a_tensor_of_something_else(tensors, said, tmp_path):
    save_file(tensors, tmp_path / "x", RIGHT)
    assert said in refused(tmp_path / "x")


def test_the_embedded_models_side_by_side(tmp_path, capsys):
    picture = tmp_path / "convergence.png"
    side_by_side.main(["--count", "2", "--out", str(picture)])
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line in EMBEDDED] == list(EMBEDDED)
    assert printed.count("change of cross-attention since the step before") == len(EMBEDDED)
    with Image.open(picture) as image:
        assert image.width > 1000
