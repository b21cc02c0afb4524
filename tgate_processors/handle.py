"""The gate on a pipeline: `apply_tgate` attaches it, and the handle that it returns detaches it."""

import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar

import torch
from diffusers import ModularPipeline

from tgate_processors import _pipelines as pipelines
from tgate_processors._caches import check_drops_no_guidance
from tgate_processors._callers import NotTheLoop
from tgate_processors._deepcache import is_enabled
from tgate_processors._families import Family, Guidance
from tgate_processors._installation import is_gated
from tgate_processors._interception import interceptor_of
from tgate_processors._layers import check_has_cross_attention, check_merges_no_cross_attention, cross_attention_layers
from tgate_processors._loop import Loop
from tgate_processors._network import GatedNetwork
from tgate_processors._tables import Shown, Table
from tgate_processors.errors import ConfigError, StateError, UnsupportedPipelineError
from tgate_processors.presets import PRESETS, preset_name, suitable_preset
from tgate_processors.run import Run
from tgate_processors.schedule import TGateConfig
from tgate_processors.summary import Summary, summarize


Callback = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]


def apply_tgate(
    pipe: Any,
    config: TGateConfig | str | None = None,
    *,
    callback_on_step_end: Callback | None = None,
    deepcache: Any = None,
) -> "TGate":
    """Attach a gate to a diffusers pipeline, whose own `__call__` stays as it is.

        tgate = apply_tgate(pipe)
        image = pipe(prompt, num_inference_steps=25, callback_on_step_end=tgate).images[0]
        tgate.remove()

    Args:
        pipe: A pipeline whose `unet` or `transformer` has cross-attention layers, or one that does guidance, which is
            then all that the gate leaves out. Its ControlNets are gated too.
        config: The gate's settings, or the name of a preset in upper or lower case. None takes the preset that suits
            the pipeline's class, network and scheduler as they are now; `summary()` names it.
        callback_on_step_end: A callback of your own, which the handle calls after every step.
        deepcache: The `DeepCacheSDHelper` that is enabled on the pipeline, if any.

    Returns:
        The handle. Pass it to the pipeline as `callback_on_step_end`. It is also a context manager, which detaches the
        gate at its end.

    Raises:
        ConfigError: `config` is neither settings nor a preset's name, or this pipeline cannot do what it asks for.
        UnsupportedPipelineError: Nothing in the pipeline can be gated.
        StateError: The pipeline is gated already, or has a cache enabled that does not work together with the gate.
    """
    preset = _preset_of(pipe, config)
    settings: Any = config if preset is None else PRESETS[preset].config
    check_can_apply(pipe, settings, deepcache)
    if not pipelines.is_known(pipe):
        warnings.warn(
            f"{type(pipe).__name__} is not among the pipelines that are known to work. If its batch has two equal "
            "halves, the gate takes it for `[negative, positive]`. Compare its pictures with the stock pipeline's.",
            stacklevel=2,
        )
    _warn_of_costs(pipe, settings)
    return TGate(Loop(pipe, settings, deepcache=deepcache), callback_on_step_end, preset)


def _preset_of(pipe: Any, config: object) -> str | None:
    """Return the preset's name that `config` is, or that suits the pipeline; None if `config` has the settings."""
    if isinstance(config, str):
        return preset_name("config", config)
    if config is None:
        pipelines.check_is_not_refused(pipe)
        return suitable_preset(pipe, pipelines.denoisers_of(pipe)[0])
    return None


