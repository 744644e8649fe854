"""The training loop: updates of a model with timm's parts, epoch by epoch, and its evaluation.

:func:`common.fit.fit` runs it over two data sets; train.py adds checkpoints, processes and a log to it.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from timm.task import TrainingTask
from timm.utils import dispatch_clip_grad, unwrap_model
from torch import Tensor, nn

from common.optim import create_optimizer, create_schedule
from common.temperature import anneal, check_temperature
from common.training_recipe import Recipe
from fdconv_zoo import modulation_parameters


class DivergedError(RuntimeError):
    """The loss or a weight is no longer finite."""


class Metrics(Protocol):
    """What a model is evaluated by: timm's evaluators and torchmetrics' collections are."""

    def update(self, output: Tensor, labels: Tensor) -> Any:
        """Take in the outputs for a batch."""

    def compute(self) -> dict[str, Any]:
        """Return a number for each name."""


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        epoch: Current epoch.
        epoch_updates: Updates done in it.
        updates: Updates done in all.
    """

    epoch: int = 0
    epoch_updates: int = 0
    updates: int = 0


@dataclass(kw_only=True)
class Trainer:
    """Trains a model update by update; what happens between updates and between epochs is the caller's.

    Attributes:
        task: timm's task, a model with its loss, on its device.
        recipe: Optimiser, schedule and images a batch.
        epoch_batches: Batches of this process in an epoch.
        world_size: Number of processes.
        grad_accum_steps: Batches an update.
        steps: Updates after which to end, ``None`` for all epochs of the schedule.
        autocast: Mixed precision of the forward pass.
        scaler: Gradient scaler, for float16.
        progress: Where the training is.
        optimizer: Of the recipe.
        scheduler: timm's schedule, a function of the number of updates.
        epochs: Epochs of the whole schedule, its cool-down included.
    """

    task: TrainingTask
    recipe: Recipe
    epoch_batches: int
    world_size: int = 1
    grad_accum_steps: int = 1
    steps: int | None = None
    autocast: AbstractContextManager = field(default_factory=nullcontext)
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler(enabled=False))
    progress: Progress = field(default_factory=Progress)
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        model = unwrap_model(self.task.get_trainable_module())
        self._modulation = [parameter for _, parameter in modulation_parameters(model)]
        self.optimizer = create_optimizer(model, self.recipe, self.images_per_update)
        check_temperature(model, self.recipe)
        self.scheduler, self.epochs = create_schedule(self.optimizer, self.recipe, self.updates_per_epoch)
        self.follow_schedule()

    @property
    def images_per_update(self) -> int:
        """Images of an update, over all processes and accumulated passes."""
        return self.recipe.batch_size * self.grad_accum_steps * self.world_size

    @property
    def updates_per_epoch(self) -> int:
        """Updates of a whole epoch; the last one may have fewer batches."""
        return math.ceil(self.epoch_batches / self.grad_accum_steps)

    @property
    def finished(self) -> bool:
        """Whether all epochs, or ``steps`` updates, are done."""
        progress = self.progress
        return progress.epoch >= self.epochs or (self.steps is not None and progress.updates >= self.steps)

    def follow_schedule(self) -> None:
        """Set rates and temperature to those after the updates that are done: both are functions of their number."""
        if self.progress.updates:
            self.scheduler.step_update(self.progress.updates)
        models = [self.task.get_trainable_module()]
        if self.task.has_ema():
            models.append(self.task.get_trainable_module(ema=True))
        anneal(models, self.recipe, self.progress.updates / self.updates_per_epoch)

    def train_epoch(self, batches: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """Train what is left of the epoch, or of ``steps``.

        Args:
            batches: Images (B, C, H, W) and labels of the epoch, without those that updates were made of already.

        Yields:
            The mean loss of each update, a scalar.
        """
        self.task.train()
        progress, passes = self.progress, self.grad_accum_steps
        for first in range(progress.epoch_updates * passes, self.epoch_batches, passes):
            if self.finished:
                return
            loss = self._update(batches, min(passes, self.epoch_batches - first))
            progress.epoch_updates += 1
            progress.updates += 1
            self.task.update_ema(step=progress.updates)
            self.follow_schedule()
            yield loss

    def next_epoch(self) -> bool:
        """Go on to the next epoch; tells whether the current one was at its end, and stays in it if not."""
        if self.progress.epoch_updates < self.updates_per_epoch:
            return False
        self.progress.epoch += 1
        self.progress.epoch_updates = 0
        return True

    @torch.no_grad()
    def evaluate(self, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], metrics: Metrics) -> None:
        """Put a model in eval mode, and let the metrics take in its outputs for all batches."""
        model.eval()
        for batch in batches:
            images, labels = self._prepare(*batch)
            if not len(images):  # none of them could be read
                continue
            with self.autocast:
                output = model(images)
            metrics.update(output, labels)

    def _prepare(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        layout = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        return images.to(self.task.device).contiguous(memory_format=layout), labels.to(self.task.device)

    def _update(self, batches: Iterator[tuple[Tensor, Tensor]], passes: int) -> Tensor:
        """One optimiser update from the next ``passes`` batches; returns their mean loss."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.task.device)
        for i in range(passes):
            images, labels = self._prepare(*next(batches))
            with self.task.no_sync() if i + 1 < passes else nullcontext():
                with self.autocast:
                    loss = self.task(images, labels)["loss"] / passes
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.progress.updates < (self.recipe.modulation_frozen_epochs or 0) * self.updates_per_epoch:
            for parameter in self._modulation:
                parameter.grad = None  # optimisers leave alone what has no gradient, decay included
        self._clip()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total

    def _clip(self) -> None:
        """Clip gradients as the recipe says, those of the modulation with the others or apart."""
        mode, limit, own_limit = self.recipe.clip_mode, self.recipe.clip_grad, self.recipe.clip_modulation
        if limit is None and own_limit is None:
            return
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.task.get_clip_parameters(exclude_head=mode == "agc"))
        if own_limit is not None and self._modulation:
            dispatch_clip_grad(self._modulation, own_limit, mode=mode)
            own = {id(parameter) for parameter in self._modulation}
            parameters = [parameter for parameter in parameters if id(parameter) not in own]
        if limit is not None:
            dispatch_clip_grad(parameters, limit, mode=mode)
