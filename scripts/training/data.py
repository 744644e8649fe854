"""Loaders and batch augmentation of ``train.py``, from timm's parts."""

import argparse
import dataclasses
import logging
import multiprocessing
from collections.abc import Iterator
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import timm.data
import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from timm.data.readers.reader import Reader
from timm.data.readers.reader_wds import ReaderWds
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from common.images import ReadableImages, collate_readable
from common.sampler import SeededDataset
from common.workers import ignore_stops
from training.sampler import ResumableSampler

STREAM_LOGGER = ReaderWds.__module__


class _SkippedSampleHandler(logging.Handler):
    """Counts the samples that timm's WebDataset reader can't decode: it logs and leaves them out."""

    def __init__(self, count: Synchronized) -> None:
        super().__init__(logging.WARNING)
        self.count = count

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("Handling webdataset error"):
            with self.count.get_lock():
                self.count.value += 1


def _init_worker(worker_id: int, skipped: Synchronized) -> None:
    ignore_stops()
    logging.getLogger(STREAM_LOGGER).addHandler(_SkippedSampleHandler(skipped))


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


class _SeededRepeatAugSampler(RepeatAugSampler):
    """Repeated augmentation whose order depends on the run's seed too: timm's depends on the epoch alone."""

    def __init__(self, dataset: Dataset, rank: int, world_size: int, repeats: int, seed: int) -> None:
        super().__init__(dataset, world_size, rank, num_repeats=repeats)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(_seed(self.seed, epoch))


def _check_shards(reader: Reader, workers: int, world_size: int) -> None:
    """Refuse shards that leave a reading process without any: it would yield nothing, and the epoch end too early.

    Raises:
        ValueError: There are fewer shards than reading processes.
    """
    if not isinstance(reader, ReaderWds):
        return
    shards, readers = len(reader.split_info.filenames), workers * world_size
    if shards < readers:
        raise ValueError(
            f"{shards} shards for training are fewer than {readers} that read them ({world_size} processes with "
            f"{workers} --workers each): lower --workers, or write more shards"
        )


def _share_shards(reader: Reader, rank: int, world_size: int) -> bool:
    """Give a process whole shards of its own for validation, and tell whether there is one for it.

    timm's reader would have all processes see equally many samples: some twice, others never.
    """
    if not isinstance(reader, ReaderWds) or world_size == 1:
        return True
    shards = reader.split_info.filenames[rank::world_size]
    reader.split_info = dataclasses.replace(reader.split_info, filenames=shards)
    reader.dist_rank, reader.dist_num_replicas = 0, 1
    return len(shards) > 0


class TrainLoader:
    """Batches of one process that can start in the middle of an epoch.

    Map-style data resumes exactly and at once. A stream is replayed from the beginning of the epoch and its first
    batches are dropped: exact for the same number of processes and workers, as long as the stream itself is.

    Args:
        dataset: Training set of :func:`create_datasets`, without a transform.
        args: Arguments of train.py.
        data_config: timm's resolved data configuration of the model.
        device: Device of the batches.
        rank: Rank of this process.
        world_size: Number of processes.

    Attributes:
        stream_workers: Loader processes that a stream is shared out to, 0 for map-style data.

    Raises:
        ValueError: The data don't fill a batch, or a stream has fewer shards than readers.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: argparse.Namespace,
        data_config: dict[str, Any],
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self.seed, self.rank, self.batch_size = args.seed, rank, args.batch_size
        self.skipped = multiprocessing.Value("q", 0)
        self.generator = torch.Generator()
        self.sampler: ResumableSampler | None = None
        self.dataset = dataset
        self.stream_workers = 0
        dataset.transform = timm.data.create_transform(
            data_config["input_size"],
            is_training=True,
            no_aug=not args.aug,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            auto_augment=args.aa,
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            use_prefetcher=True,
        )
        workers = args.workers
        stream = isinstance(dataset, IterableDataset)
        if stream:
            workers = max(1, workers)  # a worker process that starts with the epoch is what makes its seed known
            self.stream_workers = workers
            _check_shards(dataset.reader, workers, world_size)
            dataset.set_loader_cfg(num_workers=workers)
        else:
            order = (
                _SeededRepeatAugSampler(dataset, rank, world_size, args.aug_repeats, args.seed)
                if args.aug_repeats
                else DistributedSampler(dataset, world_size, rank, seed=args.seed)
            )
            self.sampler = ResumableSampler(order, rank, world_size)
            self.dataset = SeededDataset(dataset, args.seed)
        loader = DataLoader(
            self.dataset,
            batch_size=args.batch_size,
            sampler=self.sampler,
            num_workers=workers,
            collate_fn=fast_collate,
            pin_memory=device.type == "cuda",
            drop_last=True,
            worker_init_fn=partial(_init_worker, skipped=self.skipped),
            persistent_workers=workers > 0 and not stream,
            generator=self.generator,
        )
        if len(loader) == 0:
            raise ValueError(
                f"the training set has {len(dataset)} images, fewer than one batch of {args.batch_size} "
                f"in each of {world_size} processes: lower --batch-size"
            )
        self.loader = PrefetchLoader(
            loader, data_config["mean"], data_config["std"], channels=data_config["input_size"][0], device=device
        )

    def __len__(self) -> int:
        return len(self.loader)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Batches of an epoch from number ``start`` on: normalised images (B, C, H, W) and labels (B,)."""
        self.generator.manual_seed(_seed(self.seed, epoch, self.rank))
        if self.sampler is not None:
            self.sampler.set_position(epoch, start * self.batch_size)
            return iter(self.loader)
        self.dataset.set_epoch(epoch)
        return islice(self.loader, start, None)

    def corrupt_images(self) -> tuple[int, list[str]]:
        """Number of images that could not be read so far in this process, and the names of those that have one."""
        if self.sampler is None:
            return self.skipped.value, []
        names = self.dataset.corrupt.names()
        return len(names), names


