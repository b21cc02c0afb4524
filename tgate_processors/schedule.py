"""The settings of a gate, and the mode of each step of a run. This is pure data, without torch and without state.

The method is T-GATE's (Zhang et al. 2024, arXiv 2404.02747v1, and Liu et al. 2025, arXiv 2404.02747v2). A run of
`num_inference_steps` steps, counted from 0, has a semantics-planning phase up to step `gate_step - 1` and a
fidelity-improving phase from step `gate_step` on.
"""

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, fields
from itertools import groupby
from typing import Literal

from tgate_processors._modes import AttentionMode, Phase, StepMode
from tgate_processors._tables import Shown, Table
from tgate_processors._validation import require_tolerance, require_whole
from tgate_processors.errors import ConfigError


Branch = Literal["negative", "positive"]
GateStep = int | float | Literal["auto"]
LEAST_CHANGES_FOR_AUTO = 2  # one small change may be chance
LEAST_STEPS_FOR_AUTO = LEAST_CHANGES_FOR_AUTO + 3  # the first change needs two steps; then one step stores, one reuses


@dataclass(frozen=True)
class TGateConfig:
    """Settings of a gate.

    Args:
        gate_step: Number of steps in the semantics-planning phase: a count of at least 1, a fraction of the run
            between 0 and 1, or `"auto"`. With `"auto"` each run closes its gate when its cross-attention has
            converged. With a count at or past the number of steps the gate never closes, and with `sp_interval=1` the
            run is then the stock run.
        sp_interval: Interval, in steps, at which self-attention is computed in the planning phase after `warm_up`. In
            the other steps it is reused. 1 computes it in every step.
        fi_interval: The same interval for the fidelity-improving phase. The papers find any value but 1 destructive.
        warm_up: Last step, 0-based, up to which self-attention is always computed.
        branch: Branch of classifier-free guidance that goes on after the gate. None takes `"negative"`, as in the
            original. It takes `"positive"` for pipelines such as Stable Video Diffusion, with `look_interval`, and if
            the gate drops only guidance.
        look_interval: Interval, in steps, at which a step after the gate is a look: it is computed in full, with both
            branches. Between two looks one branch goes on, and the run keeps the guidance of the last look, which
            fades as fast as the looks have seen it fade. At least 2. None is the papers' method, which has no looks
            and drops guidance.
        guidance_start: First step, 0-based, with guidance: a count, or a fraction of the run, below `gate_step`. The
            steps before it denoise only the positive branch. Together with `gate_step` it makes a guidance interval
            (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        tolerance: Relative change of cross-attention's output in a twenty-fifth of the run, between 0 and 1, under
            which `gate_step="auto"` takes it to have converged. `measure_convergence` measures the changes of a model.
        offload_cache: Whether stored outputs are kept in the host's memory. This is for runs at the limit of their
            device's memory, because each step after the gate then waits for the outputs.

    Raises:
        ConfigError: An argument has a value that is not allowed.
    """

    _: KW_ONLY
    gate_step: GateStep
    sp_interval: int = 1
    fi_interval: int = 1
    warm_up: int = 0
    branch: Branch | None = None
    look_interval: int | None = None
    guidance_start: int | float = 0
    tolerance: float = 0.09
    offload_cache: bool = False

    def __post_init__(self) -> None:
        _require_gate_step(self.gate_step)
        require_whole("sp_interval", self.sp_interval, least=1)
        require_whole("fi_interval", self.fi_interval, least=1)
        require_whole("warm_up", self.warm_up, least=0)
        if self.branch not in (None, "negative", "positive"):
            raise ConfigError(
                f'`branch` must be "negative", "positive" or None, got {self.branch!r}. '
                "Leave it out to denoise the branch that the original denoises."
            )
        if self.look_interval is not None:
            require_whole("look_interval", self.look_interval, least=2)
        _require_guidance_start(self.guidance_start, self.gate_step)
        require_tolerance(self.tolerance)
        if not isinstance(self.offload_cache, bool):
            raise ConfigError(f"`offload_cache` must be True or False, got {self.offload_cache!r}. Pass one of these.")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self})"

    def __str__(self) -> str:
        """Return the settings that differ from the defaults."""
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)

    @property
    def reuses_self_attention(self) -> bool:
        """Whether any run can reuse self-attention."""
        return self.sp_interval > 1 or self.fi_interval > 1

    def require_known_gate_step(self) -> None:
        """Raise `ConfigError` if `gate_step` is `"auto"`, which only a run can decide."""
        if self.gate_step == "auto":
            raise ConfigError(
                '`gate_step` must be a count or a fraction where nothing is run, got "auto", which only a run can '
                "decide. Pass for example `gate_step=0.4`."
            )

    def schedule(self, num_inference_steps: int, *, guidance: bool = True) -> "Schedule":
        """Return the modes of a run, which print as a table.

        Args:
            num_inference_steps: Number of steps in the run.
            guidance: Whether the run has two branches of classifier-free guidance, one of which the gate drops.

        Raises:
            ConfigError: The number of steps does not fit the settings.
        """
        return Schedule(self, num_inference_steps, guidance=guidance)


def _require_gate_step(value: object) -> None:
    if value == "auto" or (isinstance(value, float) and 0 < value < 1):
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(
            f'`gate_step` must be a whole number of at least 1, a fraction between 0 and 1, or "auto", got {value!r}. '
            "Pass for example `gate_step=10`, or `gate_step=0.4` for two fifths of the steps."
        )


