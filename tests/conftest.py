import os


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach for a hub

import pytest
import torch
from hypothesis import settings


torch.set_num_threads(1)
settings.register_profile("machines differ in speed", deadline=None)
settings.load_profile("machines differ in speed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
