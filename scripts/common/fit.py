"""Training of a model on data in two data sets, by a recipe."""

import math
from collections.abc import Callable, Iterator

import torch
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader, Dataset

from common.loop import DivergedError, Metrics, Trainer
from common.training_recipe import Recipe

EVAL_BATCH = 250


def fit(
    model: nn.Module,
    train_set: Dataset,
    val_set: Dataset,
    recipe: Recipe,
    *,
    seed: int,
    metrics: Callable[[], Metrics] | None = None,
    on_update: Callable[[int, float], None] | None = None,
) -> Iterator[dict[str, float]]:
    """Train a model on the device it is on, with cross-entropy, for the recipe's epochs.

    Order and augmentation of the images are drawn from the global random state alone, so that they are those of every
    model that draws no random numbers in training.

    Args:
        model: Gives logits (B, classes), or (B, classes, H, W) where the labels are maps.
        train_set: Pairs of an image (C, H, W) and a label; what is left of a last batch is not used.
        val_set: The same to evaluate on.
        recipe: Images a batch, optimiser and schedule.
        seed: Of order and augmentation.
        metrics: Makes what an evaluation counts with (default: timm's loss, top1 and top5).
        on_update: Called after each update with the epoch, from 1, and the loss.

    Yields:
        After each epoch its number, from 1, the mean training loss, and the metrics.

    Raises:
        ValueError: There are too few images for one batch.
        DivergedError: The loss is not finite.
    """
    if len(train_set) < recipe.batch_size:
        raise ValueError(f"{len(train_set)} images to train on, fewer than one batch of {recipe.batch_size}")
    torch.manual_seed(seed)
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
    device = next(model.parameters()).device
    task = ClassificationTask(model.to(memory_format=layout), criterion, device=device, verbose=False)
    train_loader = DataLoader(train_set, recipe.batch_size, shuffle=True, drop_last=True)
    val_loader = DataLoader(val_set, EVAL_BATCH)
    trainer = Trainer(task=task, recipe=recipe, epoch_batches=len(train_loader))
    while not trainer.finished:
        epoch, total = trainer.progress.epoch + 1, 0.0
        for loss in trainer.train_epoch(iter(train_loader)):
            total += loss.item()
            if not math.isfinite(total):
                raise DivergedError(f"the loss is not finite in epoch {epoch}: try a lower --lr")
            if on_update is not None:
                on_update(epoch, loss.item())
        measured = metrics() if metrics is not None else task.create_evaluator()
        trainer.evaluate(model, val_loader, measured)
        values = {name: float(value) for name, value in measured.compute().items()}
        yield {"epoch": epoch, "train_loss": total / len(train_loader), **values}
        trainer.next_epoch()
