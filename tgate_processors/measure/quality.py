"""Draw the same prompts with many methods, and measure what each costs in its pictures."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tgate_processors._pipelines import denoisers_of
from tgate_processors.handle import loops_on
from tgate_processors.measure import likeness, ways
from tgate_processors.measure.convergence import described, require_prompts
from tgate_processors.measure.interruption import keeping
from tgate_processors.measure.quality_report import Quality, Report, Row
from tgate_processors.measure.samplers import sampler_on
from tgate_processors.measure.ways import Way
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class Drawn:
    """Pictures that one method drew.

    Args:
        pictures: The pictures, `(count, 3, height, width)` in 0..1.
        macs: Mean multiply-accumulates of the denoiser for a picture, with attention's products.
        gate_steps: Steps at which the gate closed in each run, with `gate_step="auto"`.
    """

    pictures: Tensor
    macs: float
    gate_steps: tuple[int, ...] = ()


Arguments = Callable[[slice], dict[str, Any]]  # returns the arguments of the call that draws these pictures


def draw(pipe: Any, way: Way, count: int, arguments: Arguments, *, batch_size: int = 1, bar: Any = None) -> Drawn:
    """Draw pictures with one method.

    Args:
        pipe: Pipeline that makes images, without a gate.
        way: Method to apply to the pipeline while it draws.
        count: Number of pictures.
        arguments: Function that returns the arguments of the pipeline's call, including prompts and generators.
        batch_size: Number of pictures in a call, for methods that can draw several together.
        bar: Progress bar that counts pictures.
    """
    pictures, gate_steps = [], []
    batch_size = 1 if way.is_alone else batch_size
    with way.on(pipe) as changes:
        loop = next(iter(loops_on(denoisers_of(pipe)[0])), None)
        for start in range(0, count, batch_size):
            chunk = slice(start, min(start + batch_size, count))
            kwargs = arguments(chunk) | changes
            pictures.append(pipe(**kwargs, output_type="pt").images.cpu().float())
            if loop is not None and loop.config.gate_step == "auto":
                gate_steps.append(loop.run.closes_at or kwargs["num_inference_steps"])
            if bar is not None:
                bar.update(chunk.stop - chunk.start)
        # with equal gate steps runs do the same arithmetic, so one run of each gate step is counted
        runs = gate_steps or [0]
        macs = {}
        for gate_step in set(runs):
            index = runs.index(gate_step)
            with _counting(denoisers_of(pipe)) as counted:
                pipe(**arguments(slice(index, index + 1)) | changes, output_type="latent")
            macs[gate_step] = sum(counted)
    return Drawn(torch.cat(pictures), fmean(macs[gate_step] for gate_step in runs), tuple(gate_steps))


@contextmanager
def _counting(denoisers: Sequence[torch.nn.Module]) -> Iterator[list[int]]:
    """Yield a list that collects the multiply-accumulates of each evaluation of the denoisers."""
    counted: list[int] = []
    counter = FlopCounterMode(display=False)

    def begin(*_: Any) -> None:
        counter.__enter__()  # type: ignore[no-untyped-call]  # untyped in torch

    def end(*_: Any) -> None:
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # untyped in torch
        counted.append(counter.get_total_flops() // 2)

    hooks = [denoiser.register_forward_pre_hook(begin) for denoiser in denoisers]
    hooks += [denoiser.register_forward_hook(end, always_call=True) for denoiser in denoisers]
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the counter sees this kernel's products on every device
            yield counted
    finally:
        for hook in hooks:
            hook.remove()


Scores = Mapping[str, Tensor]
Score = Callable[[Tensor, Tensor], Scores]
OWN = "its own"  # name in reports of the sampler that the pipeline came with


def compare(
    all_ways: Sequence[Way],
    draw_way: Callable[[Way], Drawn],
    score: Score,
    deciding: str,
    sampler: str,
    *,
    frechet: Callable[[Tensor], float] | None = None,
    papers: str | None = None,
    settings: dict[str, Any],
) -> Report:
    """Draw with every method under one sampler, and compare each with the stock pipeline.

    If a method fails, its row has the error. After Ctrl-C the report covers the methods that are done.

    Args:
        all_ways: The methods, with the stock pipeline first.
        draw_way: Function that draws with one method.
        score: Function of a method's pictures and the stock pictures that returns scores by name, `(count,)` each,
            with a boolean or a number for every picture.
        deciding: Name of the score that decides the frontier.
        sampler: Name of the sampler.
        frechet: Function that returns the distance of pictures to real ones. None if there are no real ones.
        papers: Name of the method that is the papers' gate.
        settings: Settings of the report, in which an interruption is noted.
    """
    rows: list[Row] = []
    with keeping(rows, settings):
        stock = draw_way(all_ways[0])
        for way in all_ways:
            try:
                drawn = draw_way(way) if rows else stock
            except Exception as error:  # a peer may fail with any error; the other methods still run
                rows.append(Row(way.name, ways.said_of(error)))
                continue
            rows.append(
                Row(
                    way.name,
                    arithmetic=drawn.macs / stock.macs,
                    scores=score(drawn.pictures, stock.pictures),
                    psnr=likeness.psnr(drawn.pictures, stock.pictures) if rows else None,
                    ssim=likeness.ssim(drawn.pictures, stock.pictures) if rows else None,
                    frechet=None if frechet is None else frechet(drawn.pictures),
                    gate_step=way.gate_step,
                    gate_steps=drawn.gate_steps,
                )
            )
    return Report(sampler, deciding, tuple(rows), papers)


def under_samplers(
    pipe: Any, samplers: Sequence[str], compare_under: Callable[[str], Report], settings: dict[str, Any]
) -> Quality:
    """Compare the methods under each sampler. After Ctrl-C the report covers what is done.

    Args:
        pipe: Pipeline that draws.
        samplers: Keys of `SAMPLERS`. If empty, the pipeline's own sampler.
        compare_under: Function of the sampler's name that compares the methods, while the pipeline has this sampler.
        settings: Settings of the report.

    Raises:
        ConfigError: A sampler is unknown, or does not suit the pipeline.
    """
    names: Sequence[str | None] = samplers or [None]
    for name in names:  # raises before the work
        with sampler_on(pipe, name):
            pass
    reports: list[Report] = []
    with keeping(reports, settings):
        for name in names:
            with sampler_on(pipe, name):
                reports.append(compare_under(name or OWN))
            if settings.get("interrupted"):
                break
    return Quality(settings, reports)


def quality_of_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    samplers: Sequence[str] = (),
    seed: int = 0,
    clip: str | None = None,
    only: Sequence[str] = (),
    **call_kwargs: Any,
) -> Quality:
    """Draw prompts with any pipeline and each method, and compare with the stock pictures, with a progress bar.

    Args:
        pipe: Pipeline that makes images, without a gate.
        prompts: Prompts to draw.
        num_inference_steps: Number of denoising steps, at least 5.
        samplers: Keys of `SAMPLERS`. If empty, the pipeline's own sampler.
        seed: Seed of the noise. Prompt i starts from the noise of `seed + i`.
        clip: Folder of a CLIP model, or its name on the hub, for CLIP scores. None measures likeness alone.
        only: Parts of the names of the methods to run. If empty, all run that are not extra. The stock pipeline always
            runs.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: `prompts` is empty, there are too few steps, or `only` or `samplers` has an unknown name.
        MissingPackageError: `torchmetrics` or `scipy` is not installed.
        OSError: There is no model `clip`.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """
    require_prompts(prompts)
    TGateConfig(gate_step="auto").schedule(num_inference_steps)  # raises if these are too few
    clip_score = None if clip is None else likeness.ClipScore(clip)

    def score(pictures: Tensor, stock: Tensor) -> Scores:
        if clip_score is None:
            return {"likeness": likeness.ssim(pictures, stock)}
        return {"CLIP score": clip_score(pictures, prompts) / 100}

    deciding = "likeness" if clip is None else "CLIP score"
    arguments = one_by_one(prompts, num_inference_steps, seed, call_kwargs)
    chosen = chosen_ways(num_inference_steps, only, has_unet=hasattr(pipe, "unet"))
    settings = {"steps": num_inference_steps, "prompts": len(prompts), "seed": seed}
    settings = described(pipe, call_kwargs) | settings
    total = max(1, len(samplers)) * len(chosen) * len(prompts)
    with tqdm(total=total, desc="drawing", unit="picture", disable=None) as bar:

        def under(sampler: str) -> Report:
            return compare(
                chosen,
                lambda way: draw(pipe, way, len(prompts), arguments, bar=bar),
                score,
                deciding,
                sampler,
                papers=papers_gate(num_inference_steps, has_unet=hasattr(pipe, "unet")),
                settings=settings,
            )

        return under_samplers(pipe, samplers, under, settings)


def one_by_one(
    prompts: Sequence[str], num_inference_steps: int, seed: int, call_kwargs: Mapping[str, Any]
) -> Arguments:
    """Return the arguments of calls that draw one prompt each. Prompt i starts from the noise of `seed + i`."""

    def arguments(chunk: slice) -> dict[str, Any]:
        return {
            **call_kwargs,
            "prompt": prompts[chunk.start],
            "generator": torch.Generator().manual_seed(seed + chunk.start),
            "num_inference_steps": num_inference_steps,
        }

    return arguments


def papers_gate(num_steps: int, *, has_unet: bool) -> str:
    """Return the name of the method with the papers' gate: Stable Diffusion's for a UNet, else PixArt's."""
    return f"gate step {part_of(num_steps, _papers_share(has_unet))}"


