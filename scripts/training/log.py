"""What a run tells: lines on the console, ``summary.csv``, TensorBoard, and the list of corrupt images."""

import csv
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from timm.utils.summary import trim_summary

from fdconv_zoo.run_files import SUMMARY_FILE

_logger = logging.getLogger("train")


class RunLog:
    """Log of one run, kept by its first process.

    Args:
        output: Directory of the run.
        total_updates: Updates of the whole run, for the remaining time.
        epoch: Epoch that the run starts or resumes in; later rows of an earlier ``summary.csv`` are dropped.
        update: Update that the run starts or resumes at.
        tensorboard: Write TensorBoard events too.

    Raises:
        ValueError: TensorBoard is asked for and not installed.
    """

    def __init__(self, output: Path, total_updates: int, epoch: int, update: int, tensorboard: bool) -> None:
        self.output = output
        self.total_updates = total_updates
        self.summary = output / SUMMARY_FILE
        trim_summary(self.summary, epoch)
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ValueError("--tensorboard needs the tensorboard package: pip install tensorboard") from error
            self.writer = SummaryWriter(output / "tensorboard", purge_step=update)
        self._left_out = 0
        self._start = self._last = time.monotonic()
        self._first_update = self._last_update = update

    def start_epoch(self, update: int) -> None:
        """Restart the clock of images/s, which validation does not count in."""
        self._last, self._last_update = time.monotonic(), update

    def train(self, epoch: int, share: float, update: int, loss: float, lr: float, images_per_update: int) -> None:
        """Report progress.

        Args:
            epoch: Current epoch.
            share: Part of the epoch that is done, in [0, 1].
            update: Updates done in the run.
            loss: Mean training loss of the epoch so far.
            lr: Learning rate.
            images_per_update: Images of all processes in one update.
        """
        now = time.monotonic()
        images_per_second = (update - self._last_update) * images_per_update / max(now - self._last, 1e-9)
        seconds_per_update = (now - self._start) / max(update - self._first_update, 1)
        left = timedelta(seconds=round((self.total_updates - update) * seconds_per_update))
        _logger.info(
            f"epoch {epoch} ({share:4.0%})  update {update}/{self.total_updates}  loss {loss:.4f}  lr {lr:.3e}  "
            f"{images_per_second:.1f} images/s  ETA {left}"
        )
        self._last, self._last_update = now, update
        if self.writer is not None:
            self.writer.add_scalar("train/loss", loss, update)
            self.writer.add_scalar("train/lr", lr, update)
            self.writer.add_scalar("train/images_per_second", images_per_second, update)

    def epoch(self, epoch: int, update: int, train: dict[str, float], val: dict[str, float], lr: float) -> None:
        """Report an epoch: a line, a row of ``summary.csv`` and TensorBoard scalars, from metric names to values."""
        metrics = "  ".join(f"{name} {value:.4g}" for name, value in val.items())
        _logger.info(f"epoch {epoch} validated  {metrics}  train loss {train['loss']:.4f}")
        measured = {f"train_{name}": value for name, value in train.items()}
        measured |= {f"eval_{name}": value for name, value in val.items()}
        append_row(self.summary, {"epoch": epoch, **measured, "lr": lr})
        if self.writer is not None:
            for name, value in val.items():
                self.writer.add_scalar(f"eval/{name}", value, update)
            self.writer.flush()

    def corrupt_images(self, count: int, names: list[str]) -> None:
        """Report the images that could not be read so far, and list them in ``corrupt_images.txt``."""
        if count == 0:
            return
        where = ""
        if names:
            (self.output / "corrupt_images.txt").write_text("".join(f"{name}\n" for name in sorted(names)))
            where = f", listed in {self.output / 'corrupt_images.txt'}"
        _logger.warning(f"skipped {count} corrupt image{'s' if count > 1 else ''} so far{where}")

    def corrupt_validation_images(self, names: list[str]) -> None:
        """Report the validation images that could not be read, once, and list them in ``corrupt_val_images.txt``."""
        if len(names) == self._left_out:
            return
        self._left_out = len(names)
        listed = self.output / "corrupt_val_images.txt"
        listed.write_text("".join(f"{name}\n" for name in names))
        _logger.warning(
            f"left {len(names)} corrupt image{'s' if len(names) > 1 else ''} out of validation, listed in {listed}"
        )


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV file by its columns; new ones are added, as of a run that is resumed with an average."""
    rows: list[dict[str, Any]] = []
    columns = list(row)
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, before = list(reader), list(reader.fieldnames or [])
        columns = before if set(row) <= set(before) else [*row, *(name for name in before if name not in row)]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, row])
    temporary.replace(path)
