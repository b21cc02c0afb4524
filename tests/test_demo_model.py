"""The demo's tokenizer, and the weights folder once it is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tgate_processors.demo import pixart
from tgate_processors.demo.model import TOKENS, WEIGHTS, build_tokenizer, byte_pairs, load_demo_pipeline
from tgate_processors.demo.world import WORDS, caption, sample_scenes


trained = pytest.mark.skipif(not (WEIGHTS / "model_index.json").is_file(), reason="no trained weights here")


def test_every_word_is_one_token_of_its_own() -> None:
    tokenizer = build_tokenizer()
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(row) == 3 for row in ids)  # the word and the two marks around it
    assert len({row[1] for row in ids}) == len(WORDS)


def test_words_that_share_their_letters_stay_whole() -> None:
    vocabulary, merges = byte_pairs(["abab", "ab", "bab", "aba"])
    assert {"abab</w>", "ab</w>", "bab</w>", "aba</w>"} <= set(vocabulary)
    assert len(set(merges)) == len(merges)


def test_every_word_is_one_token_of_t5s_too() -> None:
    tokenizer = pixart.build_tokenizer()
    ids = [tokenizer(word).input_ids for word in WORDS]
    assert all(len(row) == 2 for row in ids)  # the word and the mark of the end
    assert len({row[0] for row in ids}) == len(WORDS)
    assert tokenizer.pad_token_id == pixart.PAD


@pytest.mark.parametrize("build", [build_tokenizer, pixart.build_tokenizer])
def test_every_caption_fits(build: Callable[[], Any]) -> None:
    tokenizer = build()
    captions = [caption(scene) for scene in sample_scenes(200, torch.Generator().manual_seed(0))]
    assert max(map(len, tokenizer(captions).input_ids)) <= TOKENS


def test_loading_from_an_empty_folder_says_how_to_train(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`folder` must hold a trained demo model.*demo\.train"):
        load_demo_pipeline(tmp_path)


@trained
def test_the_weights_are_small_and_without_pickles() -> None:
    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt"}


@trained
def test_the_model_loads_in_one_dtype_and_answers_two_prompts() -> None:
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    assert {weight.dtype for part in parts for weight in part.parameters()} == {torch.float32}
    pictures = pipe(
        ["a large red circle on a blue background"] * 2,
        negative_prompt=["a small green cross on a pink background"] * 2,
        num_inference_steps=2,
        output_type="np",
    ).images
    assert pictures.shape == (2, 64, 64, 3)


def test_the_text_encoders_weights_have_names_that_every_transformers_5_knows() -> None:
    weights = load_file(WEIGHTS / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in weights)
