"""Under `torch.compile` each distinct mode is one graph, and a second run makes none."""

import pytest
import torch
from tiny import tiny
from torch._dynamo.utils import counters

from tgate_processors import TGateConfig, apply_tgate


@pytest.mark.parametrize(
    ("config", "graphs"),
    [
        (TGateConfig(gate_step=5), 3),  # planning, closing, fidelity
        (TGateConfig(gate_step=5, sp_interval=3, warm_up=1), 5),  # and storing and reusing self-attention
    ],
)
def test_graphs(config, graphs):
    torch._dynamo.reset()
    counters.clear()
    subject = tiny("sd")
    with apply_tgate(subject.pipe, config) as tgate:
        eager = subject(tgate)
    subject.pipe.unet = torch.compile(subject.pipe.unet, backend="eager", fullgraph=True)
    tgate = apply_tgate(subject.pipe, config)
    for _ in range(2):
        assert torch.equal(subject(tgate), eager)
    assert counters["stats"]["unique_graphs"] == graphs
