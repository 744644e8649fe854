"""Runs of ``train_dense.py`` that can be stopped at any time and go on as if they had not been.

All randomness is drawn from numbers that a checkpoint has: the order of an epoch from (seed, epoch), a sample from
(seed, epoch, position), and an update from (seed, updates, batch, process). An epoch that was cut off is therefore
repeated as it was.
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data.distributed import DistributedSampler

from common.checkpoint import CheckpointError, save_state
from common.sampler import SampleKey
from common.signals import StoppedError, StopSignals

# what a stop raises; Lightning's own is for a signal that comes before the first batch
STOPS = (StoppedError, SIGTERMException)


class EpochSampler(DistributedSampler):
    """Keys of a process's samples (index, epoch, position); positions are of the whole epoch, over all processes."""

    def __iter__(self) -> Iterator[SampleKey]:
        epoch = self.epoch
        for i, index in enumerate(super().__iter__()):
            yield SampleKey(index, epoch, i * self.num_replicas + self.rank)


class Checkpoints(ModelCheckpoint):
    """Knows its best score also in a folder that was moved: the next epoch would take the place of a better one."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        def here(path: str) -> str:
            return str(Path(self.dirpath) / Path(path).name) if path else path

        moved = {key: here(value) for key, value in state_dict.items() if key.endswith("_model_path")}
        best = {here(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict({**state_dict, **moved, "best_k_models": best, "dirpath": self.dirpath})


class CheckpointFiles(TorchCheckpointIO):
    """Writes checkpoints beside their names and renames them, as Lightning does within one file system only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        """Raises CheckpointError where the file can't be written; an earlier one is intact."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_state(checkpoint, Path(path))


class Progress(NamedTuple):
    """Where a run is.

    Attributes:
        epochs: Whole epochs done.
        updates: Updates done.
        order: See :func:`order_of`; of older checkpoints, nothing.
    """

    epochs: int
    updates: int
    order: dict[str, Any]


def order_of(args: argparse.Namespace) -> dict[str, Any]:
    """What updates and the order of the training data depend on, besides the data themselves."""
    names = ["batch_size", "grad_accum_steps", "seed", *([] if args.steps else ["limit_batches"])]
    return {name: getattr(args, name) for name in names} | {"processes": int(os.environ.get("WORLD_SIZE", 1))}


def check_order(was: dict[str, Any], args: argparse.Namespace) -> None:
    """Refuse to go on with other updates: rates and epochs would be counted in both.

    Args:
        was: Order of the checkpoint.
        args: Arguments of train_dense.py.

    Raises:
        ValueError: Names what differs.
    """
    now = order_of(args)
    different = [f"{name} {was[name]}, not {now[name]}" for name in now if name in was and was[name] != now[name]]
    if different:
        raise ValueError(
            f"can't go on with --resume: the checkpoint was made with {'; '.join(different)}. Resume with the same, or "
            "start a new run in another --output"
        )


def read_progress(path: Path) -> Progress:
    """Return what was done before a checkpoint.

    Raises:
        CheckpointError: It is none, or can't be read.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Progress(checkpoint["epoch"] + 1, checkpoint["global_step"], checkpoint.get("order", {}))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"can't resume from {path}: it is no whole checkpoint ({reason})") from error


class StopAfterBatch(L.Callback):
    """Ends the run after the batch in which one of its processes received SIGTERM or SIGINT.

    Lightning's handler, which this one takes the place of, talks to the other processes at whatever point the signal
    comes, between their messages about gradients, and ends with exit code 0.
    """

    def __init__(self) -> None:
        self.stop = StopSignals()
        self.group: dist.ProcessGroup | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning puts all handlers back in the end
        self.stop.__enter__()
        if trainer.world_size > 1:
            # Lightning's group is NCCL's on GPUs: to agree in it, the host would wait for the GPU after every batch
            self.group = dist.new_group(backend="gloo")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Raises StoppedError where a process of the run was told to stop."""
        signum = self.stop.any_process(self.group)
        if signum:
            raise StoppedError(signum)


class EndOfRun(L.Callback):
    """Validates at the end too, where an interval of validations or an epoch is cut off there.

    With Lightning's `max_steps` there would be no score after a part of an epoch, and a run that is resumed after an
    epoch without validation would train on one batch more.

    Args:
        steps: Updates of the whole run; None to end with Lightning's `max_epochs`.
    """

    def __init__(self, steps: int | None) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        steps_done = trainer.global_step == self.steps
        if steps_done or trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1
        if steps_done:
            trainer.should_stop = True
