"""Benchmark table of the original's documentation, with the settings and the published figures of each row."""

from dataclasses import dataclass

from tgate_processors.measure import ways
from tgate_processors.measure.architectures import architecture
from tgate_processors.measure.run_cost import run_cost
from tgate_processors.measure.ways import Way
from tgate_processors.schedule import TGateConfig


@dataclass(frozen=True)
class PublishedRow:
    """A row of the table.

    Args:
        name: Published name.
        model: Key of `tgate_processors.measure.architectures.ARCHITECTURES`.
        tmacs: Tera multiply-accumulates of a run's Linear and Conv layers.
        parameters: Millions of parameters that a step after the gate uses, or any step of a stock run. None if they
            were not published.
        seconds: Time of a run on a GTX 1080 Ti.
        fid: FID of 10,000 pictures for captions of MS-COCO.
        gate: Settings of the gate. None for a stock run.
        cache_interval: Interval of DeepCache. None for a run without DeepCache.
    """

    name: str
    model: str
    tmacs: float
    parameters: float | None
    seconds: float
    fid: float
    gate: TGateConfig | None = None
    cache_interval: int | None = None

    @property
    def way(self) -> Way:
        """Method that runs a pipeline with the settings of this row."""
        if self.cache_interval is not None:
            return ways.deep_cache(self.cache_interval, self.gate)
        return ways.stock() if self.gate is None else ways.gated(self.gate, f"gate {self.gate}")


_FIVE, _EIGHT, _ONE = TGateConfig(gate_step=5), TGateConfig(gate_step=8), TGateConfig(gate_step=1)
_SDXL_2 = TGateConfig(gate_step=10, sp_interval=5, fi_interval=1, warm_up=2)
_PIXART_2 = TGateConfig(gate_step=15, sp_interval=3, fi_interval=1, warm_up=2)
PUBLISHED = (
    # README of tgate 0.1.2
    PublishedRow("SD-1.5", "sd-1.5", 16.938, 859.520, 7.032, 23.927),
    PublishedRow("SD-1.5 w/ TGATE", "sd-1.5", 9.875, 815.557, 4.313, 20.789, _FIVE),
    PublishedRow("SD-2.1", "sd-2.1", 38.041, 865.785, 16.121, 22.609),
    PublishedRow("SD-2.1 w/ TGATE", "sd-2.1", 22.208, 815.433, 9.878, 19.940, _FIVE),
    PublishedRow("SD-XL", "sdxl", 149.438, 2570, 53.187, 24.628),
    PublishedRow("SD-XL w/ TGATE", "sdxl", 84.438, 2024, 27.932, 22.738, _FIVE),
    PublishedRow("Pixart-Alpha", "pixart-alpha", 107.031, 611.350, 61.502, 38.669),
    PublishedRow("Pixart-Alpha w/ TGATE", "pixart-alpha", 65.318, 462.585, 37.867, 35.825, _EIGHT),
    PublishedRow("DeepCache (SD-XL)", "sdxl", 57.888, None, 19.931, 23.755, None, 3),
    PublishedRow("DeepCache w/ TGATE", "sdxl", 43.868, None, 14.666, 23.999, TGateConfig(gate_step=10), 3),
    PublishedRow("LCM (SD-XL)", "lcm-sdxl", 11.955, 2570, 3.805, 25.044),
    PublishedRow("LCM w/ TGATE", "lcm-sdxl", 11.171, 2024, 3.533, 25.028, _ONE),
    PublishedRow("LCM (Pixart-Alpha)", "lcm-pixart", 8.563, 611.350, 4.733, 36.086),
    PublishedRow("LCM w/ TGATE", "lcm-pixart", 7.623, 462.585, 4.543, 37.048, _ONE),
    # README of tgate 1.0.0, which measured FID with other captions
    PublishedRow("SD-XL w/ TGATE, second version", "sdxl", 95.988, None, 31.643, 22.917, _SDXL_2),
    PublishedRow("Pixart-Alpha w/ TGATE, second version", "pixart-alpha", 73.971, None, 36.650, 36.390, _PIXART_2),
    PublishedRow("Pixart-Sigma", "pixart-sigma", 107.766, None, 60.467, 34.278),
    PublishedRow("Pixart-Sigma w/ TGATE, second version", "pixart-sigma", 74.420, None, 36.449, 32.927, _PIXART_2),
)


def base_of(row: PublishedRow) -> PublishedRow:
    """Return the row that a row is compared with.

    A gated row is compared with the row of the same model and cache without a gate. A row without a gate is compared
    with the model's stock run, which may be the row itself.
    """
    stock = next(other for other in PUBLISHED if other.model == row.model)
    if row.gate is None:
        return stock
    return next(
        r for r in PUBLISHED if r.gate is None and (r.model, r.cache_interval) == (row.model, row.cache_interval)
    )


@dataclass(frozen=True)
class Counted:
    """Counts for a row at full size.

    Args:
        tmacs: Tera multiply-accumulates of Linear and Conv layers, as in the published table.
        tmacs_with_attention: The same plus attention's matrix products.
        parameters: Millions of parameters, as in the published table.
    """

    tmacs: float
    tmacs_with_attention: float
    parameters: float


def count_row(row: PublishedRow) -> Counted:
    """Count a row on the meta device, without weights."""
    known = architecture(row.model)
    config = row.gate or TGateConfig(gate_step=known.steps)
    cost = run_cost(known, config, cache_interval=row.cache_interval)
    parameters = cost.parameters if row.gate is None else cost.parameters_without_gated
    return Counted(cost.gated_linear_and_conv_macs / 1e12, cost.gated_macs / 1e12, parameters / 1e6)
