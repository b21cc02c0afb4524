"""Find the cheapest settings within a budget, for any model, sampler and prompts."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from diffusers.utils import pt_to_pil
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from tgate_processors._tables import Shown, Table, format_settings
from tgate_processors._validation import require_whole
from tgate_processors.errors import ConfigError
from tgate_processors.handle import check_can_apply
from tgate_processors.measure import likeness, ways
from tgate_processors.measure.convergence import described, require_prompts
from tgate_processors.measure.interruption import keeping
from tgate_processors.measure.intervals import estimate
from tgate_processors.measure.quality import OWN, draw, one_by_one, part_of
from tgate_processors.measure.samplers import sampler_on
from tgate_processors.measure.sheet import sheet
from tgate_processors.schedule import TGateConfig


LEAST_STEPS = 3
MOST_PICTURES = 6  # in a row
# settings to try: the plain gate at these shares of the run, and looks at (share of the run, interval)
GATES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
LOOKS = ((0.08, 6), (0.08, 4), (0.12, 4), (0.12, 3), (0.12, 2), (0.2, 5), (0.24, 4), (0.24, 3), (0.4, 6), (0.4, 3))


@dataclass(frozen=True, eq=False)  # `==` of tensors gives no single truth value
class Tried:
    """Measurements of one setting.

    Args:
        config: Settings of the gate.
        arithmetic: Multiply-accumulates of the denoiser, as a share of the stock run's.
        psnr: Likeness (PSNR) of each picture to the stock picture in dB, `(count,)`.
        pictures: Pictures drawn with the setting, `(count, 3, height, width)` in 0..1.
    """

    config: TGateConfig
    arithmetic: float
    psnr: Tensor
    pictures: Tensor

    @property
    def mean_psnr(self) -> float:
        """Mean likeness in dB, by which settings are chosen."""
        return float(self.psnr.mean())

    @property
    def python(self) -> str:
        """Line of Python that gates a pipeline with this setting."""
        return f"tgate = apply_tgate(pipe, TGateConfig({self.config}))"

    def as_dict(self) -> dict[str, Any]:
        return {"python": self.python, "arithmetic": self.arithmetic, "psnr": asdict(estimate(self.psnr))}


@dataclass(frozen=True)
class Tuning(Shown):
    """The settings that were tried, and the budget.

    Args:
        settings: Settings of the measurement.
        stock: Stock pictures, `(count, 3, height, width)` in 0..1.
        tried: Settings that were tried, the cheapest first.
        psnr: Budget: least mean likeness to the stock pictures, in dB. None if there is no limit.
        arithmetic: Budget: largest arithmetic, as a share of the stock run's. None if there is no limit.
    """

    settings: dict[str, Any]
    stock: Tensor
    tried: Sequence[Tried]
    psnr: float | None = None
    arithmetic: float | None = None

    def keeps(self, one: Tried) -> bool:
        """Return whether a setting is within the budget."""
        is_like = self.psnr is None or one.mean_psnr >= self.psnr
        return is_like and (self.arithmetic is None or one.arithmetic <= self.arithmetic)

    @property
    def chosen(self) -> Tried | None:
        """Cheapest setting within the budget. None if there is none.

        If the budget has no likeness, this is the setting within it whose pictures are nearest to stock.
        """
        kept = [one for one in self.tried if self.keeps(one)]
        if self.psnr is None:
            return max(kept, key=lambda one: one.mean_psnr, default=None)
        return min(kept, key=lambda one: (one.arithmetic, -one.mean_psnr), default=None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "budget": {"psnr": self.psnr, "arithmetic": self.arithmetic},
            "tried": [one.as_dict() | {"keeps": self.keeps(one)} for one in self.tried],
            "chosen": None if self.chosen is None else self.chosen.as_dict(),
        }

    def __repr__(self) -> str:
        chosen = "none" if self.chosen is None else self.chosen.config
        return f"{type(self).__name__}({len(self.tried)} settings tried, chosen: {chosen})"

    def _parts(self) -> Iterable[str | Table]:
        lines = [
            (
                str(one.config),
                f"{one.arithmetic:.2f}",
                estimate(one.psnr).shown(1),
                "chosen" if one is self.chosen else "within" if self.keeps(one) else "",
            )
            for one in self.tried
        ]
        heading = ("setting", "arithmetic", "PSNR to stock, dB", "budget")
        return [format_settings(self.settings), "", Table([heading, *lines]), "", self._advice()]

    def _advice(self) -> str:
        if self.chosen is not None:
            return self.chosen.python
        nearest = max(self.tried, key=lambda one: one.mean_psnr)
        return (
            f"no setting is within the budget ({self.budget}): the cheapest does {self.tried[0].arithmetic:.2f} of "
            f"the arithmetic, the nearest to stock has {nearest.mean_psnr:.1f} dB"
        )

    @property
    def budget(self) -> str:
        """Budget in words."""
        parts = [f"at least {self.psnr:g} dB"] if self.psnr is not None else []
        parts += [f"at most {self.arithmetic:g} of the arithmetic"] if self.arithmetic is not None else []
        return ", ".join(parts)

    def pictures(self, prompts: Sequence[str]) -> Image.Image:
        """Return a sheet with the stock pictures above those of the chosen setting.

        If none is chosen, it shows the setting whose pictures are nearest to stock.
        """
        shown = self.chosen or max(self.tried, key=lambda one: one.mean_psnr)
        rows = [pt_to_pil(pictures[:MOST_PICTURES] * 2 - 1) for pictures in (self.stock, shown.pictures)]
        return sheet(
            rows,
            title=f"The stock pipeline and TGateConfig({shown.config}): {shown.arithmetic:.0%} of the arithmetic",
            settings=format_settings(self.settings),
            rows=("stock", "gated"),
            columns=prompts[:MOST_PICTURES],
        )


def tune(
    pipe: Any,
    prompts: Sequence[str],
    *,
    num_inference_steps: int,
    psnr: float | None = None,
    arithmetic: float | None = None,
    sampler: str | None = None,
    seed: int = 0,
    **call_kwargs: Any,
) -> Tuning:
    """Draw a few prompts with the stock pipeline and with each setting, and choose a setting, with a progress bar.

    After Ctrl-C the choice is among the settings that are done.

    Args:
        pipe: Pipeline that makes images, without a gate.
        prompts: Prompts to draw.
        num_inference_steps: Number of denoising steps, at least 3.
        psnr: Budget: least mean likeness to the stock pictures, in dB. `psnr` or `arithmetic` must be given.
        arithmetic: Budget: largest arithmetic of the denoiser, as a share of the stock run's, between 0 and 1.
        sampler: Key of `SAMPLERS`. None for the pipeline's own sampler.
        seed: Seed of the noise. Prompt i starts from the noise of `seed + i`.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: `prompts` is empty, no budget is given, or an argument breaks its rule.
        MissingPackageError: `torchmetrics` or `scipy` is not installed.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """
    require_prompts(prompts)
    require_whole("num_inference_steps", num_inference_steps, least=LEAST_STEPS)
    require_budget(psnr, arithmetic)
    configs = candidates(pipe, num_inference_steps)

    arguments = one_by_one(prompts, num_inference_steps, seed, call_kwargs)
    tried: list[Tried] = []
    total = (1 + len(configs)) * len(prompts)
    with sampler_on(pipe, sampler), tqdm(total=total, desc="drawing", unit="picture", disable=None) as bar:
        settings = described(pipe, call_kwargs) | {"sampler": sampler or OWN, "steps": num_inference_steps}
        settings |= {"prompts": len(prompts), "seed": seed}
        stock = draw(pipe, ways.stock(), len(prompts), arguments, bar=bar)
        with keeping(tried, settings):
            for config in configs:
                drawn = draw(pipe, ways.gated(config, ""), len(prompts), arguments, bar=bar)
                like = likeness.psnr(drawn.pictures, stock.pictures)
                tried.append(Tried(config, drawn.macs / stock.macs, like, drawn.pictures))
    return Tuning(settings, stock.pictures, sorted(tried, key=lambda one: one.arithmetic), psnr, arithmetic)


def require_budget(psnr: float | None, arithmetic: float | None) -> None:
    """Raise `ConfigError` unless a budget is given and its numbers are in range."""
    if psnr is None and arithmetic is None:
        raise ConfigError(
            "`psnr` or `arithmetic` must be given, got neither. Pass for example `psnr=32`, for at least 32 dB to the "
            "stock pictures, or `arithmetic=0.66`, for at most this share of the stock run's arithmetic."
        )
    if psnr is not None and not (isinstance(psnr, int | float) and psnr > 0):
        raise ConfigError(f"`psnr` must be a positive number of dB, got {psnr!r}. Pass for example 32.")
    if arithmetic is not None and not (isinstance(arithmetic, int | float) and 0 < arithmetic <= 1):
        raise ConfigError(
            f"`arithmetic` must be a share of the stock run's, between 0 and 1, got {arithmetic!r}. "
            "Pass for example 0.66."
        )


def candidates(pipe: Any, num_inference_steps: int) -> list[TGateConfig]:
    """Return the settings to try: the plain gate, and looks if the pipeline can have them.

    Raises:
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """

    plain = [TGateConfig(gate_step=step) for step in sorted({part_of(num_inference_steps, share) for share in GATES})]
    check_can_apply(pipe, plain[0])
    pairs = sorted({(part_of(num_inference_steps, share), interval) for share, interval in LOOKS})
    looks = [TGateConfig(gate_step=step, look_interval=interval) for step, interval in pairs]
    # in a short run several settings may give the same schedule
    different = {config.schedule(num_inference_steps).modes: config for config in looks if _takes(pipe, config)}
    return [*plain, *different.values()]


def _takes(pipe: Any, config: TGateConfig) -> bool:
    try:
        check_can_apply(pipe, config)
    except ConfigError:  # it has no guidance that looks could keep
        return False
    return True
