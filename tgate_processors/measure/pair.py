"""Draw one prompt with the stock and with the gated pipeline, and measure what the gate saves and changes."""

import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tgate_processors._modes import Phase
from tgate_processors._pipelines import denoisers_of, takes_callback
from tgate_processors.errors import ConfigError
from tgate_processors.handle import apply_tgate, check_can_apply
from tgate_processors.measure import likeness
from tgate_processors.measure.convergence import Convergence, measure_convergence, plot_curve
from tgate_processors.measure.plotting import PALE, new_figure
from tgate_processors.measure.quality import one_by_one
from tgate_processors.measure.samplers import sampler_on
from tgate_processors.schedule import TGateConfig
from tgate_processors.summary import Summary


Tell = Callable[[float, str], object]  # takes the share of a run that is done, and the run's name


@dataclass(frozen=True)
class Asked:
    """Request for a picture, which both pipelines draw.

    Args:
        prompt: What the picture shows.
        num_inference_steps: Number of denoising steps.
        call: Other arguments of the pipeline's call, such as `guidance_scale`.
        sampler: Key of `SAMPLERS`. None for the pipeline's own sampler.
        seed: Seed of the noise that the picture starts from.
    """

    prompt: str
    num_inference_steps: int
    call: Mapping[str, Any]
    sampler: str | None = None
    seed: int = 0


@dataclass(frozen=True, eq=False)  # `==` of tensors gives no single truth value
class Stock:
    """Run of the stock pipeline.

    Args:
        asked: Request for the picture.
        picture: Picture that it drew, `(1, 3, height, width)` in 0..1.
        seconds: Time of the run.
        convergence: How its cross-attention converged. None if it could not be measured.
    """

    asked: Asked
    picture: Tensor
    seconds: float
    convergence: Convergence | None


@dataclass(frozen=True, eq=False)
class Pair:
    """Run of the gated pipeline, with the stock pipeline's run to compare it with.

    Args:
        stock: Run of the stock pipeline.
        config: Settings of the gate.
        picture: Picture that the gated pipeline drew, `(1, 3, height, width)` in 0..1.
        seconds: Time of the gated run.
        summary: Summary of the gated run.
        notes: Warnings that the library gave.
    """

    stock: Stock
    config: TGateConfig
    picture: Tensor
    seconds: float
    summary: Summary
    notes: tuple[str, ...]

    @property
    def psnr(self) -> float:
        """Likeness to the stock picture, in dB.

        Raises:
            MissingPackageError: `torchmetrics` is not installed.
        """
        return float(likeness.psnr(self.picture, self.stock.picture))

    @property
    def ssim(self) -> float:
        """Structural similarity to the stock picture, at most 1.

        Raises:
            MissingPackageError: `torchmetrics` is not installed.
        """
        return float(likeness.ssim(self.picture, self.stock.picture))

    def plot(self) -> Any:
        """Return a figure of the stock run's convergence and of this gate. None if no convergence was measured.

        Raises:
            MissingPackageError: `matplotlib` is not installed.
        """
        convergence, schedule = self.stock.convergence, self.summary.schedule
        if convergence is None or schedule is None:
            return None
        figure = new_figure(6.4, 4.6)  # readable on a phone too
        axes = figure.subplots()
        after = range(schedule.gate_step, len(schedule))
        looks = [step for step in after if schedule[step].phase is Phase.PLANNING]
        for look in looks:
            axes.axvline(look, color=PALE, linewidth=1, label="looks" if look == looks[0] else None)
        axes.axvline(schedule.gate_step, color="black", label=f"this gate: {schedule.gate_step}")
        plot_curve(convergence, axes, TGateConfig.tolerance)
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.get_legend().remove()  # in a short run it would cover the lines
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
        return figure


def draw_pair(
    pipe: Any, asked: Asked, config: TGateConfig, *, last: Stock | None = None, tell: Tell = lambda *_: None
) -> Pair:
    """Draw a prompt with the stock and with the gated pipeline.

    Args:
        pipe: Pipeline that makes images, without a gate.
        asked: Request for the picture.
        config: Settings of the gate.
        last: Earlier run of the stock pipeline, which is used again if its request was the same.
        tell: Function that is called after every evaluation of the denoiser.

    Raises:
        ConfigError: An argument breaks its rule.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """
    check_can_apply(pipe, config)  # before the stock run, which takes long
    with sampler_on(pipe, asked.sampler):
        stock = last if last is not None and last.asked == asked else _draw_stock(pipe, asked, tell)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always", UserWarning)
            with apply_tgate(pipe, config) as tgate:
                callback = {"callback_on_step_end": tgate} if takes_callback(pipe) else {}
                picture, seconds = _timed(pipe, asked, "gated run", tell, callback)
        notes = [str(warning.message) for warning in warned if warning.category is UserWarning]
        return Pair(stock, config, picture, seconds, tgate.summary(), tuple(dict.fromkeys(notes)))


def _draw_stock(pipe: Any, asked: Asked, tell: Tell) -> Stock:
    # this comes first, to warm up the pipeline before the stock run is timed
    try:
        with _telling(pipe, "convergence", tell):
            convergence = measure_convergence(
                pipe,
                [asked.prompt],
                num_inference_steps=asked.num_inference_steps,
                seed=asked.seed,
                **asked.call,
            )
    except ConfigError:  # too few steps, or no cross-attention
        convergence = None
    return Stock(asked, *_timed(pipe, asked, "stock run", tell, {}), convergence)


def _timed(
    pipe: Any, asked: Asked, name: str, tell: Tell, changes: Mapping[str, Any]
) -> tuple[Tensor, float]:  # (1, 3, height, width), seconds
    arguments = one_by_one([asked.prompt], asked.num_inference_steps, asked.seed, asked.call)(slice(0, 1))
    with _telling(pipe, name, tell):
        started = time.perf_counter()
        picture = pipe(**arguments, **changes, output_type="pt").images.cpu().float()
        return picture, time.perf_counter() - started


@contextmanager
def _telling(pipe: Any, name: str, tell: Tell) -> Iterator[None]:
    """Call `tell` after every evaluation of the denoisers, by hooks, because PixArt's pipelines take no callback."""
    done = 0

    def evaluated(*_: Any) -> None:
        nonlocal done
        done += 1
        tell(min(1.0, done / len(pipe.scheduler.timesteps)), name)

    hooks = [denoiser.register_forward_hook(evaluated) for denoiser in denoisers_of(pipe)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
