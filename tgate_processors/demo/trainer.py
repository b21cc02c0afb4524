"""The training loop of the embedded models, which can be resumed and repeated, in one process or in several.

Step `n` of a run draws all random numbers from `step_generator(seed, purpose, n)`, so a run that was stopped and
resumed gives the same weights. Under `torchrun` each process takes its share of every batch.
"""

import argparse
import copy
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from tqdm import tqdm


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Length and speed of a training. A step is one update of the weights, on one whole batch."""

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    warm_up: int = 200  # steps
    decay: float = 0.25  # share of the steps, at the end, over which the rate falls to zero
    averaging: float = 0.999  # share of the averaged weights that each step keeps
    save_every: int = 250  # steps

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}; pass a positive number.")

    def rate(self, step: int) -> float:
        """Return the learning rate of a 0-based step. Before the decay it does not depend on `steps`."""
        rising = min(1.0, (step + 1) / self.warm_up)
        falling = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * rising * falling


class Trainer:
    """Training of a network.

    Use the weights of `averaged` afterwards, which are a moving average of the trained ones.

    Args:
        network: Network to train.
        loss: Function of a step and its generator that returns the mean loss of this process's share of a batch.
        settings: Length and speed of the training.
        checkpoint: File to resume from and to save to.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[[int, torch.Generator], Tensor],
        settings: Settings,
        checkpoint: Path,
    ) -> None:
        self.network, self.loss, self.settings, self.checkpoint = network, loss, settings, checkpoint
        self.averaged = copy.deepcopy(network).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        self.step = 0
        if checkpoint.is_file():
            self._load()

    def run(self, until: int | None = None) -> None:
        """Train from the checkpoint to step `until`, or to the end."""
        until = self.settings.steps if until is None else min(until, self.settings.steps)
        bar = tqdm(
            total=self.settings.steps,
            initial=self.step,
            desc=self.checkpoint.stem,
            disable=rank() > 0,
            mininterval=10,
        )
        recent = 0.0
        while self.step < until:
            loss = self._update()
            recent = loss if not recent else 0.98 * recent + 0.02 * loss
            bar.set_postfix(loss=f"{recent:.4f}", refresh=False)
            bar.update()
            if self.step % self.settings.save_every == 0 or self.step == until:
                self._save()
        bar.close()

    def _update(self) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step)
        loss = self.loss(self.step, step_generator(self.settings.seed, self.checkpoint.stem, self.step))
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        _share_gradients(self.network)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        # early averages forget fast, or the untrained weights would stay in them
        keep = min(self.settings.averaging, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - keep)

    def _save(self) -> None:
        if rank() > 0:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("network", "averaged", "optimizer")}
        # written to another file and then moved, so that a stop in between leaves the old checkpoint whole
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"step": self.step, **state}, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.step = state["step"]
        for name in ("network", "averaged", "optimizer"):
            getattr(self, name).load_state_dict(state[name])


def add_options(parser: argparse.ArgumentParser, *, steps: int | None, batch: int, learning_rate: float) -> None:
    """Add the options that all trainings have, with the defaults of this one."""
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and trained weights")
    parser.add_argument("--steps", type=int, default=steps, help="number of training steps")
    parser.add_argument("--until", type=int, help="stop after this many steps, to be resumed later")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of each process")


@contextmanager
def processes(device: str, threads: int) -> Iterator[None]:
    """While the context lasts, connect the processes that `torchrun` started. Without it, this process is alone."""
    torch.set_num_threads(threads)
    if "RANK" in os.environ:  # set by torchrun
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def step_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """Return the generator of one step, on the CPU, so that every device has the same random numbers."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}/{step}".encode()))


def rank() -> int:
    """Return the number of this process, or 0 if it is the only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def share(values: Tensor) -> Tensor:
    """Return this process's rows of a batch."""
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    return values[rank() :: count]


def _share_gradients(network: nn.Module) -> None:
    """Replace the gradients of each process by their mean, with one message."""
    if not distributed.is_initialized():
        return
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(joined)
    joined /= distributed.get_world_size()
    pieces = torch.split(joined, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
