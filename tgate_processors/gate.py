"""The gate for a denoising loop of your own, without a pipeline."""

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
    """Gate for a network in a denoising loop of your own. For a pipeline, use `apply_tgate`.

        gate = Gate(TGateConfig(gate_step=10))
        unet.set_attn_processor(gated_processors(unet, gate))
        run = gate.start(num_inference_steps=25, guidance=True)
        for t in timesteps:
            sample, text = run.fold(torch.cat([latents, latents])), run.fold(torch.cat([negative, positive]))
            negative_noise, positive_noise = run.unfold(unet(sample, t, text).sample).chunk(2)
            ...  # guide, and step the scheduler
            run.advance()
        unet.set_attn_processor(ungated_processors(unet))

    The gate does not intercept the calls of the network, so every call from `start` to the end of the run belongs to
    the run. In each step call the network once, or several times in the same order.

    Args:
        config: The gate's settings.

    Attributes:
        config: The gate's settings.
        layers: The gated layers, which `gated_processors` fills in.
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
        """Begin a run at step 0. If the last run was not finished, this ends it.

        Args:
            num_inference_steps: Number of steps in the run.
            guidance: Whether the loop does classifier-free guidance on a batch of two halves `[negative, positive]`.
                If it does no guidance, or calls the network once for each branch, pass False. The gate then only
                reuses attention.

        Raises:
            ConfigError: An argument has a value that is not allowed.
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
    """A run of a denoising loop of your own, from `Gate.start`.

    Attributes:
        step: Current step, 0-based.
        closed: Whether the run is in its fidelity-improving phase.
        gate_step: First step after the gate, as far as it is known.
        cache_bytes: Number of bytes of attention output that the run keeps now.
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
        self._rows = 2 if guidance else 1  # in units of one branch
        self._begin_step()

    def fold(self, tensor: Tensor) -> Tensor:
        """Return the rows of a batch `[negative, positive]` to denoise in this step: all, or those of one branch.

        Args:
            tensor: Tensor `(2 * batch, ...)`, such as the noisy sample or the embeddings of the prompts.
        """
        return self._part.strategy.half(tensor, self._call.mode.phase) if self._call.folded else tensor

    def unfold(self, output: Tensor) -> Tensor:
        """Return both branches of the network's output, `(2 * batch, ...)`, in every step.

        If the step denoised one branch, the other branch is equal to it. In a run with looks it differs by the kept
        guidance.

        Args:
            output: Output of the network.
        """
        return cast(Tensor, self._part.guided_output(self._call, output))

    def advance(self) -> None:
        """Go to the next step. After the last step the run is over and frees what it stored.

        Raises:
            StateError: The run is already over.
        """
        if self.is_over:
            raise StateError("`advance` was called after the end of the run. Call `gate.start` for another run.")
        self._part.keep(self._call, self._layers.end())
        self.move_to(self.position + 1)
        if not self.is_over:
            self._begin_step()

    def stop(self) -> None:
        """End the run before its last step. It frees what it stored, and the layers only compute."""
        if not self.is_over:
            self._layers.end()
        super().stop()

    def _begin_step(self) -> None:
        self._call = Call(0, self._rows)
        self._call.has_halves = self._rows == 2
        self._part.plan(self._call)
        self._layers.begin(**self._part.settings(self._call))
