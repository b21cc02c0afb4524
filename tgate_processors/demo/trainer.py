"""One loop that trains both halves of the demo model: resumable, repeatable, on one process or several.

Step `n` of a run draws everything random from `step_generator(seed, purpose, n)`, so a run that was stopped
goes on as if it had not been. Under `torchrun` each process takes its share of every batch.
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
    """How long and how fast to learn. Steps count updates of the weights, each on one whole batch."""

    steps: int
    batch: int
    learning_rate: float
    seed: int = 0
    warm_up: int = 200  # steps
    decay: float = 0.25  # the share of the steps at the end over which the rate falls to zero
    averaging: float = 0.999  # how much of the averaged weights each step keeps
    save_every: int = 250  # steps

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}; pass a positive number.")

    def rate(self, step: int) -> float:
        """The learning rate of a 0-based step; before the decay it doesn't depend on `steps`."""
        rising = min(1.0, (step + 1) / self.warm_up)
        falling = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.learning_rate * rising * falling


class Trainer:
    """Trains `network` on `loss(step, generator)`, the mean loss of this process's share of a batch.

    The weights to use afterwards are those of `averaged`, a moving average of the trained ones.
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
        """Trains from the checkpoint on, to `until` steps or to the end."""
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
        loss.backward()  # type: ignore[no-untyped-call]  # of torch
        _share_gradients(self.network)
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return float(loss.detach())

    @torch.no_grad()
    def _average(self) -> None:
        # Early averages forget fast, or the untrained weights would stay in them.
        keep = min(self.settings.averaging, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - keep)

    def _save(self) -> None:
        if rank() > 0:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {name: getattr(self, name).state_dict() for name in ("network", "averaged", "optimizer")}
        # Written beside and moved, so that a stop in the middle leaves the old checkpoint whole.
        partial = self.checkpoint.with_suffix(".partial")
        torch.save({"step": self.step, **state}, partial)
        os.replace(partial, self.checkpoint)

    def _load(self) -> None:
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        self.step = state["step"]
        for name in ("network", "averaged", "optimizer"):
            getattr(self, name).load_state_dict(state[name])


def add_options(parser: argparse.ArgumentParser, *, steps: int | None, batch: int, learning_rate: float) -> None:
    """The options of every training, with its own defaults."""
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and what is learnt")
    parser.add_argument("--steps", type=int, default=steps, help="of training")
    parser.add_argument("--until", type=int, help="stop after this many steps, to go on some other time")
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--learning-rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of each process, on a CPU")


@contextmanager
def processes(device: str, threads: int) -> Iterator[None]:
    """For a while, all processes that `torchrun` started train together; without it, this one alone."""
    torch.set_num_threads(threads)
    if "RANK" in os.environ:  # set by torchrun
        distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    yield
    if distributed.is_initialized():
        distributed.destroy_process_group()


def step_generator(seed: int, purpose: str, step: int) -> torch.Generator:
    """The random numbers of one step, on the CPU so that they are the same on every device."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{purpose}/{step}".encode()))


def rank() -> int:
    """This process's number, 0 when it is the only one."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def share(values: Tensor) -> Tensor:
    """This process's rows of a batch."""
    count = distributed.get_world_size() if distributed.is_initialized() else 1
    return values[rank() :: count]


def _share_gradients(network: nn.Module) -> None:
    """Replaces each process's gradients by their mean, in one message."""
    if not distributed.is_initialized():
        return
    gradients = [weight.grad for weight in network.parameters() if weight.grad is not None]
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(joined)
    joined /= distributed.get_world_size()
    pieces = torch.split(joined, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])
