"""Optimiser and schedule of a dense model: the backbone's inherited weights apart, a rate for each update."""

import argparse
import math
from collections.abc import Callable
from typing import Any

from timm.optim import create_optimizer_v2, param_groups_weight_decay
from torch import nn
from torch.optim import Optimizer

from common.optim import scaled_learning_rate, undecayed
from fdconv_zoo import modulation_parameters


def parameter_groups(
    model: nn.Module, backbone: nn.Module, weight_decay: float, lr: float, static_lr_scale: float
) -> list[dict[str, Any]]:
    """timm's groups (no decay for biases, norms and what the model's parts name), each with its rate.

    Args:
        model: Backbone and head.
        backbone: The backbone in it.
        weight_decay: Decay of weights.
        lr: Rate of the head and of FDConv's modulation.
        static_lr_scale: Factor of the rate for all other parameters of the backbone.
    """
    modulation = {id(parameter) for _, parameter in modulation_parameters(backbone)}
    inherited = {id(parameter) for parameter in backbone.parameters()} - modulation
    groups: list[dict[str, Any]] = []
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed(model)):
        old = [parameter for parameter in group["params"] if id(parameter) in inherited]
        new = [parameter for parameter in group["params"] if id(parameter) not in inherited]
        for members, scale in ((new, 1.0), (old, static_lr_scale)):
            if members:
                groups.append({**group, "params": members, "lr": lr * scale})
    return groups


def create_optimizer(model: nn.Module, backbone: nn.Module, args: argparse.Namespace, global_batch: int) -> Optimizer:
    """timm's optimiser.

    Args:
        model: Backbone and head.
        backbone: The backbone in it.
        args: Arguments of train_dense.py.
        global_batch: Images an update, over all processes and accumulated passes.
    """
    lr = args.lr
    if lr is None:
        lr = scaled_learning_rate(args.lr_base, args.lr_base_size, global_batch, "linear")
    groups = parameter_groups(model, backbone, args.weight_decay, lr, args.static_lr_scale)
    return create_optimizer_v2(groups, args.opt, lr, momentum=args.momentum)


def rate_factor(args: argparse.Namespace, total: int, updates_per_epoch: float) -> Callable[[int], float]:
    """Return the factor of the rate as a function of the updates done: linear warmup times the schedule.

    The rates are those of torch's LinearLR chained with MultiStepLR, PolynomialLR or CosineAnnealingLR. These compute a
    rate from the one before and load their lengths from a checkpoint: a run of which more is wanted, resumed with other
    `--steps`, would keep to its old end and train on at a rate of zero. A function of the updates has no state.

    Args:
        args: Arguments of train_dense.py.
        total: Updates of the whole run.
        updates_per_epoch: Updates an epoch, for the milestones.
    """

    def factor(update: int) -> float:
        warmup = 1.0
        if update < args.warmup_steps:
            warmup = args.warmup_factor + (1 - args.warmup_factor) * update / args.warmup_steps
        done = min(update / total, 1.0)
        if args.sched == "multistep":
            passed = sum(update >= milestone * updates_per_epoch for milestone in args.decay_milestones)
            return warmup * args.decay_rate**passed
        if args.sched == "poly":
            return warmup * (1 - done) ** args.poly_power
        if args.sched == "cosine":
            return warmup * (1 + math.cos(math.pi * done)) / 2
        return warmup

    return factor
