"""The step that an evaluation of the denoiser belongs to."""

from dataclasses import dataclass


@dataclass(frozen=True)
class StepClock:
    """Conversion of evaluations to steps.

    A step is what `num_inference_steps` counts. A scheduler of order 2 (Heun, KDPM2) evaluates the denoiser twice in
    a step. PNDM makes extra warm-up evaluations, which belong to step 0 and do not count as steps
    (`num_warmup_steps` in the pipelines of diffusers 0.42).

    Args:
        num_evaluations: Number of evaluations in the denoising loop.
        order: Number of evaluations in a step.
        num_warmup_evaluations: Number of extra evaluations at the start, which belong to step 0.
    """

    num_evaluations: int
    order: int = 1
    num_warmup_evaluations: int = 0

    def step(self, evaluation: int) -> int:
        """Return the step that an evaluation belongs to. Both count from 0."""
        return max(0, evaluation - self.num_warmup_evaluations) // self.order

    @property
    def num_steps(self) -> int:
        """Number of steps in the run."""
        return self.step(self.num_evaluations - 1) + 1
