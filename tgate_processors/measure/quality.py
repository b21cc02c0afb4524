"""Drawing the same prompts many ways, and measuring what each costs in its pictures."""

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
    """What one way drew.

    Args:
        pictures: `(count, 3, height, width)` in 0..1.
        macs: Multiply-accumulates of the denoiser for one picture in the mean, attention's products among them.
        gate_steps: Where a gate that decides itself closed, run by run.
    """

    pictures: Tensor
    macs: float
    gate_steps: tuple[int, ...] = ()


Arguments = Callable[[slice], dict[str, Any]]  # of the call that draws these pictures


def draw(pipe: Any, way: Way, count: int, arguments: Arguments, *, batch_size: int = 1, bar: Any = None) -> Drawn:
    """Draw `count` pictures one way.

    Args:
        pipe: A pipeline that makes images, not gated.
        way: Put on the pipeline for as long.
        count: How many.
        arguments: Gives those of the pipeline's call, prompts and generators too.
        batch_size: Pictures in a call, of ways that do not draw each alone.
        bar: A progress bar that counts pictures.
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
        # runs differ in their arithmetic by where they closed the gate: one of each is counted, all else being equal
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
    """The multiply-accumulates of each evaluation of the denoisers."""
    counted: list[int] = []
    counter = FlopCounterMode(display=False)

    def begin(*_: Any) -> None:
        counter.__enter__()  # type: ignore[no-untyped-call]  # of torch

    def end(*_: Any) -> None:
        counter.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # of torch
        counted.append(counter.get_total_flops() // 2)

    hooks = [denoiser.register_forward_pre_hook(begin) for denoiser in denoisers]
    hooks += [denoiser.register_forward_hook(end, always_call=True) for denoiser in denoisers]
    try:
        with sdpa_kernel(SDPBackend.MATH):  # whose products are counted on every device
            yield counted
    finally:
        for hook in hooks:
            hook.remove()


Scores = Mapping[str, Tensor]
Score = Callable[[Tensor, Tensor], Scores]
OWN = "its own"  # the sampler that a pipeline comes with


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
    """Draw every way under one sampler and measure it beside the first, the stock pipeline; one that fails says why.

    Ctrl-C ends it: the report is of the ways that are done.

    Args:
        all_ways: The stock pipeline's first.
        draw_way: Draws one.
        score: Gives the scores of pictures, told the stock pictures too, by name: `(count,)` each, a boolean or a
            number for every picture.
        deciding: The score that the frontier is of.
        sampler: The name of the sampler.
        frechet: Distance of pictures to real ones; None: there are none.
        papers: The name of the papers' gate among the ways.
        settings: An interruption is noted here.
    """
    rows: list[Row] = []
    with keeping(rows, settings):
        stock = draw_way(all_ways[0])
        for way in all_ways:
            try:
                drawn = draw_way(way) if rows else stock
            except Exception as error:  # a peer may fail in any way, and the others go on
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
    """Compare under each sampler; none: under the pipeline's own. Ctrl-C ends it as it ends `compare`.

    Args:
        pipe: The pipeline.
        samplers: Names of `SAMPLERS`.
        compare_under: Compares under the sampler that the pipeline has then, told its name.
        settings: How all of them are drawn, for the report.

    Raises:
        ConfigError: A sampler is not known, or does not suit the pipeline.
    """
    names: Sequence[str | None] = samplers or [None]
    for name in names:  # before the work
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
    """Draw prompts with a pipeline of one's own, each way, and compare with its stock pictures; with a progress bar.

    Args:
        pipe: A pipeline that makes images, not gated.
        prompts: What to draw.
        num_inference_steps: Number of denoising steps, at least 5.
        samplers: Names of `SAMPLERS`; none: the pipeline's own.
        seed: Prompt i starts from the noise of `seed + i`.
        clip: A CLIP model's folder or its name on the hub, for CLIP scores; None: likeness alone.
        only: Parts of the names of the ways to keep; none: all that are not extra. The stock pipeline is always there.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: There is no prompt, too few steps, or `only` or `samplers` names nothing that there is.
        MissingPackageError: `torchmetrics` or `scipy` is not installed.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """
    require_prompts(prompts)
    TGateConfig(gate_step="auto").schedule(num_inference_steps)  # says if these are too few

    def score(pictures: Tensor, stock: Tensor) -> Scores:
        if clip is None:
            return {"likeness": likeness.ssim(pictures, stock)}
        return {"CLIP score": likeness.clip_score(pictures, prompts, clip) / 100}

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
    """The arguments of calls that draw one prompt each; prompt i starts from the noise of `seed + i`."""

    def arguments(chunk: slice) -> dict[str, Any]:
        return {
            **call_kwargs,
            "prompt": prompts[chunk.start],
            "generator": torch.Generator().manual_seed(seed + chunk.start),
            "num_inference_steps": num_inference_steps,
        }

    return arguments


def papers_gate(num_steps: int, *, has_unet: bool) -> str:
    """The name of the way that the papers suggest for Stable Diffusion, or for PixArt."""
    return f"gate step {part_of(num_steps, _papers_share(has_unet))}"


def _papers_share(has_unet: bool) -> float:
    return 0.4 if has_unet else 0.6


def part_of(num_steps: int, share: float) -> int:
    """A share of a run in steps, at least one."""
    return max(1, round(share * num_steps))


def chosen_ways(num_steps: int, only: Sequence[str], *, has_unet: bool) -> list[Way]:
    """Those that `only` names by parts of their names; where it is empty all that are not extra.

    Raises:
        ConfigError: A part is in no name.
    """
    every = ways_for(num_steps, has_unet=has_unet)
    return ways.named(every if only else [way for way in every if not way.is_extra], only)


def ways_for(num_steps: int, *, has_unet: bool) -> list[Way]:
    """The stock pipeline, the gate, its control, looks, fewer steps and peers; then those that are extra."""

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
