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


def pytest_collection_modifyitems(items):
    """Where tests share the pipeline of an entry, its `subject`, those of one entry follow one another."""
    files = {path: at for at, path in enumerate(dict.fromkeys(item.path for item in items))}

    def place(item):
        shares = hasattr(item.module, "subject") and hasattr(item, "callspec")
        return files[item.path], str(item.callspec.params.get("name", "")) if shares else ""

    items.sort(key=place)
