"""How a model's cross-attention converges over a run: the curve of the papers' figure 2, and the gate step in it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from tgate_processors._layers import cross_attention_layers
from tgate_processors._loop import Loop
from tgate_processors._pipelines import denoisers_of, takes_callback
from tgate_processors._tables import Shown, Table
from tgate_processors._validation import require_tolerance
from tgate_processors._watch import has_converged, watched_layers
from tgate_processors.errors import ConfigError, StateError
from tgate_processors.handle import TGate, apply_tgate, check_can_apply
from tgate_processors.measure.interruption import keeping
from tgate_processors.measure.plotting import BLUE, GREY, RED, new_figure
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class Convergence(Shown):
    """How much cross-attention's outputs change from one step to the next in the stock pipeline.

    Args:
        changes: `(prompts, steps - 1, layers)`: `|output - output before| / |output before|`, in a twenty-fifth of
            the run, of the branch of guidance that changed most.
        layers: Names of the layers.
        settings: How it was measured.
    """

    changes: Tensor
    layers: tuple[str, ...]
    settings: dict[str, Any]

    def __repr__(self) -> str:
        prompts, _, layers = self.changes.shape
        return f"{type(self).__name__}({prompts} prompts, {self.num_inference_steps} steps, {layers} layers)"

    def _parts(self) -> Iterator[str | Table]:
        columns = zip(self.median().tolist(), *(edge.tolist() for edge in self.band()), strict=True)
        rows = [(str(step), *(f"{value:.3f}" for value in values)) for step, values in enumerate(columns, 1)]
        yield Table([("step", "change, median", "a quarter", "three quarters"), *rows])

    @property
    def num_inference_steps(self) -> int:
        return self.changes.shape[1] + 1

    def median(self) -> Tensor:
        """`(steps - 1,)`: over layers and prompts."""
        return self.changes.transpose(0, 1).flatten(1).median(1).values

    def band(self) -> tuple[Tensor, Tensor]:
        """`(steps - 1,)` each: the quarter and three-quarter quantiles over layers, of their medians over prompts."""
        by_layer = self.changes.median(0).values
        return by_layer.quantile(0.25, 1), by_layer.quantile(0.75, 1)

    def gate_steps(self, tolerance: float = TGateConfig.tolerance) -> list[int]:
        """Where `gate_step="auto"` closes the gate for each prompt; the number of steps where it does not.

        Raises:
            ConfigError: `tolerance` is not between 0 and 1.
        """
        require_tolerance(tolerance)
        watched = self.changes[:, :, watched_layers(len(self.layers))].tolist()
        return [self._gate_step(changes, tolerance) for changes in watched]

    def _gate_step(self, changes: list[list[float]], tolerance: float) -> int:
        # the change at index i is known after step i + 1; step i + 2 stores
        steps = self.num_inference_steps
        closing = (i + 3 for i in range(len(changes)) if has_converged(changes[: i + 1], steps, tolerance))
        return min(next(closing, steps), steps)

    def gate_step(self, tolerance: float = TGateConfig.tolerance) -> int:
        """The gate step of the middle prompt.

        Raises:
            ConfigError: `tolerance` is not between 0 and 1.
        """
        return median_low(self.gate_steps(tolerance))

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the layers and the settings as its metadata.

        Raises:
            OSError: It cannot be written.
        """
        metadata = {"layers": json.dumps(self.layers), "settings": json.dumps(self.settings)}
        # not `save_file`, whose errors are no OSError, and which puts another file where `path` is a link
        Path(path).write_bytes(save({"changes": self.changes.contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Convergence":
        """Read what `save` wrote.

        Raises:
            ConfigError: There is no such file, or it holds something else.
        """
        if not Path(path).is_file():
            raise ConfigError(f"`path` must be a file that `save` wrote, got {str(path)!r}: no file. Pass one.")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                layers, settings = (json.loads(metadata[name]) for name in ("layers", "settings"))
                changes = file.get_tensor("changes")
            fault = _fault_in(changes, layers, settings)
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            raise ConfigError(
                f"`path` must be a file that `save` wrote, got {str(path)!r} of something else ({fault}). "
                "Pass another, or measure again."
            )
        return cls(changes, tuple(layers), settings)


def _fault_in(changes: Tensor, layers: Any, settings: Any) -> str | None:
    """What no `save` writes; None where nothing is wrong."""
    if changes.dtype not in (torch.float32, torch.float64) or changes.ndim != 3 or not changes.numel():
        return f"changes of {changes.dtype} and shape {tuple(changes.shape)}"
    if not (changes.isfinite() & (changes >= 0)).all():
        return "changes that are no numbers from 0 on"
    if not _are_words(layers) or len(layers) != changes.shape[2]:
        return f"no names of {changes.shape[2]} layers"
    return _fault_in_settings(settings, len(changes))


def _fault_in_settings(settings: Any, count: int) -> str | None:
    """The fault in the settings that the suggestion and the plot read."""
    if not isinstance(settings, dict):
        return "settings that are no object"
    if not _are_words([settings.get("pipeline"), settings.get("scheduler")]):
        return "settings without pipeline and scheduler"
    steps, prompts = settings.get("num_inference_steps"), settings.get("prompts")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        return f"num_inference_steps {steps!r}"
    return None if _are_words(prompts) and len(prompts) == count else f"no {count} prompts"


def _are_words(values: Any) -> TypeGuard[list[str]]:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def measure_convergence(
    pipe: Any, prompts: Sequence[str], *, num_inference_steps: int, seed: int = 0, **call_kwargs: Any
) -> Convergence:
    """Run the stock pipeline for each prompt and measure how its cross-attention changes, with a progress bar.

    Ctrl-C ends it: the record is of the prompts that are done.

    Args:
        pipe: A pipeline, not gated.
        prompts: What to draw.
        num_inference_steps: Denoising steps, at least 5.
        seed: Prompt i starts from the noise of `seed + i`.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: There is no prompt, or too few steps.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already.
    """
    require_prompts(prompts)
    config = TGateConfig(gate_step="auto")
    config.schedule(num_inference_steps)  # says if these are too few
    kwargs: dict[str, Any] = {"num_inference_steps": num_inference_steps, "output_type": "latent"} | call_kwargs
    changes: list[list[list[float]]] = []
    settings = described(pipe, call_kwargs) | {"num_inference_steps": num_inference_steps, "seed": seed}
    callback = kwargs.pop("callback_on_step_end", None)
    check_can_apply(pipe, config)
    with TGate(Loop(pipe, config, watches_all=True), callback) as tgate, keeping(changes, settings):
        if takes_callback(pipe):
            kwargs["callback_on_step_end"] = tgate
        for index, prompt in enumerate(tqdm(prompts, desc="measuring", unit="prompt", disable=None)):
            pipe(prompt, generator=torch.Generator().manual_seed(seed + index), **kwargs)
            changes.append(tgate.changes)
    layers = tuple(cross_attention_layers(denoisers_of(pipe)[0]))
    if {len(row) for rows in changes for row in rows} != {len(layers)}:
        raise StateError(
            "`pipe` must evaluate all of its cross-attention in every step to be measured, got steps without. "
            "Disable what skips layers, such as DeepCache."
        )
    return Convergence(torch.tensor(changes), layers, settings | {"prompts": list(prompts[: len(changes)])})


@dataclass(frozen=True)
class Suggestion:
    """The gate step that a convergence suggests.

    Args:
        gate_step: The gate step of the middle prompt.
        num_inference_steps: Number of steps in the run.
        gate_steps: The gate step of each prompt.
        tolerance: By which they were found.
        changes: `(steps - 1,)`: the median change of each step from the second on.
        macs_saved: The part of the stock pipeline's arithmetic that a run with this gate step saves, 0 to 1.
    """

    gate_step: int
    num_inference_steps: int
    gate_steps: tuple[int, ...]
    tolerance: float
    changes: tuple[float, ...]
    macs_saved: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        changes = " ".join(f"{change:.3f}" for change in self.changes)
        if self.gate_step >= self.num_inference_steps:
            return (
                f"change of cross-attention since the step before, from step 1 on:\n{changes}\n"
                f"it does not stay under {self.tolerance:g} for the middle one of {len(self.gate_steps)} prompts: "
                "no gate step is suggested. A larger tolerance closes earlier."
            )
        return (
            f"change of cross-attention since the step before, from step 1 on:\n{changes}\n"
            f"gate step {self.gate_step} of {self.num_inference_steps}: the middle one of {len(self.gate_steps)} "
            f"prompts stays under {self.tolerance:g} ({min(self.gate_steps)} to {max(self.gate_steps)})\n"
            f"saves {self.macs_saved:.1%} of the arithmetic, {1 / (1 - self.macs_saved):.2f}x less\n"
            f"use TGateConfig(gate_step={self.gate_step}), or for each prompt its own: "
            f'TGateConfig(gate_step="auto", tolerance={self.tolerance:g})'
        )


def suggestion(
    pipe: Any, convergence: Convergence, tolerance: float = TGateConfig.tolerance, **call_kwargs: Any
) -> Suggestion:
    """What the convergence suggests, and what that saves in a run of its first prompt.

    Args:
        pipe: The pipeline that was measured.
        convergence: What was measured.
        tolerance: Under which cross-attention has converged, between 0 and 1.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: `tolerance` is not between 0 and 1.
    """
    settings = convergence.settings
    gate_step = convergence.gate_step(tolerance)
    kwargs: dict[str, Any] = {"num_inference_steps": settings["num_inference_steps"], "output_type": "latent"}
    with apply_tgate(pipe, TGateConfig(gate_step=gate_step)) as tgate:
        if takes_callback(pipe):
            kwargs["callback_on_step_end"] = tgate
        pipe(settings["prompts"][0], **kwargs | call_kwargs)
        saved = tgate.summary().macs_saved
    return Suggestion(
        gate_step,
        convergence.num_inference_steps,
        tuple(convergence.gate_steps(tolerance)),
        tolerance,
        tuple(convergence.median().tolist()),
        saved,
    )


def described(pipe: Any, call_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline and the plain arguments of its call, for a record."""
    plain = {name: value for name, value in call_kwargs.items() if isinstance(value, int | float | str)}
    return {"pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__, **plain}


def require_prompts(prompts: Sequence[str]) -> None:
    """Raise `ConfigError` unless `prompts` is a list of at least one."""
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(f"`prompts` must be a list of at least one prompt, got {prompts!r}. Pass a list.")


def plot_convergence(convergence: Convergence, path: Path, *, tolerance: float = TGateConfig.tolerance) -> None:
    """The median with its band over layers, and a map of layers by steps, as a picture that stands alone.

    Raises:
        ConfigError: `tolerance` is not between 0 and 1.
        MissingPackageError: `matplotlib` is not installed.
    """
    figure = new_figure(9, 7)
    curve, layer_map = figure.subplots(2, 1, height_ratios=[3, 2], sharex=True)
    plot_curve(convergence, curve, tolerance)
    settings = convergence.settings
    curve.set_title(
        f"Cross-attention from step to step: {settings['pipeline']}, {settings['scheduler']}, "
        f"{convergence.num_inference_steps} steps, {len(convergence.changes)} prompts",
        fontsize=10,
        loc="left",
    )
    changes = convergence.changes.median(0).values.T
    image = layer_map.imshow(
        changes,
        aspect="auto",
        cmap="viridis",
        extent=(0.5, convergence.num_inference_steps - 0.5, len(convergence.layers) + 0.5, 0.5),
        vmax=float(changes.quantile(0.95)),
    )
    layer_map.yaxis.get_major_locator().set_params(integer=True)
    layer_map.set_ylabel("layer, in the order\nof attn_processors")
    layer_map.set_xlabel("step")
    figure.colorbar(image, ax=layer_map, extend="max", label="median over prompts")
    figure.savefig(path, dpi=150)


def plot_curve(convergence: Convergence, axes: Any, tolerance: float) -> None:
    """The median with its band over layers, and the gate step that the tolerance gives, if it gives one."""
    gate_steps = convergence.gate_steps(tolerance)
    steps = range(1, convergence.num_inference_steps)
    axes.fill_between(steps, *convergence.band(), color="#cfdceb", label="middle half of the layers")
    axes.plot(steps, convergence.median(), color=BLUE, label="median of layers and prompts")
    axes.axhline(tolerance, color=GREY, linestyle=":", label=f"tolerance {tolerance:g}")
    if median_low(gate_steps) < convergence.num_inference_steps:
        span = f" ({min(gate_steps)} to {max(gate_steps)})" if len(gate_steps) > 1 else ""
        label = f"gate step {median_low(gate_steps)}{span}"
        axes.axvline(median_low(gate_steps), color=RED, linestyle="--", label=label)
    axes.set_ylabel("relative change of the output\nin a twenty-fifth of the run")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right")
    axes.spines[["top", "right"]].set_visible(False)
