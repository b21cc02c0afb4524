"""The python blocks of README and docs run, on tiny pipelines."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest
from tiny import tiny


ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [(page.name, block) for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]


def test_there_are_blocks():
    assert len(BLOCKS) == 5


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_a_block_runs(page, block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    subject = tiny("sdxl")
    stock_call = type(subject.pipe).__call__

    def call(pipe, prompt, **kwargs):
        """Tiny pipelines have no text encoder: embeddings stand in for the prompt."""
        return stock_call(pipe, **subject.kwargs(**kwargs))

    call.__signature__ = inspect.signature(stock_call)
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "__call__", call)
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "from_pretrained", lambda name: subject.pipe)
    monkeypatch.setattr(diffusers.StableDiffusionXLPipeline, "to", lambda pipe, device: pipe)
    names = {"pipe": subject.pipe, "unet": subject.pipe.unet}
    exec("from tgate_processors import TGateConfig\n" + block, names)
    assert {"tgate", "gate"} & names.keys()


def test_the_tests_that_the_pages_name_are_there():
    named = {name for page in PAGES for name in re.findall(r"(test_\w+\.py::test_\w+)", page.read_text())}
    assert len(named) >= 50
    for name in named:
        file, function = name.split("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
