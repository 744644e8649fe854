"""The examples are imported by plain names, as the scripts are."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Small models are slower with more threads than one."""
    torch.set_num_threads(1)