def _papers_share(has_unet: bool) -> float:
    return 0.4 if has_unet else 0.6


def part_of(num_steps: int, share: float) -> int:
    """Return a share of a run as a number of steps, at least one."""
    return max(1, round(share * num_steps))


def chosen_ways(num_steps: int, only: Sequence[str], *, has_unet: bool) -> list[Way]:
    """Return the stock pipeline and the methods whose names have a part in `only`.

    If `only` is empty, return all methods that are not extra.

    Raises:
        ConfigError: A part is in no name.
    """
    every = ways_for(num_steps, has_unet=has_unet)
    return ways.named(every if only else [way for way in every if not way.is_extra], only)


def ways_for(num_steps: int, *, has_unet: bool) -> list[Way]:
    """Return all methods: the stock pipeline, the gate, its control, looks, fewer steps and peers, then extra ones."""

    def at(share: float) -> int:
        return part_of(num_steps, share)

    def gate(step: int) -> Way:
        return replace(ways.gated(TGateConfig(gate_step=step), f"gate step {step}"), gate_step=step)

    def looks(share: float, interval: int) -> Way:
        config = TGateConfig(gate_step=share, look_interval=interval)
        return ways.gated(config, f"look: {at(share)}, every {interval}")

    share = _papers_share(has_unet)
    papers = TGateConfig(gate_step=share)
    interval = TGateConfig(gate_step=0.4, guidance_start=0.08)
    hurried = TGateConfig(gate_step=0.12, look_interval=3)
    chosen = [
        ways.stock(),
        gate(at(share)),
        replace(ways.gated(TGateConfig(gate_step="auto"), "gate step auto"), is_alone=True),
        ways.dropping_guidance(at(share)),
        looks(0.2, 5),  # `preset("looks")`
        looks(0.12, 4),
        ways.gated(interval, f"guidance from {round(0.08 * num_steps)} to {at(0.4)}, gated"),
        ways.fewer_steps(at(0.64)),
        ways.fewer_steps(at(0.44)),
        ways.fewer_steps(at(0.64), hurried),
    ]
    extra = [
        *(gate(step) for step in range(1, num_steps) if step != at(share)),
        *(ways.dropping_guidance(at(part)) for part in (0.08, 0.2, 0.4, 0.6, 0.8) if part != share),
        *(ways.fewer_steps(at(part)) for part in (0.2, 0.32, 0.8)),
        looks(0.2, 6),
        looks(0.24, 6),
        ways.pyramid_attention_broadcast(),
        ways.pyramid_attention_broadcast(papers),
        ways.gated(TGateConfig(gate_step=0.4, sp_interval=5, warm_up=2), f"gate {at(0.4)}, sp_interval 5"),
        ways.gated(TGateConfig(gate_step=0.6, sp_interval=3, warm_up=2), f"gate {at(0.6)}, sp_interval 3"),
    ]
    if has_unet:
        chosen += [ways.deep_cache(3), ways.deep_cache(3, papers)]
        extra += [ways.token_merging(0.5), ways.token_merging(0.5, papers)]
    return [*chosen, *(replace(way, is_extra=True) for way in extra)]
