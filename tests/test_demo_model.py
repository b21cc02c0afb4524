"""The demo's tokenizer, and the weights folder once it is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from at_hand import HAS_TRANSFORMERS_5
from safetensors.torch import load_file

from tgate_processors import ConfigError, MissingPackageError
from tgate_processors._pipelines import denoisers_of
from tgate_processors.demo import evaluate, pixart
from tgate_processors.demo.embedded import EMBEDDED, WEIGHTS, load_demo_pipeline
from tgate_processors.demo.evaluate import adherence, generate, held_out_scenes
from tgate_processors.demo.model import TOKENS, build_tokenizer, byte_pairs
from tgate_processors.demo.world import WORDS, caption, sample_scenes


# training builds its tokenizers as transformers 5 does
builds_tokenizers = pytest.mark.skipif(not HAS_TRANSFORMERS_5, reason="transformers is older than 5")


@builds_tokenizers
def test_every_word_is_one_token_of_its_own() -> None:
    tokenizer = build_tokenizer()
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(row) == 3 for row in ids)  # the word and the two marks around it
    assert len({row[1] for row in ids}) == len(WORDS)


def test_words_that_share_their_letters_stay_whole() -> None:
    vocabulary, merges = byte_pairs(["abab", "ab", "bab", "aba"])
    assert {"abab</w>", "ab</w>", "bab</w>", "aba</w>"} <= set(vocabulary)
    assert len(set(merges)) == len(merges)


@builds_tokenizers
def test_every_word_is_one_token_of_t5s_too() -> None:
    tokenizer = pixart.build_tokenizer()
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(row) == 2 for row in ids)  # the word and the mark of the end
    assert len({row[0] for row in ids}) == len(WORDS)
    assert tokenizer.pad_token_id == pixart.PAD


@builds_tokenizers
@pytest.mark.parametrize("build", [build_tokenizer, pixart.build_tokenizer])
def test_every_caption_fits(build: Callable[[], Any]) -> None:
    tokenizer = build()
    captions = [caption(scene) for scene in sample_scenes(200, torch.Generator().manual_seed(0))]
    assert max(map(len, tokenizer(captions).input_ids)) <= TOKENS


def test_loading_from_an_empty_folder_says_how_to_train(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`model` must be one of sd, lcm, pixart, pixart-lcm, or .*demo\.train"):
        load_demo_pipeline(tmp_path)


def test_the_weights_are_small_and_without_pickles() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 20_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EMBEDDED)
def test_a_model_loads_in_one_dtype_and_answers_two_prompts(name: str, dtype: torch.dtype) -> None:
    pipe = load_demo_pipeline(name, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 3
    assert {weight.dtype for part in parts for weight in part.parameters()} == {dtype}
    settings = {**EMBEDDED[name].call, "num_inference_steps": 2}
    prompts = ["a large red circle on a blue background", "a small green cross on a pink background"]
    pictures = pipe(prompts, **settings, output_type="np").images
    assert pictures.shape == (2, 64, 64, 3)


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_model_draws_what_it_is_told(name: str) -> None:
    """Eight held-out prompts: which of them are all right differs between machines, most of them are on all."""
    pipe = load_demo_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(8, 5)
    pictures = generate(pipe, [caption(scene) for scene in scenes], range(5, 13), **EMBEDDED[name].call)
    assert adherence(pictures, scenes)["all"].mean >= 0.6


@pytest.mark.parametrize("name", ["lcm", "pixart-lcm"])  # one takes a callback, the other none
def test_evaluate_draws_with_a_gate_too(name: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    drawn = []
    monkeypatch.setattr(evaluate, "adherence", lambda pictures, scenes: drawn.append(pictures) or {})
    for gate in ([], ["--gate-step", "1"], ["--gate-step", "3"]):
        evaluate.main(["--model", name, "--prompts", "1", *gate])
    assert capsys.readouterr().out.count(", gate step") == 2
    stock, first, third = drawn
    assert (first - stock).abs().mean() > (third - stock).abs().mean() > 0


def test_a_latent_consistency_model_is_an_adapter_of_its_teacher() -> None:
    """No package but `peft` knows that it was one: the network is its teacher's, of other values."""
    for name, embedded in EMBEDDED.items():
        if embedded.teacher is None:
            continue
        (student,), (teacher,) = (denoisers_of(load_demo_pipeline(one)) for one in (name, embedded.teacher))
        assert student.state_dict().keys() == teacher.state_dict().keys()
        assert any(not torch.equal(one, student.state_dict()[key]) for key, one in teacher.state_dict().items())


def test_a_latent_consistency_model_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingPackageError, match=r"`peft` must be installed .*tgate-processors\[lcm\]"):
        load_demo_pipeline("lcm")


def test_the_text_encoders_weights_have_names_that_every_transformers_5_knows() -> None:
    weights = load_file(WEIGHTS / "sd" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
