"""What the gate advises: on settings before a run, and after a run that saved little or nothing."""

import functools
import logging
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

from tgate_processors import _pipelines as pipelines
from tgate_processors._families import Guidance
from tgate_processors._layers import cross_attention_layers
from tgate_processors.run import Run
from tgate_processors.schedule import TGateConfig


Advice = tuple[str, str]  # its kind, and the message
FEW_STEPS = 8  # in so few steps cross-attention hardly converges before the run is over
logger = logging.getLogger(__name__)


def advice_on_settings(pipe: Any, config: TGateConfig) -> Iterator[str]:
    """Say which settings cost more with this sampler or kind of network than with others, as measured."""
    scheduler = getattr(pipe, "scheduler", None)
    name = type(scheduler).__name__
    drops_half = pipelines.family_of(pipe).guidance.has_halves
    settings = getattr(scheduler, "config", None)
    is_sde = "sde" in str(getattr(settings, "algorithm_type", ""))
    if drops_half and is_sde and config.look_interval is None:
        yield (
            f"`look_interval` should be given with an SDE sampler such as this {name}, got None: on the embedded "
            "model the gate without looks loses a tenth of the pictures with such a sampler, and with looks none. "
            'Pass for example `preset("looks")`.'
        )
    is_ancestral = name == "EulerAncestralDiscreteScheduler"
    if (
        is_ancestral
        and config.look_interval is None
        and not hasattr(pipe, "unet")
        and any(map(cross_attention_layers, pipelines.denoisers_of(pipe)))
    ):
        yield (
            f"`look_interval` should be given with {name} on a transformer, got None: on the embedded PixArt the "
            "papers' gate loses 13 pictures in 100 with this sampler, and `gate_step=0.24, look_interval=6` loses 4. "
            "Pass these, or compare your pictures."
        )
    is_karras = name == "DPMSolverMultistepScheduler" and getattr(settings, "use_karras_sigmas", False)
    if config.gate_step == "auto" and (is_ancestral or is_karras):
        yield (
            f'`gate_step` should be a count or a fraction with this {name}, got "auto": its tolerance was found under '
            "DDIM. On the embedded model the gate closes too early under DPM++ 2M Karras, which costs 8 pictures in "
            '100, and hardly ever closes under Euler ancestral. Pass `gate_step=0.4`, or `preset("looks")`.'
        )
    if config.gate_step == "auto" and not hasattr(pipe, "unet"):
        yield (
            f"`gate_step` should be a count or a fraction for a transformer, as {type(pipe).__name__} has, got "
            '"auto": its tolerance was found on a UNet. On the embedded PixArt it suggests step 7 of 25, where the '
            "gate loses a third of the pictures. Pass `gate_step=0.6`."
        )
    if config.guidance_start and is_ancestral:
        yield (
            f"`guidance_start` should be 0 with {name}, got {config.guidance_start}: the first steps of this sampler "
            "decide much of the picture. On the embedded model a later start costs 4.7 dB of likeness to the stock "
            "pictures, and only 0.7 dB under DPM++ 2M Karras. Compare your pictures, or leave it out."
        )


def advice_after_run(
    run: Run, pipe: Any, changes: Sequence[Sequence[float]], *, drops_guidance_alone: bool
) -> Iterator[Advice]:
    """Say why a completed run saved little or nothing.

    A run that failed or was cancelled gets no advice, because it might have saved something later.

    Args:
        run: The run.
        pipe: Its pipeline.
        changes: Changes of the watched layers in the run, as in `Watch`.
        drops_guidance_alone: Whether the gate drops only guidance in this pipeline.
    """
    config, steps = run.config, run.clock.num_steps
    if run.gate_step >= steps:
        yield "gate_step", _never_closed(config, steps, changes)
    elif drops_guidance_alone:
        if not run.dropped_guidance:
            yield (
                "guidance",
                f"`pipe` should do guidance in this run, got none from the {type(pipe).__name__}: the gate could "
                "leave out nothing else, so it did nothing. Turn guidance on, or run without T-GATE.",
            )
    elif not any(part.saved for part in run.parts.values()):
        yield (
            "saved",
            "`gate_step` should be past the steps in which the latents change their size or batch, or another network "
            f"begins, got {config.gate_step} of {steps}: no stored output fitted the steps after the gate, so the run "
            "saved nothing. Pass a later step, or run without T-GATE.",
        )
    elif not run.dropped_guidance:
        yield from _advice_without_guidance(config, steps, pipe)


def _never_closed(config: TGateConfig, steps: int, changes: Sequence[Sequence[float]]) -> str:
    if config.gate_step == "auto":
        last = f" (it changed by {fmean(changes[-1]):.3f} in the last step)" if changes else ""
        return (
            f'`gate_step` should be a count or a fraction for this run of {steps} steps, got "auto": the gate never '
            f"closed. Cross-attention had not converged{last}, and `tolerance` is {config.tolerance:g}. "
            "Pass `gate_step=0.4`, or a larger `tolerance`."
        )
    advice = "Pass `gate_step=0.4` for two fifths of the steps" if steps > 1 else "Take more steps"
    return (
        f"`gate_step` should be below the number of steps, got {config.gate_step} of {steps}: the gate never closed. "
        f"{advice}, or run without T-GATE."
    )


def _advice_without_guidance(config: TGateConfig, steps: int, pipe: Any) -> Iterator[Advice]:
    guidance = pipelines.family_of(pipe).guidance
    does_guidance = guidance is Guidance.PARTS or pipelines.does_guidance(pipe, guidance)
    if steps <= FEW_STEPS and not does_guidance and not config.reuses_self_attention:
        _say_that_few_steps_gain_little()
    if config.look_interval is not None:
        yield (
            "look_interval",
            f"`look_interval` should be None for a run that drops no guidance, got {config.look_interval}: there is "
            "none to keep between looks. Leave it out.",
        )


@functools.cache
def _say_that_few_steps_gain_little() -> None:
    """Log a warning, once in a process."""
    logger.warning(
        "a run of %d steps or fewer that drops no guidance gains little from T-GATE: for latent-consistency models in "
        "4 steps, its authors report a speed-up of 1.04 to 1.08. On the embedded models, a gate at step 1 of 4 costs "
        "8 points of accuracy (UNet) and 56 (PixArt). `summary()` says what your run saves.",
        FEW_STEPS,
    )
