"""What each way to run a pipeline faster costs in its pictures: their likeness to the stock pipeline's, and scores."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, median_low
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from tgate_processors import likeness, ways
from tgate_processors.convergence import require_prompts
from tgate_processors.errors import MissingPackageError
from tgate_processors.handle import handles_on
from tgate_processors.pipelines import denoisers_of
from tgate_processors.plotting import BLUE, GREY, RED, new_figure
from tgate_processors.presets import preset
from tgate_processors.schedule import TGateConfig, format_table
from tgate_processors.ways import Way


NORMAL_95 = 1.96  # standard deviations on either side that hold 95% of a normal distribution


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95% confidence interval."""

    mean: float
    low: float
    high: float

    def shown(self, digits: int, factor: float = 1) -> str:
        return " ".join(
            [
                f"{self.mean * factor:.{digits}f}",
                f"({self.low * factor:.{digits}f} to {self.high * factor:.{digits}f})",
            ]
        )


def estimate(values: Tensor) -> Estimate:
    """Of the mean of `(count,)` values: Wilson's interval for booleans, the normal one for numbers."""
    count = len(values)
    mean = float(values.double().mean())
    if values.dtype is not torch.bool:
        reach = NORMAL_95 * float(values.double().std()) / math.sqrt(count) if count > 1 else math.inf
        return Estimate(mean, mean - reach, mean + reach)
    square = NORMAL_95**2 / count
    centre, reach = mean + square / 2, math.sqrt(square * (mean * (1 - mean) + square / 4))
    return Estimate(mean, (centre - reach) / (1 + square), (centre + reach) / (1 + square))


@dataclass(frozen=True)
class Row:
    """What was measured of one way.

    Args:
        name: Of the way.
        error: Why there is no measurement; None where there is one.
        arithmetic: Multiply-accumulates of the denoiser, attention's products among them, over the stock run's.
        psnr, ssim: Likeness to the stock pictures of the same seeds; of the stock pictures themselves None.
        scores: By name; "all" or the like.
        to_stock: The difference of the deciding score to the stock pipeline's, picture by picture.
        frechet: Distance to real pictures; None where there are none.
        gate_step: Of the papers' gate; None: it is something else.
        gate_steps: Where a gate that decides itself closed, picture by picture.
    """

    name: str
    error: str | None = None
    arithmetic: float = math.nan
    psnr: Estimate | None = None
    ssim: Estimate | None = None
    scores: Mapping[str, Estimate] = field(default_factory=dict)
    to_stock: Estimate | None = None
    frechet: float | None = None
    gate_step: int | None = None
    gate_steps: tuple[int, ...] = ()

    @property
    def speed_up(self) -> float:
        """How many times less arithmetic it does than the stock run."""
        return 1 / self.arithmetic


