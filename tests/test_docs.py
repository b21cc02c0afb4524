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
    assert len(BLOCKS) == 3


@pytest.mark.parametrize(("page", "block"), BLOCKS)
def test_a_block_runs(page, block, monkeypatch):
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