def _warn_of_costs(pipe: Any, config: TGateConfig) -> None:
    """Warn of settings that cost more with this sampler or kind of network than with others, as measured."""
    scheduler = getattr(pipe, "scheduler", None)
    name = type(scheduler).__name__
    drops_half = pipelines.family_of(pipe).guidance.has_halves
    settings = getattr(scheduler, "config", None)
    is_sde = "sde" in str(getattr(settings, "algorithm_type", ""))
    if drops_half and is_sde and config.look_interval is None:
        warnings.warn(
            f"`look_interval` should be given with an SDE sampler such as this {name}, got None: on the embedded "
            "model the gate without looks loses a tenth of the pictures with such a sampler, and with looks none. "
            'Pass for example `preset("looks")`.',
            stacklevel=3,
        )
    is_ancestral = name == "EulerAncestralDiscreteScheduler"
    is_karras = name == "DPMSolverMultistepScheduler" and getattr(settings, "use_karras_sigmas", False)
    if config.gate_step == "auto" and (is_ancestral or is_karras):
        warnings.warn(
            f'`gate_step` should be a count or a fraction with this {name}, got "auto": its tolerance was found under '
            "DDIM. On the embedded model the gate closes too early under DPM++ 2M Karras, which costs 8 pictures in "
            '100, and hardly ever closes under Euler ancestral. Pass `gate_step=0.4`, or `preset("looks")`.',
            stacklevel=3,
        )
    if config.gate_step == "auto" and not hasattr(pipe, "unet"):
        warnings.warn(
            f"`gate_step` should be a count or a fraction for a transformer, as {type(pipe).__name__} has, got "
            '"auto": its tolerance was found on a UNet. On the embedded PixArt it suggests step 7 of 25, where the '
            "gate loses a third of the pictures. Pass `gate_step=0.6`.",
            stacklevel=3,
        )
    if config.guidance_start and is_ancestral:
        warnings.warn(
            f"`guidance_start` should be 0 with {name}, got {config.guidance_start}: the first steps of this sampler "
            "decide much of the picture. On the embedded model a later start costs 4.7 dB of likeness to the stock "
            "pictures, and only 0.7 dB under DPM++ 2M Karras. Compare your pictures, or leave it out.",
            stacklevel=3,
        )


def check_can_apply(pipe: Any, config: TGateConfig, deepcache: Any = None) -> None:
    """Raise every error that `apply_tgate` has for these settings, before anything is changed."""
    if not isinstance(config, TGateConfig):
        raise ConfigError(
            f"`config` must be a TGateConfig or the name of a preset, got {config!r}. Pass for example "
            '`TGateConfig(gate_step=10)` or `"sdxl"`, or leave it out for the preset that suits the pipeline.'
        )
    pipelines.check_is_not_refused(pipe)
    pipelines.check_guider(pipe)
    family = pipelines.family_of(pipe)
    denoisers = pipelines.denoisers_of(pipe)
    if not any(map(cross_attention_layers, denoisers)):
        _check_can_drop_guidance_alone(pipe, denoisers[0], config, family.guidance)
    _check_has_guidance(pipe, config, family)
    for denoiser in denoisers:
        check_merges_no_cross_attention(denoiser)
        _check_is_free(denoiser, pipe)
        if deepcache is None and is_enabled(denoiser):
            raise StateError(
                "`deepcache` must be the helper that is enabled on the pipeline, got None. "
                "Pass `apply_tgate(pipe, config, deepcache=helper)`, or call `helper.disable()` first."
            )
        check_drops_no_guidance(denoiser)


def _check_can_drop_guidance_alone(
    pipe: Any, denoiser: torch.nn.Module, config: TGateConfig, guidance: Guidance
) -> None:
    """Check that the gate can drop guidance, for a pipeline whose denoisers have no cross-attention of their own."""
    if isinstance(pipe, ModularPipeline) and guidance is Guidance.NONE:
        raise UnsupportedPipelineError(
            f"`pipe` must have a guider, or a denoiser with cross-attention, got a {type(pipe).__name__} without "
            "either: there is nothing to leave out. Run it without T-GATE."
        )
    if not (pipelines.is_known(pipe) and guidance.can_be_dropped):
        check_has_cross_attention(denoiser)
    name = type(denoiser).__name__
    if config.gate_step == "auto":
        raise ConfigError(
            f'`gate_step` must be a count or a fraction for {name}, got "auto": it has no cross-attention of its own '
            "that a run could watch. Pass for example `gate_step=0.4`."
        )
    for argument in ("sp_interval", "fi_interval"):
        if getattr(config, argument) != 1:
            raise ConfigError(
                f"`{argument}` must be 1 for {name}, got {getattr(config, argument)}: its self-attention holds the "
                "text, so the gate drops only guidance. Leave it out."
            )
    if config.branch == "negative":
        raise ConfigError(
            f'`branch` must be "positive" or None for {name}, got "negative": it has no cross-attention of its own '
            "that would hold the prompt after the gate. Leave it out."
        )


def _check_has_guidance(pipe: Any, config: TGateConfig, family: Family) -> None:
    name, guidance = type(pipe).__name__, family.guidance
    if config.look_interval is not None and guidance is Guidance.NONE:
        raise ConfigError(
            f"`look_interval` must be None for {name}, which does no guidance that could be kept between looks, got "
            f"{config.look_interval}. Leave it out."
        )
    if config.guidance_start and family.begins_guided:
        raise ConfigError(
            f"`guidance_start` must be 0 for {name}, whose first step keeps keys and values of both branches for the "
            f"later ones, got {config.guidance_start}. Leave it out."
        )
    if config.guidance_start and guidance in (Guidance.NONE, Guidance.PARTS):
        why = "does no guidance" if guidance is Guidance.NONE else "denoises more than the two branches of guidance"
        raise ConfigError(
            f"`guidance_start` must be 0 for {name}, which {why}, got {config.guidance_start}. Leave it out."
        )