def _require_guidance_start(value: object, gate_step: GateStep) -> None:
    if isinstance(value, bool) or not (
        (isinstance(value, int) and value >= 0) or (isinstance(value, float) and 0 <= value < 1)
    ):
        raise ConfigError(
            f"`guidance_start` must be a whole number of at least 0, or a fraction between 0 and 1, got {value!r}. "
            "Pass for example `guidance_start=2`, or leave it out for guidance from the first step on."
        )
    if not isinstance(gate_step, str) and type(value) is type(gate_step) and value >= gate_step:
        raise _begins_after_the_gate(value, gate_step)


def _begins_after_the_gate(guidance_start: object, gate_step: object) -> ConfigError:
    return ConfigError(
        f"`guidance_start` must be below `gate_step`, got {guidance_start!r} with the gate at {gate_step!r}: guidance "
        "would never begin. Pass a smaller one, or a larger `gate_step`."
    )


class Schedule(Shown):
    """The mode of every step of a run.

    A schedule can be indexed and iterated like a tuple of `StepMode`, and prints as a table.

    Args:
        config: The gate's settings.
        num_inference_steps: Number of steps in the run, at least 1.
        guidance: Whether the run has two branches of classifier-free guidance, one of which the gate drops.
        closes_at: First step after the gate, if a run with `gate_step="auto"` has decided it; else None.

    Attributes:
        gate_step: First step after the gate, 0-based. It is the number of steps or more if the gate does not close.
        guidance_start: First step with guidance, 0-based.

    Raises:
        ConfigError: `num_inference_steps` is not a whole number of at least 1, or is too small for
            `gate_step="auto"`, or guidance would begin after the gate.
    """

    def __init__(
        self, config: TGateConfig, num_inference_steps: int, *, guidance: bool = True, closes_at: int | None = None
    ) -> None:
        require_whole("num_inference_steps", num_inference_steps, least=1)
        self.config = config
        self.guidance = guidance
        self.gate_step = _gate_step(config, num_inference_steps) if closes_at is None else closes_at
        self.guidance_start = _steps(config.guidance_start, num_inference_steps)
        if self.guidance_start >= min(self.gate_step, num_inference_steps):
            raise _begins_after_the_gate(self.guidance_start, self.gate_step)
        self.modes = tuple(self._mode(step, num_inference_steps) for step in range(num_inference_steps))

    def __len__(self) -> int:
        return len(self.modes)

    def __getitem__(self, step: int) -> StepMode:
        return self.modes[step]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config}): {len(self)} steps, gate step {self.gate_step}"

    def _parts(self) -> Iterator[Table]:
        rows = [("steps", "phase", "cross-attention", "self-attention", "branches")]
        for mode, steps in groupby(range(len(self)), key=self.modes.__getitem__):
            first, *rest = steps
            branches = "2" if self.guidance and mode.phase is Phase.PLANNING else "1"
            span = f"{first}-{rest[-1]}" if rest else f"{first}"
            rows.append((span, mode.phase.value, mode.cross_attention.value, mode.self_attention.value, branches))
        yield Table(rows)

    def depends_on_guidance(self, step: int) -> bool:
        """Return whether the mode of a step depends on whether the run does guidance."""
        looks = self.config.look_interval is not None
        return looks or step <= self.guidance_start or step >= self.gate_step - 1

    def _mode(self, step: int, num_inference_steps: int) -> StepMode:
        if step < self.guidance_start and self.guidance:
            return StepMode.UNGUIDED
        # A step stores only what the next step reuses. So the last step stores nothing.
        is_last = step + 1 == num_inference_steps
        self_attention = AttentionMode.COMPUTE
        if self._reuses_self(step):
            self_attention = AttentionMode.REUSE
        elif not is_last and self._reuses_self(step + 1):
            self_attention = AttentionMode.STORE
        if step >= self.gate_step and not self._looks(step):
            return StepMode((Phase.FIDELITY, AttentionMode.REUSE, self_attention))
        if step < self.gate_step - 1 or is_last:
            return StepMode((Phase.PLANNING, AttentionMode.COMPUTE, self_attention))
        store = AttentionMode.STORE
        if self.guidance:
            store = AttentionMode.STORE_MEAN if self.config.look_interval is None else AttentionMode.STORE_HALF
        return StepMode((Phase.PLANNING, store, store if self_attention.stores else self_attention))

    def _looks(self, step: int) -> bool:
        interval = self.config.look_interval
        return interval is not None and (step - self.gate_step + 1) % interval == 0

    def _reuses_self(self, step: int) -> bool:
        if step >= self.gate_step:
            if self._looks(step):
                return False
            return step % self.config.fi_interval != 0
        warm_up = max(self.config.warm_up, self.guidance_start if self.guidance else 0)
        return warm_up < step < self.gate_step - 1 and step % self.config.sp_interval != 0


def _gate_step(config: TGateConfig, num_inference_steps: int) -> int:
    if config.gate_step == "auto":
        if num_inference_steps < LEAST_STEPS_FOR_AUTO:
            raise ConfigError(
                f'`num_inference_steps` must be at least {LEAST_STEPS_FOR_AUTO} with `gate_step="auto"`, got '
                f"{num_inference_steps}: too few steps to measure. Pass a count, for example `gate_step=1`."
            )
        return num_inference_steps
    return max(1, _steps(config.gate_step, num_inference_steps))


def _steps(value: int | float, num_inference_steps: int) -> int:
    """Return a number of steps, from a count or from a fraction of the run."""
    return round(value * num_inference_steps) if isinstance(value, float) else value
