"""A run of train.py: the training loop with validation, checkpoints, a log, and an orderly end."""

import argparse
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from common.checkpoint import (
    BEST_FILE,
    STATE_FILE,
    copy_weights,
    random_state,
    save_state,
    save_weights,
    set_random_state,
)
from common.images import UnusableImagesError
from common.loop import DivergedError, Progress, Trainer
from common.optim import COUNTERS
from common.signals import StoppedError, StopSignals
from training.args import recorded_args
from training.data import BatchAugmentation, TrainLoader, ValidationLoader
from training.log import RunLog
from training.validate import evaluate

_logger = logging.getLogger("train")


@dataclass
class RunProgress(Progress):
    """Where a run is; part of every checkpoint.

    Attributes:
        loss_sum: Sum of the epoch's losses so far, one each update.
        best_metric: Best validation metric, ``None`` before the first validation.
        best_epoch: Its epoch.
    """

    loss_sum: float = 0.0
    best_metric: float | None = None
    best_epoch: int | None = None


@dataclass(kw_only=True)
class Run(Trainer):
    """Trains a task, validates after each epoch and saves all it needs to go on.

    Attributes:
        args: Arguments of train.py.
        train_loader: Training batches.
        val_loader: Validation batches.
        augment: Augmentation of training batches.
        log: Log of the run, in its first process.
        rank: Rank of this process.
        stop: Stop signals of this process.
        start: Where the first weights came from; part of every checkpoint.
        progress: Where the run is.
    """

    args: argparse.Namespace
    train_loader: TrainLoader
    val_loader: ValidationLoader
    augment: BatchAugmentation
    rank: int
    stop: StopSignals
    start: dict[str, str]
    log: RunLog | None = None
    progress: RunProgress = field(default_factory=RunProgress)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self.task.device)

    def fit(self) -> None:
        """Train to the end of the schedule, or for ``--steps`` updates.

        Raises:
            DivergedError: The loss or a weight is not finite. The last checkpoint is from before.
            StoppedError: A stop signal came. The checkpoint is from now.
            CheckpointError: A checkpoint can't be written. The one before is intact.
        """
        while not self.finished:
            batches = self._batches()
            if self.log is not None:
                self.log.start_epoch(self.progress.updates)
            for loss in self.train_epoch(batches):
                self._loss_sum += loss
                self._follow_update()
            self._save()
            self._validate()
            if self.next_epoch():
                self._loss_sum.zero_()
            self._save()
            self._leave_if_asked()

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What is left of the epoch's batches, augmented when they are used."""
        epoch = self.progress.epoch
        batches = self.train_loader.batches(epoch, self.progress.epoch_updates * self.grad_accum_steps)
        return (self.augment(*batch, epoch) for batch in batches)

    def _follow_update(self) -> None:
        """Report, save and leave where it is time to."""
        args, progress = self.args, self.progress
        if progress.updates % args.log_interval == 0 or progress.epoch_updates == self.updates_per_epoch:
            self._report(min(1.0, progress.epoch_updates * self.grad_accum_steps / self.epoch_batches))
        if args.save_every_steps and progress.updates % args.save_every_steps == 0:
            self._save()
        self._leave_if_asked()

    def _mean_loss(self) -> float:
        """Mean loss of the epoch so far over all processes.

        Raises:
            DivergedError: A loss since the beginning of the epoch was not finite.
        """
        loss_sum = self._loss_sum.clone()
        if dist.is_initialized():
            dist.all_reduce(loss_sum)
        self.progress.loss_sum = loss_sum.item() / self.world_size
        if not math.isfinite(self.progress.loss_sum):
            raise DivergedError(f"the loss is not finite in epoch {self.progress.epoch}: {self._last_good()}")
        return self.progress.loss_sum / max(self.progress.epoch_updates, 1)

    def _last_good(self) -> str:
        state = self.args.output / STATE_FILE
        advice = "try a lower --lr, more --warmup-epochs, --clip-grad, or --amp-dtype bfloat16"
        return f"{f'{state} is from before; ' if state.exists() else ''}{advice}"

    def _rate(self) -> float:
        """The learning rate, which groups have times their `lr_scale`."""
        return max(group["lr"] / (group.get("lr_scale") or 1) for group in self.optimizer.param_groups)

    def _report(self, share: float) -> None:
        loss = self._mean_loss()
        if self.log is not None:
            self.log.train(
                epoch=self.progress.epoch,
                share=share,
                update=self.progress.updates,
                loss=loss,
                lr=self._rate(),
                images_per_update=self.images_per_update,
            )

    def _leave_if_asked(self) -> None:
        signum = self.stop.any_process()
        if signum:
            self._save()
            raise StoppedError(signum)

    def _validate(self) -> None:
        """Evaluate the weights and their average, note the best, and report the epoch."""
        metrics = evaluate(self, self.val_loader)
        self._report_corrupt_images()
        watched = metrics[self.args.eval_metric]
        if self.task.has_ema():
            averaged = evaluate(self, self.val_loader, ema=True)
            watched = averaged[self.args.eval_metric]
            metrics |= {f"ema_{name}": value for name, value in averaged.items()}
        progress = self.progress
        sign = -1 if self.args.eval_metric == "loss" else 1
        better = progress.best_metric is None or sign * watched > sign * progress.best_metric
        if better:
            progress.best_metric, progress.best_epoch = watched, progress.epoch
        if self.log is not None:
            if better:
                last = "last_ema.safetensors" if self.task.has_ema() else "last.safetensors"
                copy_weights(self.args.output / last, self.args.output / BEST_FILE)
            train = {"loss": progress.loss_sum / max(progress.epoch_updates, 1)}
            self.log.epoch(progress.epoch, update=progress.updates, train=train, val=metrics, lr=self._rate())

    def _report_corrupt_images(self) -> None:
        reports = gather(self.train_loader.corrupt_images())
        if self.log is not None:
            names = {name for _, found in reports for name in found}
            self.log.corrupt_images(len(names) or sum(count for count, _ in reports), sorted(names))
        left_out = {name for names in gather(self.val_loader.corrupt_images()) for name in names}
        if left_out and len(left_out) == self.val_loader.images:
            raise UnusableImagesError(f"no image of the validation set can be read: {min(left_out)}, ...")
        if self.log is not None:
            self.log.corrupt_validation_images(sorted(left_out))

    def _save(self) -> None:
        """Save the state and the weights, from all processes' random states, in the first process."""
        self._mean_loss()
        random_states = gather(random_state(self.task.device))
        if self.rank != 0:
            return
        weights = {"last": self.task.get_checkpoint_state()["state_dict"]}
        if self.task.has_ema():
            weights["last_ema"] = self.task.get_checkpoint_state(ema=True)["state_dict_ema"]
        for name, tensor in weights["last"].items():
            if not torch.isfinite(tensor).all():
                raise DivergedError(f"{name} is not finite after update {self.progress.updates}: {self._last_good()}")
        state = {
            "progress": asdict(self.progress),
            "args": recorded_args(self.args),
            "start": self.start,
            "order": self._order(),
            "weights": weights,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": random_states,
        }
        save_state(state, self.args.output / STATE_FILE)
        trained_epoch = self.progress.epoch - (self.progress.epoch_updates == 0)
        facts = {"model": self.args.model, "epoch": trained_epoch, "update": self.progress.updates}
        metadata = {key: str(value) for key, value in facts.items()}
        for name, tensors in weights.items():
            save_weights(tensors, self.args.output / f"{name}.safetensors", metadata)

    def _order(self) -> dict[str, int | float]:
        """What the order of the training data depends on, besides the data themselves."""
        return {
            "batch_size": self.args.batch_size,
            "grad_accum_steps": self.args.grad_accum_steps,
            "aug_repeats": self.args.aug_repeats,
            "seed": self.args.seed,
            "processes": self.world_size,
            "batches an epoch": self.epoch_batches,
            "workers of a stream": self.train_loader.stream_workers,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state that another process saved.

        Args:
            state: What ``load_state`` read.

        Raises:
            ValueError: The state is of a run with other batches, so that its position means nothing here.
        """
        was, now = state["order"], self._order()
        different = [f"{name} {was[name]}, not {now[name]}" for name in now if was[name] != now[name]]
        if different:
            raise ValueError(
                f"can't go on at the checkpoint's place in the data: it was made with {'; '.join(different)}. "
                "Resume with the same, or start a new run with --initial-checkpoint from its last.safetensors"
            )
        current = recorded_args(self.args)
        changed = [
            f"{name} {value} -> {current[name]}" for name, value in state["args"].items() if value != current[name]
        ]
        if changed and self.rank == 0:
            _logger.warning(f"changed since the checkpoint, so this is no exact continuation: {', '.join(changed)}")
        self.task.load_checkpoint_state(state["weights"]["last"])
        if self.task.has_ema():
            self.task.load_checkpoint_state(state["weights"].get("last_ema", state["weights"]["last"]), ema=True)
        # The options of now hold, such as a lower rate; what an optimiser counts in its groups goes on.
        groups = zip(state["optimizer"]["param_groups"], self.optimizer.state_dict()["param_groups"], strict=True)
        groups = [
            {**saved, **current, **{key: saved[key] for key in COUNTERS if key in saved}} for saved, current in groups
        ]
        self.optimizer.load_state_dict({"state": state["optimizer"]["state"], "param_groups": groups})
        self.scaler.load_state_dict(state["scaler"])
        self.progress = RunProgress(**state["progress"])
        other_metric = state["args"].get("eval_metric", self.args.eval_metric) != self.args.eval_metric
        # Where it is of another metric, or the run goes on in another directory, the next best counts.
        if other_metric or not (self.args.output / BEST_FILE).exists():
            self.progress.best_metric = self.progress.best_epoch = None
        self._loss_sum.fill_(self.progress.loss_sum)
        self.follow_schedule()  # functions of the number of updates, without state
        set_random_state(state["random"][self.rank], self.task.device)


def gather(value: Any) -> list[Any]:
    """``value`` of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
