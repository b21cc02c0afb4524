"""The gate for a denoising loop of one's own, without a pipeline."""

from typing import cast

from torch import Tensor

from tgate_processors._clock import StepClock
from tgate_processors._gated_layers import GatedLayers
from tgate_processors._guidance import Halves, Whole
from tgate_processors._validation import require_whole
from tgate_processors._watch import watched_layers
from tgate_processors.errors import ConfigError, StateError
from tgate_processors.run import Call, Part, Run
from tgate_processors.schedule import TGateConfig


class Gate:
    """Gates the layers of a network in a denoising loop of your own; `apply_tgate` does it for a pipeline.

        gate = Gate(TGateConfig(gate_step=10))
        unet.set_attn_processor(gated_processors(unet, gate))
        run = gate.start(num_inference_steps=25, guidance=True)
        for t in timesteps:
            sample, text = run.fold(torch.cat([latents, latents])), run.fold(torch.cat([negative, positive]))
            negative_noise, positive_noise = run.unfold(unet(sample, t, text).sample).chunk(2)
            ...  # guide, and step the scheduler
            run.advance()
        unet.set_attn_processor(ungated_processors(unet))

    Nobody stands around the calls of such a network, so from `start` to the end of the run every call is one of the
    run's. In each step the network is called once, or several times in the same order.

    Args:
        config: The gate's settings.

    Attributes:
        config: The gate's settings.
        layers: The gated layers; `gated_processors` fills them in.
        run: The run that was started last, if any.
    """

    def __init__(self, config: TGateConfig) -> None:
        if not isinstance(config, TGateConfig):
            raise ConfigError(f"`config` must be a TGateConfig, got {config!r}. Pass `TGateConfig(gate_step=10)`.")
        self.config = config
        self.layers = GatedLayers()
        self.run: LoopRun | None = None

    def __repr__(self) -> str:
        return f"Gate({self.config}): {len(self.layers)} layers, {self.run or 'no run'}"

    def start(self, num_inference_steps: int, *, guidance: bool) -> "LoopRun":
        """Begin a run at its step 0; a run that was not finished ends.

        Args:
            num_inference_steps: Number of steps in the run.
            guidance: Whether the loop does classifier-free guidance on a batch of two halves `[negative, positive]`.
                Without, and where each branch is a call of its own, nothing but cross-attention is left out.

        Raises:
            ConfigError: An argument breaks its rule.
            StateError: No layer is gated.
        """
        require_whole("num_inference_steps", num_inference_steps, least=1)
        if not isinstance(guidance, bool):
            raise ConfigError(
                f"`guidance` must be True or False, got {guidance!r}. Pass True for a batch `[negative, positive]`."
            )
        if not len(self.layers):
            raise StateError(
                "`start` was called before any layer was gated. "
                "Call `unet.set_attn_processor(gated_processors(unet, gate))` first."
            )
        if self.run is not None:
            self.run.stop()
        self.run = LoopRun(self.config, num_inference_steps, self.layers, guidance=guidance)
        return self.run


class LoopRun(Run):
    """A run of a loop of one's own, from `Gate.start`.

    Attributes:
        step: The step that it is in, 0-based.
        closed: Whether it is in its fidelity-improving phase.
        gate_step: The first step after the gate, as far as it is known.
        cache_bytes: Bytes of attention output kept now.
    """

    def __init__(self, config: TGateConfig, num_steps: int, layers: GatedLayers, *, guidance: bool) -> None:
        super().__init__(config, StepClock(num_steps))
        self._layers = layers
        looks = config.look_interval is not None
        branch = config.branch or ("positive" if looks else "negative")
        strategy = Halves(branch, looks=looks) if guidance else Whole()
        names = list(layers.cross_attention)
        watched = tuple(names[i] for i in watched_layers(len(names))) if config.gate_step == "auto" else ()
        self._part = self.parts[layers] = Part(self, layers, strategy, watched=watched)
        self._rows = 2 if guidance else 1  # in proportion to one branch
        self._begin_step()

    def fold(self, tensor: Tensor) -> Tensor:
        """The rows of a batch `[negative, positive]` that are denoised in this step: all, or those of one branch.

        Args:
            tensor: `(2 * batch, ...)`, such as the noisy sample or the embeddings of the prompts.
        """
        return self._part.strategy.half(tensor, self._call.mode.phase) if self._call.folded else tensor

    def unfold(self, output: Tensor) -> Tensor:
        """Both branches of the network's output, `(2 * batch, ...)`, whatever was denoised.

        Where one branch was, the other one is equal to it, or differs by the guidance that was kept at the last look.
        """
        return cast(Tensor, self._part.guided_output(self._call, output))

    def advance(self) -> None:
        """Go to the next step. Past the last one the run is over and what it stored is freed.

        Raises:
            StateError: The run is over.
        """
        if self.is_over:
            raise StateError("`advance` was called after the end of the run. Call `gate.start` for another one.")
        self._part.keep(self._call, self._layers.take_out())
        self.move_to(self.position + 1)
        if not self.is_over:
            self._begin_step()

    def stop(self) -> None:
        """End the run before its last step: the layers only compute, and what is stored is freed."""
        if not self.is_over:
            self._layers.take_out()
        super().stop()

    def _begin_step(self) -> None:
        self._call = Call(0, self._rows)
        self._call.has_halves = self._rows == 2
        self._part.plan(self._call)
        self._layers.put_in(**self._part.settings(self._call))
