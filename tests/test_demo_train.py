"""Training is repeatable and resumable, and the measuring code pairs pictures with their seeds."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LCMScheduler
from peft import PeftModel
from torch import Tensor, nn

from tgate_processors.demo import distil, model, pixart, train
from tgate_processors.demo.embedded import EMBEDDED, TEACHER_STEPS, load_demo_pipeline
from tgate_processors.demo.evaluate import adherence, generate, held_out_scenes, table
from tgate_processors.demo.render import render
from tgate_processors.demo.train import RECIPES, denoiser_trainer, draw_batch, lesson_rows, save_weights, tokenize
from tgate_processors.demo.trainer import Settings, Trainer, step_generator
from tgate_processors.demo.world import caption, is_held_out


# training builds its tokenizers as transformers 5 does
pytest.importorskip("transformers", minversion="5")
LATENTS = torch.linspace(-1, 1, 6 * 4 * 8 * 8).view(6, 4, 8, 8)
CAPTION = "a large red circle on a blue background"


SMALLER = {
    "sd": replace(RECIPES["sd"], build_denoiser=partial(model.build_unet, (16, 16, 16))),
    "pixart": replace(RECIPES["pixart"], build_denoiser=partial(pixart.build_transformer, 1, 1)),
}
each_kind = pytest.mark.parametrize("kind", SMALLER)


def _trainer(out: Path, kind: str) -> Trainer:
    settings = Settings(steps=4, batch=2, learning_rate=1e-3, warm_up=2)
    recipe = replace(SMALLER[kind], lessons=(range(0), range(0)))  # the pool has no pairs
    tokens = tokenize(recipe.build_tokenizer(), [CAPTION] * 6)
    return denoiser_trainer(recipe, LATENTS, tokens, settings, out)


def _weights(trainer: Trainer) -> list[Tensor]:
    return [*trainer.network.parameters(), *trainer.averaged.parameters()]


@each_kind
def test_two_and_two_steps_are_four(kind: str, tmp_path: Path) -> None:
    straight = _trainer(tmp_path / "straight", kind)
    straight.run()
    _trainer(tmp_path / "halves", kind).run(until=2)
    resumed = _trainer(tmp_path / "halves", kind)
    assert resumed.step == 2
    resumed.run()
    assert straight.step == resumed.step == 4
    for one, other in zip(_weights(straight), _weights(resumed), strict=True):
        assert torch.equal(one, other)


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    def batch(seed: int, step: int) -> list[Tensor]:
        return list(draw_batch(4, LATENTS, step_generator(seed, "unet", step), torch.arange(6)))

    assert all(map(torch.equal, batch(1, 7), batch(1, 7)))
    assert not torch.equal(batch(1, 7)[1], batch(1, 8)[1])
    assert not torch.equal(batch(1, 7)[1], batch(2, 7)[1])


def test_noisy_steps_are_spent_where_it_is_settled_how_large_things_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(SMALLER["pixart"], lessons=(range(0), range(0)), noisy=range(1))
    settings = Settings(steps=2, batch=40, learning_rate=1e-3)
    tokens = tokenize(recipe.build_tokenizer(), [CAPTION] * 6)
    seen: list[Tensor] = []
    monkeypatch.setattr(train, "denoising_loss", lambda *arguments: seen.append(arguments[5]))
    trainer = denoiser_trainer(recipe, LATENTS, tokens, settings, tmp_path)
    for step in (0, 1):
        trainer.loss(step, step_generator(0, "the same", 0))
    noisy, plain = seen
    assert torch.equal(noisy[:10], plain[:10])
    assert torch.equal(noisy[10:], 500 + plain[10:] // 2)


@each_kind
def test_what_is_learnt_is_a_pipeline_in_half_precision(kind: str, tmp_path: Path) -> None:
    recipe = SMALLER[kind]
    trainer = _trainer(tmp_path, kind)
    save_weights(tmp_path / "weights", recipe, model.build_vae((8, 8, 8)), trainer.averaged)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "weights", local_files_only=True)
    learnt = trainer.averaged.get_submodule(recipe.denoiser)
    for name, weight in getattr(pipe, recipe.denoiser).named_parameters():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, learnt.get_parameter(name).half().float())
    pipe.set_progress_bar_config(disable=True)
    sizes = {"height": 64, "width": 64, "use_resolution_binning": False} if kind == "pixart" else {}
    assert pipe(CAPTION, num_inference_steps=2, output_type="np", **sizes).images.shape == (1, 64, 64, 3)


@each_kind
def test_what_the_pipeline_asks_is_what_was_learnt(kind: str, tmp_path: Path) -> None:
    """In training captions are padded to 20 tokens, by PixArt's pipeline to 120: its masks hide the rest."""
    recipe, words = SMALLER[kind], ["a large red circle on a blue background", ""]
    network = _trainer(tmp_path, kind).averaged
    noised, timesteps = LATENTS[:2], torch.tensor([999, 500])
    expected = recipe.velocity(network, noised, timesteps, tokenize(recipe.build_tokenizer(), words))
    pipe = recipe.build_pipeline(model.build_vae((8, 8, 8)), *network.values())
    encoded = pipe.encode_prompt(words, do_classifier_free_guidance=False, device="cpu", num_images_per_prompt=1)
    if kind == "pixart":
        states, mask, *_ = encoded
        sizes = {"resolution": None, "aspect_ratio": None}
        asked = {"encoder_attention_mask": mask, "added_cond_kwargs": sizes}
        predicted = pipe.transformer(noised, states, timesteps, **asked).sample
    else:
        predicted = pipe.unet(noised, timesteps, encoded[0]).sample
    torch.testing.assert_close(predicted, expected, rtol=1e-4, atol=1e-5)


