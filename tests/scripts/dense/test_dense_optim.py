"""The rate of scripts/train_dense.py at each update."""

import math

import pytest
import torch
import yaml
from dense_data import boxes, write_data
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    PolynomialLR,
)
from train_runs import SCRIPTS

from dense.args import build_parser, parse_args
from dense.optim import rate_factor

CONFIGS = sorted((SCRIPTS / "configs" / "dense").glob("*.yaml"))


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


def one_weight():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)


def torch_schedule(optimizer, args, total, updates_per_epoch):
    """The same of torch's own schedulers."""
    if args.sched == "multistep":
        milestones = [math.ceil(epoch * updates_per_epoch) for epoch in args.decay_milestones]
        schedule = MultiStepLR(optimizer, milestones, args.decay_rate)
    elif args.sched == "poly":
        schedule = PolynomialLR(optimizer, total, args.poly_power)
    elif args.sched == "cosine":
        schedule = CosineAnnealingLR(optimizer, total)
    else:
        schedule = ConstantLR(optimizer, 1.0)
    warmup = [LinearLR(optimizer, args.warmup_factor, total_iters=args.warmup_steps)] if args.warmup_steps else []
    return ChainedScheduler([schedule, *warmup])


RECIPES = [pytest.param(yaml.safe_load(config.read_text()), id=config.stem) for config in CONFIGS]
RECIPES += [{"sched": "cosine", "warmup_steps": 100}, {"sched": "constant"}]


@pytest.mark.parametrize("recipe", RECIPES)
def test_rate_is_that_of_torchs_schedulers_at_every_update(recipe):
    args = build_parser().parse_args([])
    vars(args).update(recipe)
    # accumulation leaves half an update
    total, updates_per_epoch = 1806, 150.5
    factor = rate_factor(args, total, updates_per_epoch)
    optimizer = one_weight()
    schedule = torch_schedule(optimizer, args, total, updates_per_epoch)
    for update in range(total + 1):
        assert factor(update) == pytest.approx(optimizer.param_groups[0]["lr"], rel=0, abs=1e-7), update
        optimizer.step()
        schedule.step()


def test_resumed_run_with_more_steps_has_the_rates_of_the_longer_run():
    args = build_parser().parse_args(["--sched", "poly", "--warmup-steps", "0"])
    first = one_weight()
    schedule = LambdaLR(first, rate_factor(args, total=10, updates_per_epoch=5))
    for _ in range(10):
        first.step()
        schedule.step()
    assert first.param_groups[0]["lr"] == 0
    second = one_weight()
    longer = LambdaLR(second, rate_factor(args, total=20, updates_per_epoch=5))
    second.load_state_dict(first.state_dict())
    longer.load_state_dict(schedule.state_dict())
    second.step()
    longer.step()
    assert second.param_groups[0]["lr"] == pytest.approx((1 - 11 / 20) ** 0.9)
