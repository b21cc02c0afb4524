"""Count the cost of a gated run of an architecture, and of the stock run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from tgate_processors import _deepcache as deepcache
from tgate_processors._cost import NetworkCost
from tgate_processors._layers import cross_attention_layers
from tgate_processors._modes import StepMode
from tgate_processors._record import Evaluation
from tgate_processors._tables import Shown, Table
from tgate_processors.measure.architectures import Architecture
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class RunCost(Shown):
    """Cost of a gated run and of the stock run, for one picture.

    Args:
        steps: Number of denoising steps.
        stock_macs, gated_macs: Multiply-accumulates, with attention's matrix products.
        stock_linear_and_conv_macs, gated_linear_and_conv_macs: Multiply-accumulates of Linear and Conv layers alone,
            as in the original's table.
        parameters: Number of parameters of the denoiser.
        parameters_without_gated: Number of parameters without those of the cross-attention layers.
        cache_bytes: Peak size of the stored attention outputs, in half precision.
    """

    steps: int
    stock_macs: int
    gated_macs: int
    stock_linear_and_conv_macs: int
    gated_linear_and_conv_macs: int
    parameters: int
    parameters_without_gated: int
    cache_bytes: int

    @property
    def ratio(self) -> float:
        """Arithmetic of the stock run over that of the gated run."""
        return self.stock_macs / self.gated_macs

    def as_dict(self) -> dict[str, float]:
        """Return the fields and the ratio."""
        return asdict(self) | {"ratio": self.ratio}

    def _parts(self) -> Iterator[Table]:
        stock, gated = self.stock_macs, self.gated_macs
        stock_lc, gated_lc = self.stock_linear_and_conv_macs, self.gated_linear_and_conv_macs
        yield Table(
            [
                (f"{self.steps} steps, one picture", "stock", "gated", "ratio"),
                ("TMACs, with attention's products", *_tera(stock, gated), f"{self.ratio:.3f}"),
                ("TMACs, Linear and Conv only", *_tera(stock_lc, gated_lc), f"{stock_lc / gated_lc:.3f}"),
                ("parameters", f"{self.parameters:,}", f"{self.parameters_without_gated:,} after the gate", ""),
                ("cache in half precision", "", f"{self.cache_bytes / 2**20:.1f} MiB", ""),
            ]
        )


def run_cost(known: Architecture, config: TGateConfig, *, cache_interval: int | None = None) -> RunCost:
    """Count a run on the meta device, with this library's gated processors.

    Args:
        known: Architecture, such as `architecture` returns.
        config: Settings of the gate.
        cache_interval: Interval of DeepCache (branch 0), in both runs. None for runs without DeepCache.

    Raises:
        ConfigError: An argument breaks its rule, or `config` has `gate_step="auto"`.
        MissingPackageError: `cache_interval` is given and DeepCache is not installed.
    """
    config.require_known_gate_step()
    model = known.build()
    helper = None if cache_interval is None else deepcache.make_helper(None, cache_interval, 0)
    batch = 2 if known.guidance else 1
    schedule = config.schedule(known.steps, guidance=known.guidance)
    folded = [known.guidance and mode.phase.has_one_branch for mode in schedule.modes]
    # steps at which a gate makes DeepCache begin a new interval
    starts = [
        step
        for step, mode in enumerate(schedule.modes)
        if step == 0 or mode.cross_attention.stores or folded[step] != folded[step - 1]
    ]
    gated = [
        Evaluation(mode, 1 if folded[step] else batch, _is_shallow(step, starts, cache_interval))
        for step, mode in enumerate(schedule.modes)
    ]
    stock = [
        Evaluation(StepMode.PLANNING, batch, _is_shallow(step, [0], cache_interval)) for step in range(known.steps)
    ]
    network = NetworkCost(model, [known.inputs(model)], helper)
    stock_cost, gated_cost = network.of(stock), network.of(gated)
    parameters = _count_parameters(model)
    cross = sum(map(_count_parameters, cross_attention_layers(model).values()))
    return RunCost(
        steps=known.steps,
        stock_macs=stock_cost.macs,
        gated_macs=gated_cost.macs,
        stock_linear_and_conv_macs=stock_cost.linear_and_conv_macs,
        gated_linear_and_conv_macs=gated_cost.linear_and_conv_macs,
        parameters=parameters,
        parameters_without_gated=parameters - cross,
        cache_bytes=network.peak_cache_bytes(gated) // 2,  # counted in single precision
    )


def _is_shallow(step: int, starts: list[int], cache_interval: int | None) -> bool:
    if cache_interval is None:
        return False
    return (step - max(start for start in starts if start <= step)) % cache_interval != 0


def _count_parameters(module: Any) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _tera(*macs: int) -> tuple[str, ...]:
    return tuple(f"{value / 1e12:.3f}" for value in macs)
