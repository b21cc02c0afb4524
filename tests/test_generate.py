"""`generate`: a picture for each prompt, resumed, and the same from two processes as from one."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tgate_processors import ConfigError
from tgate_processors.cli import generate as generate_module
from tgate_processors.cli import main
from tgate_processors.cli.generate import read_prompts
from tgate_processors.cli.processes import Share, device_of_this_process, share_of_this_process
from tgate_processors.demo.embedded import WEIGHTS, load_demo_pipeline
from tgate_processors.measure.sheet import LEAST_COLUMN, MARGIN


PROMPTS = [
    "a large red circle left of a small blue square on a yellow background",
    "a small green triangle on a white background",
    "a large blue square above a small red circle on a cyan background",
]
CIRCLE, CIRCLE_NAME = "a large red circle on a white background", "0-a-large-red-circle-on-a-white-background"
SETTINGS = ["--steps", "3", "--gate-step", "2", "--guidance", "5"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def folder(prompts, tmp_path_factory):
    """The pictures of one process."""
    folder = tmp_path_factory.mktemp("pictures")
    assert main(["generate", "--prompts", str(prompts), "--out", str(folder), *SETTINGS]) == 0
    return folder


def pixels(folder):
    return {path.name: Image.open(path).tobytes() for path in folder.iterdir()}


def test_a_picture_for_each_prompt(folder):
    assert sorted(path.name for path in folder.iterdir()) == [
        "0-a-large-red-circle-left-of-a-small-blue-square-on-a-yellow-b.png",
        "1-a-small-green-triangle-on-a-white-background.png",
        "2-a-large-blue-square-above-a-small-red-circle-on-a-cyan-backg.png",
    ]
    assert len(set(pixels(folder).values())) == 3


def test_a_second_run_makes_what_is_missing(folder, prompts, capsys, monkeypatch):
    before = pixels(folder)
    (folder / "1-a-small-green-triangle-on-a-white-background.png").unlink()
    drawn, draw = [], generate_module._draw

    def noted(pipe, job, *args, **kwargs):
        drawn.append(job)
        return draw(pipe, job, *args, **kwargs)

    monkeypatch.setattr(generate_module, "_draw", noted)
    assert main(["generate", "--prompts", str(prompts), "--out", str(folder), *SETTINGS]) == 0
    assert [job.prompt for job in drawn] == [PROMPTS[1]]
    assert pixels(folder) == before
    assert f"process 1 of 1: 1 made, 2 already there, in {folder}" in capsys.readouterr().out


def test_an_interrupted_picture_is_not_there(folder, prompts, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module.Path, "replace", interrupted)
    assert main(["generate", PROMPTS[0], "--out", str(tmp_path), *SETTINGS]) == 130
    assert not list(tmp_path.glob("*.png"))


# What a folder holds already


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def copied(folder, tmp_path):
    """A folder of pictures to be changed."""
    return shutil.copytree(folder, tmp_path / "copied")


@pytest.fixture(scope="module")
def pipe():
    pipe = load_demo_pipeline().to(device_of_this_process())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def loaded_once(pipe, monkeypatch):
    """The same pipeline for all of these."""
    monkeypatch.setattr("tgate_processors.cli.commands.pipeline_of", lambda *_: pipe)


def refused(arguments, folder, capsys):
    """What is said of another job in a folder, which keeps all that it holds."""
    before = contents(folder)
    assert main(["generate", *arguments, "--out", str(folder)]) == 2
    assert contents(folder) == before
    said = capsys.readouterr().err.strip().splitlines()[-1]  # after bars
    assert said.startswith("tgate-processors generate: `--out` must hold no picture of other settings, got ")
    assert said.endswith("Remove it, or choose another folder.")
    return said


def test_all_that_made_a_picture_is_in_it(folder):
    with Image.open(next(folder.glob("1-*"))) as picture:
        settings = json.loads(picture.info["tgate-processors"])
    assert re.fullmatch("[0-9a-f]{64}", settings.pop("weights"))
    assert settings == {
        "prompt": PROMPTS[1],
        "seed": 1,
        "steps": 3,
        "guidance_scale": 5.0,
        "size": [64, 64],
        "versions": {name: metadata.version(name) for name in ("tgate-processors", "torch", "diffusers")},
        "gate_step": 2,
        "sp_interval": 1,
        "fi_interval": 1,
        "warm_up": 0,
        "branch": None,
        "look_interval": None,
        "guidance_start": 0,
        "tolerance": 0.09,
        "offload_cache": False,
        "with_stock": False,
        "model": "sd",
        "dtype": "float32",
        "device": device_of_this_process().type,
    }


def test_what_the_pipeline_takes_of_its_own_is_in_the_picture(model, tmp_path, monkeypatch):
    asked = []

    def draw(pipe, job, call_kwargs, *, gated):
        asked.append((job.steps, job.guidance_scale))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(generate_module, "_draw", draw)
    arguments = ["generate", CIRCLE, "--model", str(model), "--out", str(tmp_path)]
    assert main(arguments) == 0
    assert asked == [(50, 7.5)]  # of diffusers' Stable Diffusion
    assert main([*arguments, "--steps", "50", "--guidance", "7.5"]) == 0
    assert len(asked) == 1
    assert main(["generate", CIRCLE, "--out", str(tmp_path / "embedded")]) == 0
    assert asked[1:] == [(25, 5.0)]  # what suits the embedded one


@pytest.mark.parametrize(
    "other",
    [
        "--seed 5",
        "--steps 4",
        "--guidance-scale 3",
        "--gate-step 1",
        "--gate-step auto",
        "--look-interval 2",
        "--sp-interval 2",
        "--fi-interval 2",
        "--warm-up 1",
        "--with-stock",
        "--dtype float16",
        f"--model {WEIGHTS / 'sd'}",
    ],
)
def test_another_job_in_the_same_folder_is_refused(other, folder, prompts, loaded_once, capsys):
    arguments = ["--prompts", str(prompts), "--steps", "3", "--gate-step", "2", "--guidance-scale", "5"]
    said = refused([*arguments, *other.split()], folder, capsys)
    assert f"got '{next(folder.glob('0-*'))}' of another `{other.split()[0]}`. " in said


@pytest.mark.parametrize(
    ("edited", "name", "reason"),
    [
        (
            ["a large red square on a white background", *PROMPTS[1:]],
            "0-a-large-red",
            "of another prompt, or of a prompt in another place",
        ),
        ([*PROMPTS[1:], PROMPTS[0]], "0-a-large-red", "of another prompt, or of a prompt in another place"),
        (PROMPTS[:2], "2-a-large-blue", "of another prompt, or of a prompt in another place"),
        ([PROMPTS[0], PROMPTS[1].upper(), PROMPTS[2]], "1-a-small-green", "of another `PROMPT`"),
    ],
)
def test_edited_prompts_are_refused(edited, name, reason, folder, loaded_once, capsys):
    said = refused([*edited, *SETTINGS], folder, capsys)
    assert f"got '{next(folder.glob(f'{name}*'))}' {reason}. " in said


def test_more_prompts_are_drawn_beside_those_that_are_there(copied, loaded_once):
    before = contents(copied)
    assert main(["generate", *PROMPTS, CIRCLE, "--out", str(copied), *SETTINGS]) == 0
    after = contents(copied)
    assert after.keys() - before.keys() == {"3-a-large-red-circle-on-a-white-background.png"}
    assert {name: after[name] for name in before} == before


def test_somebody_elses_picture_is_left_alone(copied, prompts, loaded_once, capsys):
    (copied / "holiday.png").write_bytes(picture_without_settings())
    assert main(["generate", "--prompts", str(prompts), "--out", str(copied), *SETTINGS]) == 0
    path = copied / "1-a-small-green-triangle-on-a-white-background.png"
    path.write_bytes(picture_without_settings())
    said = refused(["--prompts", str(prompts), *SETTINGS], copied, capsys)
    assert f"got '{path}' without settings" in said
    path.write_bytes(picture_without_settings()[:60])  # some of its pixels are there
    refused(["--prompts", str(prompts), *SETTINGS], copied, capsys)
    path.write_text("not a picture at all")
    refused(["--prompts", str(prompts), *SETTINGS], copied, capsys)


def picture_without_settings():
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("written", ["[1]", "{", "1", '"x"', "", "[" * 10**5])
def test_settings_that_are_none_are_other_settings(written, copied, prompts, loaded_once, capsys):
    path = next(copied.glob("0-*"))
    info = generate_module.PngInfo()
    info.add_text("tgate-processors", written)
    Image.new("RGB", (64, 64)).save(path, pnginfo=info)
    assert "of another `--gate-step`, " in refused(["--prompts", str(prompts), *SETTINGS], copied, capsys)


@pytest.mark.parametrize("left", [0, 3, 8, 30, 60, 700, 0.5, -1])
def test_a_cut_off_picture_is_drawn_again(left, copied, loaded_once):
    path = copied / "1-a-small-green-triangle-on-a-white-background.png"
    before = contents(copied)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    assert main(["generate", *PROMPTS, "--out", str(copied), *SETTINGS]) == 0
    assert contents(copied) == before


def test_a_damaged_picture_is_drawn_again(copied, loaded_once):
    path = copied / "1-a-small-green-triangle-on-a-white-background.png"
    before = contents(copied)
    damaged = bytearray(path.read_bytes())
    damaged[-40] ^= 1
    path.write_bytes(damaged)
    assert main(["generate", *PROMPTS, "--out", str(copied), *SETTINGS]) == 0
    assert contents(copied) == before


def test_no_cut_is_taken_for_the_whole_picture(folder):
    whole = next(folder.glob("1-*")).read_bytes()

    def kinds(data):
        return [kind for kind, _ in generate_module._chunks(io.BytesIO(data))]

    assert kinds(whole) == [b"IHDR", b"tEXt", b"IDAT", b"IEND"]
    assert not any(b"IEND" in kinds(whole[:length]) for length in range(len(whole)))


def test_a_planted_link_is_not_followed(tmp_path, loaded_once):
    folder, victim = tmp_path / "pictures", tmp_path / "victim"
    folder.mkdir()
    victim.write_text("precious")
    (folder / f"{CIRCLE_NAME}.unfinished").symlink_to(victim)
    assert main(["generate", CIRCLE, "--out", str(folder), *SETTINGS]) == 0
    assert victim.read_text() == "precious"
    (made,) = folder.iterdir()
    assert made.name == f"{CIRCLE_NAME}.png"
    assert not made.is_symlink()


def test_a_link_that_is_planted_anew_is_an_error(tmp_path, loaded_once, monkeypatch, capsys):
    folder, victim = tmp_path / "pictures", tmp_path / "victim"
    victim.write_text("precious")
    unlink = generate_module.Path.unlink

    def plants(path, **kwargs):
        unlink(path, **kwargs)
        path.symlink_to(victim)

    monkeypatch.setattr(generate_module.Path, "unlink", plants)
    assert main(["generate", CIRCLE, "--out", str(folder), *SETTINGS]) == 1
    assert f"got '{folder / CIRCLE_NAME}.png': File exists." in capsys.readouterr().err
    assert victim.read_text() == "precious"


def test_a_full_disk_names_the_picture(tmp_path, loaded_once, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["generate", CIRCLE, "--out", str(tmp_path), *SETTINGS]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    path = str(tmp_path / f"{CIRCLE_NAME}.png")
    assert f"`--out` must be a place that can be written to, got {path!r}: No space left on device." in said


# Prompts in a file


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (b"\xef\xbb\xbfa circle\na cross\n", ["a circle", "a cross"]),
        (b"a circle\r\n\r\n  a cross  \r\n", ["a circle", "a cross"]),
        ("a\u2028circle\na\x85cro\x0css\x1d!\u2029".encode(), ["a\u2028circle", "a\x85cro\x0css\x1d!"]),
        ("ein gr\xfcner Kreis".encode(), ["ein gr\xfcner Kreis"]),
    ],
)
def test_prompts_are_the_lines_of_a_file(written, expected, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(written)
    assert read_prompts(tmp_path / "prompts.txt") == expected


@pytest.mark.parametrize("written", [b"\xff\xfea\x00", b"a gr\xfcn circle", b"", b"\xef\xbb\xbf", b" \n\t\r\n"])
def test_a_file_without_prompts_is_named(written, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(written)
    with pytest.raises(ConfigError, match=f"`--prompts` must be a text file in UTF-8 .*, got '{path}': ") as error:
        read_prompts(path)
    assert "\n" not in str(error.value)


def test_with_the_stock_picture_beside_it(folder, tmp_path):
    arguments = ["generate", PROMPTS[0], "--out", str(tmp_path), *SETTINGS, "--with-stock"]
    assert main(arguments) == 0
    (path,) = tmp_path.iterdir()
    alone = Image.open(next(folder.glob("0-*")))
    pair = Image.open(path)
    assert pair.info["tgate-processors"]
    left, right = MARGIN, 2 * MARGIN + LEAST_COLUMN
    tops = range(pair.height - alone.height)
    at = [top for top in tops if pair.crop((right, top, right + 64, top + 64)).tobytes() == alone.tobytes()]
    assert len(at) == 1
    assert pair.crop((left, at[0], left + 64, at[0] + 64)).tobytes() != alone.tobytes()


def test_two_processes_make_the_pictures_of_one(folder, prompts, tmp_path):
    # `--multi_gpu` starts one process a device, here on the CPU; accelerate's own way to several on it is MPI
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    arguments = ["generate", "--prompts", str(prompts), "--out", str(tmp_path), *SETTINGS]
    command = [*launch, "-m", "tgate_processors", *arguments]
    no_gpu = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=no_gpu)
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2: 2 made, 0 already there" in done.stdout
    assert "process 2 of 2: 1 made, 0 already there" in done.stdout
    assert "%|" not in done.stderr  # no bar where nobody watches, of loading neither
    assert pixels(tmp_path) == pixels(folder)


def test_without_accelerate_there_is_one_process(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert share_of_this_process() == Share(index=0, count=1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ImportError, match=r"`accelerate` must be installed .*'tgate-processors\[accelerate\]"):
        share_of_this_process()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`PROMPT` must be given, or `--prompts FILE`, got neither"),
        (
            ["--prompts", "nowhere.txt"],
            "`--prompts` must be a text file .* got 'nowhere.txt': No such file or directory",
        ),
        (["--prompts", "/"], "`--prompts` must be a text file .* got '/': Is a directory. Pass one that can be read"),
        (["a red fox"], "`PROMPT` must use this world's words only, got the unknown 'fox' in 'a red fox'; the words"),
        ([CIRCLE, "a circle", "--model", "pixart"], "`PROMPT` must be a caption of this world, got 'a circle'; write"),
        ([CIRCLE, "--steps", "0"], "`--steps` must be a whole number of at least 1, got 0"),
        ([CIRCLE, "--gate-step", "0"], "`--gate-step` must be a whole number of at least 1, a fraction"),
        ([CIRCLE, "--seed", str(2**64)], f"`--seed` must be a whole number of 64 bits, got {2**64}"),
        ([CIRCLE, "--out", __file__], f"`--out` must be a place .*, got '{__file__}': Not a directory"),
        ([CIRCLE, "--out", f"{__file__}/x/y"], f"`--out` must be a place .*, got '{__file__}/x/y': Not a dir"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert main(["generate", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


# Other people's models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's pipeline as a folder of one's own."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(WEIGHTS / "sd", folder, dirs_exist_ok=True)
    return folder


def test_a_pipeline_of_ones_own(model, folder, tmp_path):
    arguments = ["generate", PROMPTS[1], "--seed", "1", "--model", str(model), "--out", str(tmp_path), *SETTINGS]
    assert main(arguments) == 0
    (picture,) = pixels(tmp_path).values()
    assert picture == pixels(folder)["1-a-small-green-triangle-on-a-white-background.png"]


def test_other_weights_or_another_scheduler_in_the_same_folder_are_another_model(model, tmp_path, capsys):
    mine = shutil.copytree(model, tmp_path / "mine")
    arguments = [PROMPTS[1], "--model", str(mine), *SETTINGS]
    out = tmp_path / "out"
    assert main(["generate", *arguments, "--out", str(out)]) == 0
    before = contents(out)
    assert main(["generate", *arguments, "--out", str(out)]) == 0  # loaded again it is the same
    assert contents(out) == before
    weights = mine / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"][0] += 1
    save_file(tensors, weights, {"format": "pt"})
    assert "of another `weights`. " in refused(arguments, out, capsys)
    shutil.copytree(model / "unet", mine / "unet", dirs_exist_ok=True)
    config = mine / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"beta_end": 0.02}))
    assert "of another `weights`. " in refused(arguments, out, capsys)


def test_pickled_weights_are_not_loaded(model, tmp_path, capsys):
    unsafe = tmp_path / "unsafe"
    shutil.copytree(model, unsafe)
    weights = unsafe / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    assert main(["generate", PROMPTS[1], "--model", str(unsafe), "--out", str(tmp_path / "out"), *SETTINGS]) == 1
    assert "safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_code_that_comes_with_a_model_is_not_run_unless_it_is_asked_for(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    custom = tmp_path / "custom"
    shutil.copytree(model, custom)
    ran = tmp_path / "it ran"
    index = json.loads((custom / "model_index.json").read_text())
    (custom / "model_index.json").write_text(json.dumps(index | {"_class_name": ["pipeline", "Theirs"]}))
    (custom / "pipeline.py").write_text(
        f"from diffusers import StableDiffusionPipeline\nopen({str(ran)!r}, 'w').close()\n"
        "class Theirs(StableDiffusionPipeline):\n    pass\n"
    )
    arguments = ["generate", PROMPTS[1], "--model", str(custom), "--out", str(tmp_path / "out"), *SETTINGS]
    assert main(arguments) != 0
    assert "`--trust-remote-code`" in capsys.readouterr().err
    assert not ran.exists()
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert ran.exists()


@pytest.mark.parametrize("name", ["lcm", "pixart", "pixart-lcm"])
def test_every_embedded_model_draws(name, tmp_path):
    assert (
        main(["generate", PROMPTS[1], "--model", name, "--steps", "2", "--gate-step", "1", "--out", str(tmp_path)])
        == 0
    )
    with Image.open(tmp_path / "0-a-small-green-triangle-on-a-white-background.png") as picture:
        assert picture.size == (64, 64)
