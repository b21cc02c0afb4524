import os


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub

import pytest
import torch


torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
