"""When attention is computed, stored and reused: pure data, no torch, no state.

The method is T-GATE's (Zhang et al. 2024, arXiv 2404.02747v1, and Liu et al. 2025, arXiv 2404.02747v2). A run of
`num_inference_steps` steps (0-based) is a semantics-planning phase up to `gate_step - 1` and a
fidelity-improving phase from `gate_step` on.
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
LEAST_CHANGES_FOR_AUTO = 2  # one small change is none
LEAST_STEPS_FOR_AUTO = LEAST_CHANGES_FOR_AUTO + 3  # a change needs two steps; then one stores, and one gains


@dataclass(frozen=True)
class TGateConfig:
    """How a run is gated.

    Args:
        gate_step: Number of steps in the semantics-planning phase: a count of at least 1, a fraction of the run
            between 0 and 1, or `"auto"`, with which each run closes its gate when its own cross-attention has
            converged. With a count at or past the number of steps the gate never closes: with `sp_interval=1` that
            is the plain pipeline.
        sp_interval: In the planning phase self-attention is computed on every `sp_interval`-th step after
            `warm_up` and reused between; 1 computes it on every step.
        fi_interval: The same for the fidelity-improving phase. The papers find any value but 1 destructive.
        warm_up: Steps at the start on which self-attention is always computed.
        branch: Which branch of classifier-free guidance is denoised after the gate. `None` takes the
            pipeline family's: `"negative"` as the original, `"positive"` for Stable Video Diffusion; with
            `look_interval` it takes `"positive"`.
        look_interval: After the gate, every `look_interval`-th step looks at the text again: it is computed as before
            the gate. Between two looks one branch goes on, and the guidance of the last look is kept; it fades as fast
            as the looks have seen it fade. At least 2; None is the papers' method, which drops guidance and does not
            look again.
        guidance_start: First step, 0-based, with guidance: a count, or a fraction of the run, below `gate_step`. The
            steps before it denoise the positive branch alone. With `gate_step` it makes a guidance interval
            (Kynkäänniemi et al. 2024, arXiv 2404.07724).
        tolerance: With `gate_step="auto"`: the relative change of cross-attention's output in a twenty-fifth of the
            run, between 0 and 1, under which it has converged. `measure_convergence` shows a model's own.
        offload_cache: Keep stored outputs in the host's memory: for those at their device's limit, since each step
            after the gate then waits for them.

    Raises:
        ConfigError: An argument breaks its rule.
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
        """The settings that are not the defaults."""
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in changed)

    @property
    def reuses_self_attention(self) -> bool:
        """Whether any run can reuse self-attention."""
        return self.sp_interval > 1 or self.fi_interval > 1

    def require_known_gate_step(self) -> None:
        """Raise `ConfigError` where it is left to the run."""
        if self.gate_step == "auto":
            raise ConfigError(
                '`gate_step` must be a count or a fraction where nothing is run, got "auto", which a run decides. '
                "Pass for example `gate_step=0.4`."
            )

    def schedule(self, num_inference_steps: int, *, guidance: bool = True) -> "Schedule":
        """The modes of a run of `num_inference_steps` steps; print it for a table."""
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
    """The mode of every step of a run. Indexes and iterates as a tuple of `StepMode`; prints as a table.

    Args:
        config: The gate's settings.
        num_inference_steps: Number of steps that are run, at least 1.
        guidance: Whether the run has two branches of classifier-free guidance, one of which is dropped.
        closes_at: What a run with `gate_step="auto"` has decided; None: nothing yet.

    Attributes:
        gate_step: The first step, 0-based, after the gate; the number of steps or more where it does not close.
        guidance_start: The first step, 0-based, with guidance.

    Raises:
        ConfigError: `num_inference_steps` is no whole number of at least 1, or too few for `gate_step="auto"`, or
            guidance would begin after the gate.
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
        """Whether anything in a step depends on the run's doing guidance."""
        looks = self.config.look_interval is not None
        return looks or step <= self.guidance_start or step >= self.gate_step - 1

    def _mode(self, step: int, num_inference_steps: int) -> StepMode:
        if step < self.guidance_start and self.guidance:
            return StepMode.UNGUIDED
        # Nothing is stored that no later step reads: whatever comes next stores anew unless it reuses.
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
                f"{num_inference_steps}: there is no time to measure. Pass a count, for example `gate_step=1`."
            )
        return num_inference_steps
    return max(1, _steps(config.gate_step, num_inference_steps))


def _steps(value: int | float, num_inference_steps: int) -> int:
    """A count, or a fraction of the run, as a count."""
    return round(value * num_inference_steps) if isinstance(value, float) else value
