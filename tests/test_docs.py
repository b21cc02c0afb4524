"""What README and docs show is run: python on tiny pipelines, commands by their options, links, names of tests."""

import os
import re
import shlex
from importlib.metadata import metadata
from importlib.util import find_spec
from pathlib import Path

import hub
import pytest
from zoo import ENTRIES, seeded

from tgate_processors.cli.options import EPILOG, parser
from tgate_processors.presets import PRESETS


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page.name, language, block)
    for page in PAGES
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.S | re.M)
]
PYTHON = [(page, block) for page, language, block in BLOCKS if language == "python"]
SHELL = [(page, block) for page, language, block in BLOCKS if language == "sh"]


def test_every_block_is_of_a_kind_that_is_checked():
    assert {language for _, language, _ in BLOCKS} == {"python", "sh", "text", "diff", "bibtex"}
    assert len(PYTHON) >= 29
    assert len(SHELL) >= 20


@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_a_python_block_runs(page, block, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    hub.connect(monkeypatch)
    pipe = seeded(ENTRIES["StableDiffusionXLPipeline"].build)
    names = {"pipe": pipe, "unet": pipe.unet}
    if "scheduler.set_timesteps" in block:  # a loop of one's own, with a network that needs nothing but text
        names["pipe"] = seeded(ENTRIES["StableDiffusionPipeline"].build)
        embeds = ENTRIES["StableDiffusionPipeline"].call([0])
        names |= {f"{branch}_embeds": embeds["prompt_embeds"] for branch in ("negative", "positive")}
    exec(block, names)
    if {"image", "frames"} & names.keys():
        assert names["tgate"].summary().gate_closed_at is not None
    assert {"tgate", "gate"} & names.keys()


def commands():
    """Each line of the shell blocks, of commands in running text, and of the help."""
    blocks = [block for _, block in SHELL]
    inline = [
        command
        for page in PAGES
        for command in re.findall(r"`((?:tgate-processors|pip install)\s[^`]+)`", page.read_text())
    ]
    examples = [line.split("  ")[1] for line in EPILOG.splitlines() if line.startswith("  tgate-processors")]
    lines = "\n".join([*blocks, *inline, *examples]).replace("\\\n", " ").splitlines()
    return sorted({part.strip() for line in lines for part in line.split("&&")} - {""})


def test_commands_are_understood():
    extras = metadata("tgate-processors").get_all("Provides-Extra")
    for command in commands():
        words = shlex.split(command)
        if words[:2] == ["pip", "install"]:
            wanted = re.findall(r"\[(.*)\]", words[-1])
            assert set(",".join(wanted).split(",")) - {""} <= set(extras), command
        elif words[0] == "tgate-processors" and "COMMAND" not in words:
            parser().parse_args(words[1:])
        elif "-m" in words:
            module, *arguments = words[words.index("-m") + 1 :]
            assert find_spec(module), command
            if module == "tgate_processors" and "COMMAND" not in words:
                parser().parse_args(arguments)
        else:
            assert words[0] in ("pytest", "mkdocs", "tgate-processors") or is_script(words[0]), command


def is_script(word):
    return word.startswith(".ci/") and os.access(ROOT / word, os.X_OK)


def test_presets_are_listed():
    listed = (ROOT / "docs" / "choosing.md").read_text()
    for name, preset in PRESETS.items():
        assert f"| `{name}` | `{preset.config}` | {preset.source} |" in listed


def test_the_tests_that_the_pages_name_are_there():
    named = {name for page in PAGES for name in re.findall(r"(test_\w+\.py::test_\w+)", page.read_text())}
    assert len(named) >= 50
    for name in named:
        file, function = name.split("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