@each_kind
def test_one_lesson_is_of_straight_pairs_and_one_brings_back_a_third_of_the_turned(kind: str) -> None:
    tokenizer = RECIPES[kind].build_tokenizer()
    pair = "a large red circle {} a small blue square on a pink background"
    captions = [CAPTION, pair.format("left of"), pair.format("below"), pair.format("above"), CAPTION]
    captions += [pair.format("right of"), pair.format("right of")]  # rows 5 and 6; of the turned, 6 stays
    straight, some = lesson_rows(tokenize(tokenizer, captions), tokenizer)
    assert straight.tolist() == [1, 3]
    assert some.tolist() == [0, 1, 3, 4, 6]


def test_the_rate_rises_stays_and_falls() -> None:
    settings = Settings(steps=100, batch=1, learning_rate=2.0, warm_up=4)
    assert [settings.rate(step) for step in (0, 1, 3, 50, 75)] == [0.5, 1.0, 2.0, 2.0, 2.0]
    assert settings.rate(99) == pytest.approx(2.0 / 25)  # one of the decay's 25 steps is left


def test_settings_refuse_what_cannot_train() -> None:
    with pytest.raises(ValueError, match=r"`steps` must be above 0, got 0"):
        Settings(steps=0, batch=1, learning_rate=1.0)


def test_held_out_scenes_are_held_out_and_longer_lists_begin_alike() -> None:
    scenes = held_out_scenes(8, seed=0)
    assert all(map(is_held_out, scenes))
    assert scenes[:3] == held_out_scenes(3, seed=0)


def test_adherence_of_drawings_is_whole() -> None:
    scenes = held_out_scenes(8, seed=0)
    shares = adherence(render(scenes, torch.Generator().manual_seed(0)), scenes)
    assert {share.mean for share in shares.values()} == {1.0}
    assert "all" in table(shares)


class _Echo:
    """Stands where a pipeline does and returns each prompt's first noise as its picture."""

    def __call__(self, prompt: list[str], generator: list[torch.Generator], **_: Any) -> Any:
        self.images = torch.stack([torch.rand(3, 2, 2, generator=g) for g in generator])
        return self


def test_a_picture_depends_on_its_own_seed_and_not_on_the_batch() -> None:
    pipe: Any = _Echo()
    together = generate(pipe, [CAPTION] * 3, [5, 6, 7])
    assert torch.equal(together, generate(pipe, [CAPTION] * 3, [5, 6, 7], batch_size=2))
    assert torch.equal(together[1:2], generate(pipe, [CAPTION], [6]))


def test_seeds_must_be_as_many_as_prompts() -> None:
    with pytest.raises(ValueError, match="`seeds` must be as many as the prompts, got 1 for 2"):
        generate(_Echo(), [CAPTION] * 2, [0])  # type: ignore[arg-type]  # it is not called


@each_kind
def test_captions_are_held_to_the_tokens_of_the_pipeline(kind: str) -> None:
    scenes = held_out_scenes(3, seed=1)
    assert tokenize(RECIPES[kind].build_tokenizer(), [caption(scene) for scene in scenes]).shape == (3, 20)


