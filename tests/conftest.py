import os


os.environ["HF_HUB_OFFLINE"] = "1"  # no test may use the network

import pytest
import torch
from hypothesis import settings


torch.set_num_threads(1)
settings.register_profile("machines differ in speed", deadline=None)
settings.load_profile("machines differ in speed")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    """Sort the tests that share an entry's pipeline, their fixture `subject`, so that they follow one another."""
    files = {path: at for at, path in enumerate(dict.fromkeys(item.path for item in items))}

    def place(item):
        shares = hasattr(item.module, "subject") and hasattr(item, "callspec")
        return files[item.path], str(item.callspec.params.get("name", "")) if shares else ""

    items.sort(key=place)