def _check_is_free(denoiser: torch.nn.Module, pipe: Any) -> None:
    loops = loops_on(denoiser)
    if any(loop.pipe is pipe for loop in loops) or (is_gated(denoiser) and not loops):
        raise StateError(
            f"`pipe` must not be gated already, got a gated {type(denoiser).__name__}. "
            "Call `remove()` on the handle of the first `apply_tgate`, then apply again; in a loop of your own set "
            "`ungated_processors(denoiser)`."
        )


def loops_on(denoiser: torch.nn.Module) -> list[Any]:
    """Return the loops of the gated pipelines that evaluate the denoiser."""
    network = interceptor_of(denoiser)
    return list(network.loops) if isinstance(network, GatedNetwork) else []


class TGate(Shown, NotTheLoop):
    """Handle of the gate on a pipeline. Only `apply_tgate` makes it.

    Attributes:
        callback_on_step_end: Your own callback, which the handle calls after every step with the pipeline's arguments.
        preset: Name of the preset in use; None if the settings were given as a `TGateConfig`.
        tensor_inputs: Empty list, which diffusers' `MultiPipelineCallbacks` needs.
    """

    tensor_inputs: ClassVar[list[str]] = []

    def __init__(self, loop: Loop, callback_on_step_end: Callback | None, preset: str | None = None) -> None:
        self.callback_on_step_end = callback_on_step_end
        self.preset = preset
        self._loop = loop
        try:
            for network in loop.networks:
                network.join(loop)
        except BaseException:
            self.remove()
            raise

    @property
    def pipe(self) -> Any:
        """The pipeline."""
        return self._loop.pipe

    @property
    def config(self) -> TGateConfig:
        """The gate's settings."""
        return self._loop.config

    @property
    def gate(self) -> Run:
        """The current run, or the last one, with its `closed`, `step`, `gate_step` and `cache_bytes`."""
        return self._loop.run or Run.of_nothing(self.config)

    @property
    def changes(self) -> list[list[float]]:
        """Relative change of each watched layer's output in each step of the last run, as in `Watch`."""
        return self._loop.changes

    @property
    def _settings(self) -> str:
        return str(self.config) if self.preset is None else f"preset {self.preset} ({self.config})"

    @property
    def _progress(self) -> str:
        return "none yet" if self._loop.run is None else self._loop.run.progress

    @property
    def _where(self) -> str:
        is_on = any(self._loop in network.loops for network in self._loop.networks)
        return f"{'on' if is_on else 'removed from'} {type(self.pipe).__name__}"

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self._where}: {self._settings}; run {self._progress}"

    def _parts(self) -> Iterator[Table]:
        networks = ", ".join(
            f"{type(network.module).__name__}, {len(network.layers)} gated layers" for network in self._loop.networks
        )
        rows = (("gate", self._where), ("settings", self._settings), ("networks", networks), ("run", self._progress))
        yield Table(rows, has_heading=False)

    def __enter__(self) -> "TGate":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __call__(self, pipe: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """Move the gate on after a step. The pipeline calls this as its `callback_on_step_end`."""
        if pipe is not self.pipe:
            raise StateError(
                "`callback_on_step_end` must be the handle of the pipeline that runs, got that of another "
                f"{type(self.pipe).__name__}. Call `apply_tgate` for this {type(pipe).__name__}, and pass its handle."
            )
        self._loop.end_step(step_index, timestep)
        if self.callback_on_step_end is not None:
            callback_kwargs = self.callback_on_step_end(pipe, step_index, timestep, callback_kwargs)
        if getattr(pipe, "interrupt", False):
            self._loop.stop()  # no step follows
        return callback_kwargs

    def remove(self) -> None:
        """Detach the gate. The pipeline has its own processor objects again, and calls are no longer intercepted.

        It is safe to call this twice. A processor that you or another library has set since `apply_tgate` stays, with
        a warning.
        """
        self._loop.stop()
        for network in self._loop.networks:
            network.leave(self._loop)

    def summary(self) -> Summary:
        """Return what the last run did. This raises no error.

        The summary counts the arithmetic when it is first asked for, on the meta device.
        """
        return summarize(self._loop, self._settings)
