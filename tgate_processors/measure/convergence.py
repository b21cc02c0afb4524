"""Measure how a model's cross-attention converges over a run, as in the papers' figure 2, and suggest a gate step."""

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
    """Change of cross-attention's outputs from one step to the next, in the stock pipeline.

    Args:
        changes: Relative change `|output - output before| / |output before|`, scaled to a twenty-fifth of the run, of
            the branch of guidance that changed most: `(prompts, steps - 1, layers)`.
        layers: Names of the layers.
        settings: Settings of the measurement.
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
        """Number of denoising steps in a run."""
        return self.changes.shape[1] + 1

    def median(self) -> Tensor:
        """Return the median change over layers and prompts, `(steps - 1,)`."""
        return self.changes.transpose(0, 1).flatten(1).median(1).values

    def band(self) -> tuple[Tensor, Tensor]:
        """Return the two quartiles over layers of the median change over prompts, `(steps - 1,)` each."""
        by_layer = self.changes.median(0).values
        return by_layer.quantile(0.25, 1), by_layer.quantile(0.75, 1)

    def gate_steps(self, tolerance: float = TGateConfig.tolerance) -> list[int]:
        """Return the step at which `gate_step="auto"` closes the gate, for each prompt.

        If the gate does not close, this is the number of steps.

        Args:
            tolerance: Change under which cross-attention counts as converged, between 0 and 1.

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
        """Return the median of the prompts' gate steps.

        Args:
            tolerance: Change under which cross-attention counts as converged, between 0 and 1.

        Raises:
            ConfigError: `tolerance` is not between 0 and 1.
        """
        return median_low(self.gate_steps(tolerance))

    def save(self, path: str | Path) -> None:
        """Write the changes to a safetensors file, with the layers and the settings as its metadata.

        Raises:
            OSError: The file cannot be written.
        """
        metadata = {"layers": json.dumps(self.layers), "settings": json.dumps(self.settings)}
        # not `save_file`, which raises no OSError, and which replaces a link at `path` by a file
        Path(path).write_bytes(save({"changes": self.changes.contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Convergence":
        """Read what `save` wrote.

        Raises:
            ConfigError: There is no such file, or it holds something else.
        """
        if not Path(path).is_file():
            raise ConfigError(f"`path` must be a file that `save` wrote, got {str(path)!r}: no file. Pass a file.")
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
                f"`path` must be a file that `save` wrote, got {str(path)!r} with something else ({fault}). "
                "Pass another file, or measure again."
            )
        return cls(changes, tuple(layers), settings)


def _fault_in(changes: Tensor, layers: Any, settings: Any) -> str | None:
    """Return what in the content `save` cannot have written. None if nothing is wrong."""
    if changes.dtype not in (torch.float32, torch.float64) or changes.ndim != 3 or not changes.numel():
        return f"changes of {changes.dtype} and shape {tuple(changes.shape)}"
    if not (changes.isfinite() & (changes >= 0)).all():
        return "changes that are negative or not finite"
    if not _are_words(layers) or len(layers) != changes.shape[2]:
        return f"no names of {changes.shape[2]} layers"
    return _fault_in_settings(settings, len(changes))


def _fault_in_settings(settings: Any, count: int) -> str | None:
    """Return what is wrong in the settings that the suggestion and the plot read. None if nothing is."""
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

    After Ctrl-C the record covers the prompts that are done.

    Args:
        pipe: Pipeline without a gate.
        prompts: Prompts to draw.
        num_inference_steps: Number of denoising steps, at least 5.
        seed: Seed of the noise. Prompt i starts from the noise of `seed + i`.
        call_kwargs: Arguments of the pipeline's call, such as `guidance_scale`.

    Raises:
        ConfigError: `prompts` is empty, there are too few steps, or the pipeline has no cross-attention to measure.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already, or does not evaluate all of its cross-attention in each step.
    """
    require_prompts(prompts)
    config = TGateConfig(gate_step="auto")
    config.schedule(num_inference_steps)  # raises if these are too few
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
            "`pipe` must evaluate all of its cross-attention in every step to be measured, got steps that do not. "
            "Disable whatever skips layers, such as DeepCache."
        )
    return Convergence(torch.tensor(changes), layers, settings | {"prompts": list(prompts[: len(changes)])})


@dataclass(frozen=True)
class Suggestion:
    """Gate step that a measured convergence suggests.

    Args:
        gate_step: Median of the prompts' gate steps.
        num_inference_steps: Number of steps in the run.
        gate_steps: Gate step of each prompt.
        tolerance: Change under which cross-attention counts as converged.
        changes: Median change in each step from the second on, `(steps - 1,)`.
        macs_saved: Share of the stock pipeline's arithmetic that a run with this gate step saves, 0 to 1.
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
                f"no gate step: for the median of {len(self.gate_steps)} prompts the change does not stay under "
                f"{self.tolerance:g}. A larger tolerance closes the gate earlier."
            )
        return (
            f"change of cross-attention since the step before, from step 1 on:\n{changes}\n"
            f"gate step {self.gate_step} of {self.num_inference_steps}: the median of {len(self.gate_steps)} prompts "
            f"({min(self.gate_steps)} to {max(self.gate_steps)}), with tolerance {self.tolerance:g}\n"
            f"saves {self.macs_saved:.1%} of the arithmetic, {1 / (1 - self.macs_saved):.2f}x less\n"
            f"use TGateConfig(gate_step={self.gate_step}), or let each run decide: "
            f'TGateConfig(gate_step="auto", tolerance={self.tolerance:g})'
        )


def suggestion(
    pipe: Any, convergence: Convergence, tolerance: float = TGateConfig.tolerance, **call_kwargs: Any
) -> Suggestion:
    """Return the gate step that a convergence suggests, and what it saves in a run of the first prompt.

    Args:
        pipe: Pipeline that was measured.
        convergence: Measured convergence.
        tolerance: Change under which cross-attention counts as converged, between 0 and 1.
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
    """Return what a record tells of a pipeline: its class, its scheduler's class, and plain arguments of its call."""
    plain = {name: value for name, value in call_kwargs.items() if isinstance(value, int | float | str)}
    return {"pipeline": type(pipe).__name__, "scheduler": type(pipe.scheduler).__name__, **plain}


def require_prompts(prompts: Sequence[str]) -> None:
    """Raise `ConfigError` unless `prompts` is a list of at least one prompt."""
    if isinstance(prompts, str) or not prompts:
        raise ConfigError(f"`prompts` must be a list of at least one prompt, got {prompts!r}. Pass a list.")


def plot_convergence(convergence: Convergence, path: Path, *, tolerance: float = TGateConfig.tolerance) -> None:
    """Plot the median change with its band over layers, and a map of layers by steps, to a file.

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
    """Plot the median change with its band over layers, and the gate step, if the tolerance gives one."""
    gate_steps = convergence.gate_steps(tolerance)
    steps = range(1, convergence.num_inference_steps)
    axes.fill_between(steps, *convergence.band(), color="#cfdceb", label="middle half of the layers")
    axes.plot(steps, convergence.median(), color=BLUE, label="median of layers and prompts")
    axes.axhline(tolerance, color=GREY, linestyle=":", label=f"tolerance {tolerance:g}")
    if median_low(gate_steps) < convergence.num_inference_steps:
        span = f" ({min(gate_steps)} to {max(gate_steps)})" if len(gate_steps) > 1 else ""
        label = f"suggested gate step: {median_low(gate_steps)}{span}"
        axes.axvline(median_low(gate_steps), color=RED, linestyle="--", label=label)
    axes.set_ylabel("relative change of the output\nin a twenty-fifth of the run")
    axes.set_ylim(bottom=0)
    axes.legend(framealpha=1, edgecolor="white", loc="upper right")  # lines end at its edge
    axes.spines[["top", "right"]].set_visible(False)
