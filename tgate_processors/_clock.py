"""Which step an evaluation of the denoiser belongs to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepClock:
    """Which step an evaluation of the denoiser belongs to.

    Steps are counted as `num_inference_steps` counts them. A scheduler of order 2 (Heun, KDPM2) evaluates the
    denoiser twice in a step; PNDM evaluates it `num_warmup_evaluations` times before its first step is over,
    and those do not count (`num_warmup_steps` in the pipelines of diffusers 0.42).

    Args:
        num_evaluations: Length of the denoising loop.
        order: Evaluations in a step.
        num_warmup_evaluations: Evaluations at the start that belong to step 0.
    """

    num_evaluations: int
    order: int = 1
    num_warmup_evaluations: int = 0

    def step(self, evaluation: int) -> int:
        """The step, 0-based, that evaluation `evaluation`, 0-based, belongs to."""
        return max(0, evaluation - self.num_warmup_evaluations) // self.order

    @property
    def num_steps(self) -> int:
        """Number of steps in the run."""
        return self.step(self.num_evaluations - 1) + 1
