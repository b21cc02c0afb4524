"""Samplers by their usual names, each with its diffusers scheduler and its settings."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tgate_processors.errors import ConfigError


PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
KARRAS = PLAIN | {"use_karras_sigmas": True}
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "dpm++-2m-karras": ("DPMSolverMultistepScheduler", KARRAS | {"algorithm_type": "dpmsolver++"}),
    "dpm++-2m-sde-karras": ("DPMSolverMultistepScheduler", KARRAS | {"algorithm_type": "sde-dpmsolver++"}),
    "euler": ("EulerDiscreteScheduler", PLAIN),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", PLAIN),
    "unipc": ("UniPCMultistepScheduler", PLAIN),
}


def require_sampler(name: str) -> None:
    """Raise `ConfigError` unless `name` is a key of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise ConfigError(f"`sampler` must be one of {', '.join(SAMPLERS)}, got {name!r}.")


@contextmanager
def sampler_on(pipe: Any, name: str | None) -> Iterator[None]:
    """Let a pipeline draw with a sampler while the context lasts.

    The sampler takes noise levels, spacing of the steps and kind of prediction from the pipeline's own scheduler.

    Args:
        pipe: Pipeline that gets the sampler.
        name: Key of `SAMPLERS`. None for the pipeline's own scheduler.

    Raises:
        ConfigError: There is no sampler of this name, or it does not suit the pipeline.
    """
    own = pipe.scheduler
    if name is not None:
        pipe.scheduler = _scheduler_for(own, name)
    try:
        yield
    finally:
        pipe.scheduler = own


def _scheduler_for(own: Any, name: str) -> Any:
    require_sampler(name)
    class_name, settings = SAMPLERS[name]
    kinds = [kind for kind in getattr(own, "compatibles", []) if kind.__name__ == class_name]
    # video models of flow matching have a UniPC scheduler, whose noise levels no other sampler can take over
    if not kinds or own.config.get("prediction_type") == "flow_prediction":
        raise ConfigError(
            f"`sampler` must suit the pipeline's {type(own).__name__}, got {name!r}. Leave it out to use the "
            "pipeline's own."
        )
    return kinds[0].from_config(own.config, **settings)