def _student(out: Path, kind: str) -> tuple[nn.ModuleDict, Trainer]:
    recipe = SMALLER[kind]
    torch.manual_seed(0)
    tokenizer = recipe.build_tokenizer()
    parts = model.build_vae((8, 8, 8)), recipe.build_text_encoder(tokenizer), recipe.build_denoiser()
    networks = nn.ModuleDict({"text_encoder": parts[1], recipe.denoiser: parts[2]})
    runs = distil.draw_runs(
        recipe, networks, LATENTS, tokenize(tokenizer, [CAPTION] * 6), tokenize(tokenizer, [""]), 3.0
    )
    networks[recipe.denoiser] = distil.student(recipe, recipe.build_pipeline(*parts), rank=2, seed=0)
    settings = Settings(steps=4, batch=2, learning_rate=1e-3, warm_up=2)
    return networks, distil.student_trainer(recipe, networks, runs, settings, out)


@each_kind
def test_the_teachers_runs_are_those_of_its_pipeline(kind: str) -> None:
    recipe = SMALLER[kind]
    torch.manual_seed(0)
    tokenizer = recipe.build_tokenizer()
    parts = model.build_vae((8, 8, 8)), recipe.build_text_encoder(tokenizer), recipe.build_denoiser()
    networks = nn.ModuleDict({"text_encoder": parts[1], recipe.denoiser: parts[2]})
    noise = torch.randn(2, *distil.LATENTS, generator=torch.Generator().manual_seed(1))
    prompts = [CAPTION, "a small green cross on a white background"]
    runs = distil.draw_runs(recipe, networks, noise, tokenize(tokenizer, prompts), tokenize(tokenizer, [""]), 3.0)
    pipe = recipe.build_pipeline(*parts)
    pipe.set_progress_bar_config(disable=True)
    settings = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    pipe.scheduler = DDIMScheduler.from_config(model.build_scheduler().config, **settings)
    call = EMBEDDED[kind].call | {"num_inference_steps": TEACHER_STEPS, "guidance_scale": 3.0, "output_type": "latent"}
    drawn = pipe(prompts, latents=noise, **call).images
    assert torch.equal(runs["states"][:, 0], noise)
    # PixArt's pipeline pads captions to more tokens, which are masked
    torch.testing.assert_close(runs["clean"], drawn, rtol=1e-4, atol=1e-4)


@each_kind
def test_distillation_in_two_and_two_steps_is_in_four_and_moves_the_adapter_alone(kind: str, tmp_path: Path) -> None:
    networks, straight = _student(tmp_path / "straight", kind)
    before = {name: weight.clone() for name, weight in networks.named_parameters()}
    straight.run()
    _student(tmp_path / "halves", kind)[1].run(until=2)
    _, resumed = _student(tmp_path / "halves", kind)
    resumed.run()
    for one, other in zip(_weights(straight), _weights(resumed), strict=True):
        assert torch.equal(one, other)
    moved = {name for name, weight in networks.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if "lora_" in name}


@each_kind
def test_an_adapter_is_a_file_of_its_own(kind: str, tmp_path: Path) -> None:
    recipe = SMALLER[kind]
    networks, trainer = _student(tmp_path, kind)
    trainer.run()
    distil.save_adapter(tmp_path / "adapter", trainer.averaged)
    base = copy.deepcopy(networks[recipe.denoiser]).unload()
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    for (name, one), other in zip(trainer.averaged.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(one.half() if "lora_" in name else one, other.half() if "lora_" in name else other), name
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_a_student_that_is_consistent_has_no_loss() -> None:
    """Of latents that are all one picture, a network that knows it sees the same picture from every timestep."""
    scheduler, picture = model.build_scheduler(), LATENTS[:1].expand(5, -1, -1, -1)
    timesteps = torch.tensor([99, 199, 499, 899, 999])

    def velocity(networks: Any, noised: Tensor, timesteps: Tensor, words: Tensor) -> Tensor:
        kept = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        known = picture[:1].expand_as(noised)
        return (kept.sqrt() * noised - known) / (1 - kept).sqrt()

    recipe = replace(RECIPES["sd"], velocity=velocity)
    networks, _ = _student(Path(), "sd")
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(0))
    noised = scheduler.add_noise(picture, noise, timesteps)
    words = torch.zeros(5, 20).long()
    assert distil.consistency_loss(recipe, networks, scheduler, noised, timesteps, words, picture) < 1e-6
    assert distil.consistency_loss(recipe, networks, scheduler, noised, timesteps, words, picture + 0.5) > 0.4


def test_the_timesteps_that_are_learnt_are_those_that_the_scheduler_asks_for() -> None:
    learnt = set(distil.timesteps_of_a_run().tolist())
    scheduler = load_demo_pipeline("lcm").scheduler
    assert isinstance(scheduler, LCMScheduler)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= learnt
