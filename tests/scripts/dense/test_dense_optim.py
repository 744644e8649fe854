"""The rate of scripts/train_dense.py at each update."""

import pytest
from dense_data import boxes, write_data

from dense.args import parse_args
from dense.optim import rate_factor


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images a split, as boxes, polygons and masks."""
    return write_data(tmp_path_factory.mktemp("coco"), train=4, val=4)


def test_rate_of_1x_falls_at_epochs_8_and_11(data):
    args = parse_args([*boxes(data), "--warmup-steps", "50"])
    factor = rate_factor(args, total=1200, updates_per_epoch=100)
    assert factor(0) == pytest.approx(0.001)
    assert [factor(update) for update in (50, 799, 800, 1099, 1100)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def test_poly_rate_ends_at_zero(data):
    args = parse_args([*boxes(data), "--sched", "poly", "--warmup-steps", "1"])
    factor = rate_factor(args, total=100, updates_per_epoch=10)
    assert [factor(update) for update in (50, 100)] == pytest.approx([0.5**0.9, 0.0])