@dataclass(frozen=True)
class Report:
    """All rows, the stock pipeline's first.

    Args:
        settings: How they were drawn.
        deciding: Name of the score that the frontier is of.
        rows: One for each way.
    """

    settings: Mapping[str, Any]
    deciding: str
    rows: tuple[Row, ...]

    def frontier(self) -> list[Row]:
        """The rows that no other beats in the deciding score with as little arithmetic, the cheapest first."""
        best, chosen = -math.inf, []
        for row in sorted(self._measured(), key=lambda row: (row.arithmetic, -self.score(row))):
            if self.score(row) > best:
                best = self.score(row)
                chosen.append(row)
        return chosen

    def gate_step(self) -> int | None:
        """The gate step that the frontier suggests: that of the largest score less half of the arithmetic.

        A per cent of the stock pipeline's arithmetic must buy half a point. What a gate loses is taken to fall
        exponentially with its step, fitted to all gates by least squares: single shares are noisy. None: fewer than
        three were drawn.
        """
        gates = {row.gate_step: row for row in self._measured() if row.gate_step is not None}
        if len(gates) < 3:
            return None
        losses = {step: self.score(self.rows[0]) - self.score(row) for step, row in gates.items()}

        def fit(rate: float) -> tuple[float, float]:
            """The sum of squares that is left, and the loss at step 0."""
            size = sum(loss * rate**step for step, loss in losses.items()) / sum(rate ** (2 * step) for step in losses)
            return sum((loss - size * rate**step) ** 2 for step, loss in losses.items()), size

        rate = min((hundredth / 100 for hundredth in range(30, 100)), key=fit)
        _, size = fit(rate)
        return min(gates, key=lambda step: size * rate**step + gates[step].arithmetic / 2)

    def score(self, row: Row) -> float:
        """The deciding score of a row."""
        return row.scores[self.deciding].mean

    def _measured(self) -> list[Row]:
        return [row for row in self.rows if row.error is None]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"frontier": [row.name for row in self.frontier()], "gate_step": self.gate_step()}

    def __str__(self) -> str:
        on_frontier = self.frontier()
        measured = self._measured()
        names = list(measured[0].scores)
        has_frechet = any(row.frechet is not None for row in measured)
        heading = ["", "arithmetic", *names, "to stock", "PSNR, dB", "SSIM", *["Fréchet"] * has_frechet, ""]
        lines = [tuple(heading)]
        for row in measured:
            scores = [self._shown(row, name) for name in names]
            lines.append(
                (
                    row.name,
                    f"{row.speed_up:.2f}x less",
                    *scores,
                    "" if row.to_stock is None else row.to_stock.shown(1, 100),
                    "" if row.psnr is None else row.psnr.shown(1),
                    "" if row.ssim is None else f"{row.ssim.mean:.3f}",
                    *(["" if row.frechet is None else f"{row.frechet:.2f}"] * has_frechet),
                    "on the frontier" if row in on_frontier else "",
                )
            )
        failures = [f"{row.name}: {row.error}" for row in self.rows if row.error is not None]
        closings = [
            f"{row.name}: the gate closed at step {median_low(row.gate_steps)}, the middle of "
            f"{min(row.gate_steps)} to {max(row.gate_steps)}"
            for row in measured
            if row.gate_steps
        ]
        suggested = self.gate_step()
        suggestion = (
            f"gate step {suggested}: of the papers' gates, the largest fitted score less half of the arithmetic"
        )
        notes = [*([] if suggested is None else [suggestion]), *closings, *failures]
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        return "\n".join([settings, "", format_table(lines), "", *notes]).rstrip()

    def _shown(self, row: Row, name: str) -> str:
        score = row.scores[name]
        return score.shown(1, 100) if name == self.deciding else f"{score.mean * 100:.1f}"


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
        handle = next(iter(handles_on(denoisers_of(pipe)[0])), None)
        for start in range(0, count, batch_size):
            chunk = slice(start, min(start + batch_size, count))
            kwargs = arguments(chunk) | changes
            pictures.append(pipe(**kwargs, output_type="pt").images.cpu().float())
            if handle is not None and handle.config.gate_step == "auto":
                gate_steps.append(handle.gate.closes_at or kwargs["num_inference_steps"])
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
    frechet: Callable[[Tensor], float] | None = None,
) -> tuple[Row, ...]:
    """Draw every way and measure it beside the first, the stock pipeline; a way that fails says why.

    Args:
        all_ways: The stock pipeline's first.
        draw_way: Draws one.
        score: Gives the scores of pictures, told the stock pictures too, by name: `(count,)` each, a boolean or a
            number for every picture.
        deciding: The score whose differences to the stock pipeline's are estimated.
        frechet: Distance of pictures to real ones; None: there are none.
    """
    stock = draw_way(all_ways[0])
    stock_scores = score(stock.pictures, stock.pictures)
    rows = [_row(all_ways[0], stock, stock.macs, stock_scores, frechet)]
    for way in all_ways[1:]:
        try:
            drawn = draw_way(way)
        except MissingPackageError as error:
            rows.append(Row(way.name, str(error)))
            continue
        except Exception as error:  # a peer may fail in any way, and the others go on
            rows.append(Row(way.name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"))
            continue
        scores = score(drawn.pictures, stock.pictures)
        rows.append(
            replace(
                _row(way, drawn, stock.macs, scores, frechet),
                psnr=estimate(likeness.psnr(drawn.pictures, stock.pictures)),
                ssim=estimate(likeness.ssim(drawn.pictures, stock.pictures)),
                to_stock=estimate(scores[deciding].double() - stock_scores[deciding].double()),
            )
        )
    return tuple(rows)


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
        call_kwargs: Of the pipeline's call, such as `guidance_scale`.

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
    with tqdm(total=len(chosen) * len(prompts), desc="drawing", unit="picture") as bar:
        rows = compare(chosen, lambda way: draw(pipe, way, len(prompts), arguments, bar=bar), score, deciding)
    settings = {
        "pipeline": type(pipe).__name__,
        "scheduler": type(pipe.scheduler).__name__,
        "steps": num_inference_steps,
        "prompts": len(prompts),
        "seed": seed,
        **{name: value for name, value in call_kwargs.items() if isinstance(value, int | float | str)},
    }
    return Report(settings, deciding, rows)


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


def plot(report: Report, path: Path) -> None:
    """The deciding score against arithmetic, the frontier drawn, as a picture that stands alone.

    Raises:
        MissingPackageError: `matplotlib` is not installed.
    """
    figure = new_figure(10, 6.5)
    axes = figure.subplots()
    frontier = report.frontier()
    axes.step(
        [row.arithmetic for row in frontier],
        [report.score(row) for row in frontier],
        where="post",
        color=GREY,
        label="frontier",
    )
    for prefix, (colour, marker, label) in KINDS.items():
        rows = [row for row in report.rows if row.error is None and _kind(row) == prefix]
        if not rows:
            continue
        estimates = [row.scores[report.deciding] for row in rows]
        spread = [[max(0, e.mean - e.low) for e in estimates], [max(0, e.high - e.mean) for e in estimates]]
        axes.errorbar(
            [row.arithmetic for row in rows],
            [e.mean for e in estimates],
            yerr=spread,
            fmt=marker,
            color=colour,
            elinewidth=0.6,
            label=label,
        )
    for row in report.rows:
        if row.error is None and _kind(row) in NAMED_IN_PLOTS:
            axes.annotate(
                row.name, (row.arithmetic, report.score(row)), (4, -11), textcoords="offset points", fontsize=7
            )
    least = min(report.score(row) for row in report.rows if row.error is None)
    axes.set_ylim(bottom=max(least - 0.02, 0.75 * max(map(report.score, frontier))))
    axes.set_xlabel("arithmetic of the denoiser, as a part of the stock pipeline's")
    axes.set_ylabel(f"{report.deciding}, with 95% intervals")
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items())
    axes.set_title(f"What each way costs in its pictures: {settings}", fontsize=9, loc="left", wrap=True)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


KINDS = {  # by how a way's name begins: colour, marker, label
    "stock": ("#111111", "*", "stock"),
    "gate step": (BLUE, "o", "the gate, at each step"),
    "look": ("#1b8a5a", "D", "the gate, with looks"),
    "guidance dropped": ("#d9a441", "x", "control: guidance dropped, cross-attention computed"),
    "fewer steps": (RED, "s", "fewer steps"),
    "": ("#7d5ba6", "^", "others, and with them"),
}
NAMED_IN_PLOTS = ("stock", "look", "fewer steps", "")


def _kind(row: Row) -> str:
    return next(prefix for prefix in KINDS if row.name.startswith(prefix))
