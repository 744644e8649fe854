"""Scripts import their siblings by plain names, as `python scripts/x.py` lets them; the tests do the same."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small models are slower with more threads than one, the more so beside the processes that the tests start."""
    torch.set_num_threads(1)
