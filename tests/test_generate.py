"""`generate`: a picture for each prompt, resumed, and the same from two processes as from one."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tgate_processors.cli import generate as generate_module
from tgate_processors.cli import main
from tgate_processors.cli.processes import Share, share_of_this_process
from tgate_processors.demo.model import WEIGHTS
from tgate_processors.measure.sheet import LEAST_COLUMN, MARGIN


PROMPTS = [
    "a large red circle left of a small blue square on a yellow background",
    "a small green triangle",
    "a large blue square above a small red circle",
]
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
        "1-a-small-green-triangle.png",
        "2-a-large-blue-square-above-a-small-red-circle.png",
    ]
    assert len(set(pixels(folder).values())) == 3


def test_a_second_run_makes_what_is_missing(folder, prompts, capsys, monkeypatch):
    before = pixels(folder)
    (folder / "1-a-small-green-triangle.png").unlink()
    drawn = []
    draw = generate_module._draw
    monkeypatch.setattr(generate_module, "_draw", lambda pipe, job, **k: drawn.append(job) or draw(pipe, job, **k))
    assert main(["generate", "--prompts", str(prompts), "--out", str(folder), *SETTINGS]) == 0
    assert [job.prompt for job in drawn] == [PROMPTS[1]]
    assert pixels(folder) == before
    assert f"3 pictures in {folder}" in capsys.readouterr().out


def test_an_interrupted_picture_is_not_there(folder, prompts, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module.Path, "replace", interrupted)
    assert main(["generate", PROMPTS[0], "--out", str(tmp_path), *SETTINGS]) == 130
    assert not list(tmp_path.glob("*.png"))


def test_other_settings_in_the_same_folder_are_refused(folder, prompts, capsys):
    arguments = ["generate", "--prompts", str(prompts), "--out", str(folder), *SETTINGS, "--seed", "5"]
    assert main(arguments) == 2
    assert "`--out` must hold no picture of other settings" in capsys.readouterr().err


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
    assert "process 1 of 2: 2 pictures" in done.stdout
    assert "process 2 of 2: 1 pictures" in done.stdout
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
        (["--prompts", "nowhere.txt"], "`--prompts` must be a text file .* got 'nowhere.txt': no file"),
        (["a circle", "--steps", "0"], "`steps` must be a whole number of at least 1, got 0"),
        (["a circle", "--gate-step", "0"], "`gate_step` must be a whole number of at least 1, a fraction"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    import re

    assert main(["generate", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


# Other people's models


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The demo's pipeline as a folder of one's own."""
    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(WEIGHTS, folder, dirs_exist_ok=True)
    return folder


def test_a_pipeline_of_ones_own(model, folder, tmp_path):
    arguments = ["generate", PROMPTS[1], "--seed", "1", "--model", str(model), "--out", str(tmp_path), *SETTINGS]
    assert main(arguments) == 0
    (picture,) = pixels(tmp_path).values()
    assert picture == pixels(folder)["1-a-small-green-triangle.png"]


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
    assert "trust_remote_code" in capsys.readouterr().err
    assert not ran.exists()
    assert main([*arguments, "--trust-remote-code"]) == 0
    assert ran.exists()
