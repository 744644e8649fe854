from functools import lru_cache
from pathlib import Path

import pytest
import torch

from fdconv_zoo.layers import fdw

# Half of a model's construction is this sort, and tests construct the same layers over and over.
band_index = lru_cache(maxsize=32)(fdw.band_index)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With pytest-xdist, one process runs all tests of a file of scripts/: they share training runs and pages."""
    scripts = Path(__file__).parent / "scripts"
    for item in items:
        if scripts in item.path.parents:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session", autouse=True)
def sort_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fdw, "band_index", lambda *args: band_index(*args).clone())
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
