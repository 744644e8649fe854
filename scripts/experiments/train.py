"""Training of one small model in an experiment: a recipe of train.py, images in memory, metrics after each epoch."""

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.utils import dispatch_clip_grad
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics import MetricCollection

from common.optim import create_optimizer, create_schedule
from training.args import build_parser, parse_args

# What `train` and common/optim.py make use of; an experiment adds the augmentation that it knows.
RECIPE_OPTIONS = {
    "config", "synthetic", "batch_size", "smoothing", "clip_grad", "clip_mode", "channels_last",
    "opt", "opt_eps", "opt_betas", "opt_kwargs", "momentum", "weight_decay", "layer_decay", "static_lr_scale",
    "lr", "lr_base", "lr_base_size", "lr_base_scale", "sched", "epochs", "warmup_epochs", "warmup_lr", "min_lr",
    "decay_epochs", "decay_milestones", "decay_rate", "cooldown_epochs",
}  # fmt: skip
EVAL_BATCH = 250


def read_recipe(config: Path, options: Sequence[str], also_used: Sequence[str] = ()) -> argparse.Namespace:
    """Read a recipe file and options of train.py on top of it; what they can't be read for ends the program.

    Args:
        config: Yaml file of options of train.py.
        options: Further options, as on the command line.
        also_used: Names of options that the experiment uses, besides those of optimiser, schedule and loss.

    Raises:
        ValueError: An option is set that the experiment would ignore.
    """
    args = parse_args(["--config", str(config), "--synthetic", *options])
    defaults = build_parser()
    changed = {name for name, value in vars(args).items() if value != defaults.get_default(name)}
    ignored = sorted(changed - RECIPE_OPTIONS - set(also_used))
    if ignored:
        raise ValueError(f"options that this experiment has no use for: {', '.join(ignored)}")
    return args


def recipe_settings(recipe: argparse.Namespace, also_used: Sequence[str] = ()) -> dict[str, Any]:
    """The options of a recipe that decide the outcome, for the results file."""
    names = (RECIPE_OPTIONS | set(also_used)) - {"config", "synthetic"}
    return {name: getattr(recipe, name) for name in sorted(names)}


class ImageTensors(Dataset):
    """Images in memory with their labels.

    Args:
        images: (N, C, H, W), uint8.
        labels: (N,), int64.
        transform: Makes one image (C, H, W) the model's input.
    """

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable[[Tensor], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]

    def __len__(self) -> int:
        return len(self.images)


@torch.no_grad()
def evaluate(
    model: nn.Module, dataset: Dataset, metrics: MetricCollection, memory_format: torch.memory_format
) -> dict[str, float]:
    """Metrics of the model's logits over a data set, by name."""
    device = next(model.parameters()).device
    metrics = metrics.clone().to(device)
    model.eval()
    for images, labels in DataLoader(dataset, EVAL_BATCH):
        metrics.update(model(images.to(device, memory_format=memory_format)), labels.to(device))
    return {name: value.item() for name, value in metrics.compute().items()}


def train(
    model: nn.Module,
    recipe: argparse.Namespace,
    train_set: Dataset,
    test_set: Dataset,
    metrics: MetricCollection,
    seed: int,
    on_update: Callable[[int, float], None],
) -> list[dict[str, float]]:
    """Train a model for the recipe's epochs.

    Order and augmentation of the images are drawn from the global random state alone, so that they are those of every
    model that draws no random numbers in training.

    Args:
        model: Model on its device.
        recipe: What :func:`read_recipe` returned.
        train_set: Images and labels to train on.
        test_set: The same to evaluate on after each epoch.
        metrics: Of logits (N, classes) and labels (N,).
        seed: Seed of order and augmentation.
        on_update: Called after each update with the epoch, from 1, and the loss.

    Returns:
        For each epoch its number, the mean training loss and the metrics.

    Raises:
        RuntimeError: The loss is not finite.
    """
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    memory_format = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(memory_format=memory_format)
    loader = DataLoader(train_set, recipe.batch_size, shuffle=True, drop_last=True)
    optimizer = create_optimizer(model, recipe, recipe.batch_size)
    scheduler, epochs = create_schedule(optimizer, recipe, len(loader))
    curve = []
    for epoch in range(1, epochs + 1):
        model.train()
        total = 0.0
        for number, (images, labels) in enumerate(loader, start=1 + (epoch - 1) * len(loader)):
            logits = model(images.to(device, memory_format=memory_format))
            loss = F.cross_entropy(logits, labels.to(device), label_smoothing=recipe.smoothing)
            loss.backward()
            if recipe.clip_grad is not None:
                dispatch_clip_grad(model.parameters(), recipe.clip_grad, mode=recipe.clip_mode)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step_update(number)
            total += loss.item()
            if not math.isfinite(total):
                raise RuntimeError(f"the loss is not finite in epoch {epoch}: try a lower --lr")
            on_update(epoch, loss.item())
        measured = evaluate(model, test_set, metrics, memory_format)
        curve.append({"epoch": epoch, "train_loss": total / len(loader), **measured})
    return curve
