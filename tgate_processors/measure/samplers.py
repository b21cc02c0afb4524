"""Samplers by the names that people call them: which scheduler of diffusers each is, and with which settings."""

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
    """The pipeline draws with a sampler while the context lasts; None: with the scheduler that it has.

    The sampler takes the noise levels, the spacing of the steps and the kind of prediction from that scheduler.

    Args:
        pipe: A pipeline.
        name: A key of `SAMPLERS`.

    Raises:
        ConfigError: There is no sampler of this name, or the pipeline's model cannot be drawn with it.
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
    # Video models of flow matching have a UniPC whose noise levels no other sampler would take from it.
    if not kinds or own.config.get("prediction_type") == "flow_prediction":
        raise ConfigError(
            f"`sampler` must suit the pipeline's {type(own).__name__}, got {name!r}. Leave it out, for the pipeline's "
            "own."
        )
    return kinds[0].from_config(own.config, **settings)
