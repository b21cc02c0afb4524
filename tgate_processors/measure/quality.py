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
from tgate_processors.measure.quality_report import Report, Row, estimate
from tgate_processors.measure.ways import Way
from tgate_processors.presets import preset
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
        batch_size: Pictures in a call.
        bar: A progress bar that counts pictures.
    """
    pictures, gate_steps = [], []
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


def compare(
    all_ways: Sequence[Way],
    draw_way: Callable[[Way], Drawn],
    score: Callable[[Tensor, Tensor], Scores],
    deciding: str,
    settings: dict[str, Any],
    frechet: Callable[[Tensor], float] | None = None,
) -> Report:
    """Draw every way and measure it beside the first, the stock pipeline; a way that fails says why.

    Ctrl-C ends it: the report is of the ways that are done.

    Args:
        all_ways: The stock pipeline's first.
        draw_way: Draws one.
        score: Gives the scores of pictures, told the stock pictures too, by name: `(count,)` each, a boolean or a
            number for every picture.
        deciding: The score whose differences to the stock pipeline's are estimated.
        settings: How they are drawn, for the report.
        frechet: Distance of pictures to real ones; None: there are none.
    """
    rows: list[Row] = []
    with keeping(rows, settings):
        stock = draw_way(all_ways[0])
        stock_scores = score(stock.pictures, stock.pictures)
        rows.append(_row(all_ways[0], stock, stock.macs, stock_scores, frechet))
        for way in all_ways[1:]:
            try:
                drawn = draw_way(way)
            except Exception as error:  # a peer may fail in any way, and the others go on
                rows.append(Row(way.name, ways.said_of(error)))
                continue
            scores = score(drawn.pictures, stock.pictures)
            row = _row(way, drawn, stock.macs, scores, frechet)
            rows.append(
                replace(
                    row,
                    psnr=estimate(likeness.psnr(drawn.pictures, stock.pictures)),
                    ssim=estimate(likeness.ssim(drawn.pictures, stock.pictures)),
                    to_stock=estimate(scores[deciding].double() - stock_scores[deciding].double()),
                )
            )
    return Report(settings, deciding, tuple(rows))


def _row(way: Way, drawn: Drawn, stock_macs: float, scores: Scores, frechet: Callable[[Tensor], float] | None) -> Row:
    return Row(
        way.name,
        arithmetic=drawn.macs / stock_macs,
        scores={score: estimate(values) for score, values in scores.items()},
        frechet=None if frechet is None else frechet(drawn.pictures),
        gate_step=way.gate_step,
        gate_steps=drawn.gate_steps,
    )


def quality_of_pipeline(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    seed: int = 0,
    clip: str | None = None,
    only: Sequence[str] = (),
    **call_kwargs: Any,
) -> Report:
    """Draw prompts with a pipeline of one's own, each way, and compare with its stock pictures; with a progress bar.

    Args:
        pipe: A pipeline that makes images, not gated.
        prompts: What to draw.
        num_inference_steps: Denoising steps, at least 5.
        seed: Prompt i starts from the noise of `seed + i`.
        clip: A CLIP model's folder or its name on the hub, for CLIP scores; None: likeness alone.
        only: Parts of the names of the ways to keep; none: all. The stock pipeline is always there.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: There is no prompt, too few steps, or `only` names no way.
        MissingPackageError: `torchmetrics` is not installed.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """
    require_prompts(prompts)
    TGateConfig(gate_step="auto").schedule(num_inference_steps)  # says if these are too few

    def arguments(chunk: slice) -> dict[str, Any]:
        return call_kwargs | {
            "prompt": prompts[chunk.start],
            "generator": torch.Generator().manual_seed(seed + chunk.start),
            "num_inference_steps": num_inference_steps,
        }

    def score(pictures: Tensor, stock: Tensor) -> Scores:
        if clip is None:
            return {"likeness": likeness.ssim(pictures, stock)}
        return {"CLIP score": likeness.clip_score(pictures, prompts, clip) / 100}

    deciding = "likeness" if clip is None else "CLIP score"
    chosen = ways.named(ways_for(num_inference_steps, has_unet=hasattr(pipe, "unet")), only)
    settings = {"steps": num_inference_steps, "prompts": len(prompts), "seed": seed}
    settings = described(pipe, call_kwargs) | settings
    with tqdm(total=len(chosen) * len(prompts), desc="drawing", unit="picture") as bar:
        return compare(
            chosen, lambda way: draw(pipe, way, len(prompts), arguments, bar=bar), score, deciding, settings
        )


def ways_for(num_steps: int, *, has_unet: bool) -> list[Way]:
    """The stock pipeline, the gate at several steps, its control, and peers."""

    def at(part: float) -> int:
        return max(1, round(part * num_steps))

    gates = sorted({at(part) for part in (0.2, 0.3, 0.4, 0.5, 0.6)})
    papers = TGateConfig(gate_step=0.4)
    chosen = [
        ways.stock(),
        *(replace(ways.gated(TGateConfig(gate_step=gate), f"gate step {gate}"), gate_step=gate) for gate in gates),
        ways.gated(TGateConfig(gate_step="auto"), "gate step auto"),
        ways.gated(preset("looks"), "look"),
        *(ways.dropping_guidance(gate, num_steps) for gate in gates),
        *(ways.fewer_steps(at(part)) for part in (0.4, 0.6, 0.8)),
    ]
    if has_unet:
        chosen += [
            ways.deep_cache(3),
            ways.deep_cache(3, papers),
            ways.token_merging(0.5),
            ways.token_merging(0.5, papers),
        ]
    return chosen