class ValidationLoader:
    """Validation batches of one process, in order; images that can't be read are left out.

    Args:
        dataset: Validation set of :func:`create_datasets`, without a transform.
        args: Arguments of train.py.
        data_config: timm's resolved data configuration of the model.
        device: Device of the batches.
        rank: Rank of this process.
        world_size: Number of processes, which differ by one image at most.

    Attributes:
        images: Number of images over all processes, unknown of a stream.
        has_share: Whether there are images for this process; a stream may have fewer shards than processes.
    """

    def __init__(
        self,
        dataset: Dataset,
        args: argparse.Namespace,
        data_config: dict[str, Any],
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        dataset.transform = timm.data.create_transform(
            data_config["input_size"],
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
            crop_pct=data_config["crop_pct"],
            crop_mode=data_config["crop_mode"],
            use_prefetcher=True,
        )
        self.readable: ReadableImages | None = None
        self.images: int | None = None
        self.has_share = True
        if isinstance(dataset, IterableDataset):
            self.has_share = _share_shards(dataset.reader, rank, world_size)
            dataset.set_loader_cfg(num_workers=args.workers)
        else:
            self.images = len(dataset)
            dataset = self.readable = ReadableImages(dataset)
        loader = DataLoader(
            dataset,
            batch_size=args.validation_batch_size or args.batch_size,
            sampler=range(rank, len(dataset), world_size) if self.readable else None,
            num_workers=args.workers,
            collate_fn=partial(collate_readable, channels=data_config["input_size"][0]),
            pin_memory=device.type == "cuda",
            worker_init_fn=partial(_init_worker, skipped=multiprocessing.Value("q", 0)),
            generator=torch.Generator(),  # its own: starting the workers must not advance the run's random state
        )
        self.loader = PrefetchLoader(
            loader, data_config["mean"], data_config["std"], channels=data_config["input_size"][0], device=device
        )

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.loader if self.has_share else ())

    def corrupt_images(self) -> list[str]:
        """Names of the images that could not be read so far in this process; of a stream none are known."""
        return self.readable.corrupt.names() if self.readable else []


class BatchAugmentation:
    """Random erasing, then mixup or CutMix, on a batch on its device.

    Applied when the batch is used, not when it is prefetched, so that the random state of a checkpoint is the one the
    next batch needs.

    Args:
        args: Arguments of train.py.
        num_classes: Classes of the model.
        device: Device of the batches.
    """

    def __init__(self, args: argparse.Namespace, num_classes: int, device: torch.device) -> None:
        self.erase = None
        if args.reprob and args.aug:
            self.erase = RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device=device)
        self.mixup = None
        if args.mixup or args.cutmix:
            self.mixup = timm.data.Mixup(
                args.mixup,
                args.cutmix,
                prob=args.mixup_prob,
                switch_prob=args.mixup_switch_prob,
                mode=args.mixup_mode,
                label_smoothing=args.smoothing,
                num_classes=num_classes,
            )
        self.off_epoch = args.mixup_off_epoch

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment ``images`` (B, C, H, W) in place; ``labels`` (B,) become (B, classes) where mixing is on."""
        if self.erase is not None:
            images = self.erase(images)
        if self.mixup is not None:
            self.mixup.mixup_enabled = not self.off_epoch or epoch < self.off_epoch
            images, labels = self.mixup(images, labels)
        return images, labels
