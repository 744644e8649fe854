"""Data sets, loaders and batch augmentation of ``train.py``, from timm's parts."""

import argparse
import logging
import multiprocessing
import signal
from collections.abc import Iterator
from functools import partial
from itertools import islice
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
import timm.data
import torch
from timm.data.distributed_sampler import OrderedDistributedSampler, RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchvision.datasets import FakeData

from common.sampler import SeededDataset
from training.sampler import ResumableSampler

IMAGENET_IMAGES = 1_281_167
STREAM_LOGGER = "timm.data.readers.reader_wds"


def create_datasets(args: argparse.Namespace, num_classes: int, input_size: tuple[int, int, int]) -> list[Dataset]:
    """Training set and validation set.

    Args:
        args: Arguments of train.py.
        num_classes: Classes of the model.
        input_size: (channels, height, width) of the images.

    Raises:
        ValueError: The data can't be opened, or its labels don't fit ``num_classes``.
    """
    val_batch_size = args.validation_batch_size or args.batch_size
    if args.synthetic:
        sizes = IMAGENET_IMAGES, val_batch_size
        return [FakeData(size, input_size, num_classes, random_offset=args.seed) for size in sizes]

    if not args.dataset and not Path(args.data_dir).exists():
        raise ValueError(f"there is no data directory {args.data_dir}")
    create = partial(
        timm.data.create_dataset,
        args.dataset,
        root=args.data_dir,
        download=args.dataset_download,
        class_map=args.class_map,
        seed=args.seed,
        input_img_mode="L" if input_size[0] == 1 else "RGB",
        input_key=args.input_key,
        target_key=args.target_key,
    )
    try:
        train = create(
            split=args.train_split, is_training=True, batch_size=args.batch_size, num_samples=args.train_num_samples
        )
        val = create(split=args.val_split, batch_size=val_batch_size, num_samples=args.val_num_samples)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"can't open data set {args.dataset!r} in {args.data_dir}: {error}") from error
    labels = getattr(getattr(train, "reader", train), "class_to_idx", None) or {}
    if labels and max(labels.values()) >= num_classes:
        count = max(labels.values()) + 1
        raise ValueError(f"the data has {count} classes, the model {num_classes}: give --num-classes {count}")
    return [train, val]


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
    # A stop signal to the process group must not end the workers before the run has saved.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    logging.getLogger(STREAM_LOGGER).addHandler(_SkippedSampleHandler(skipped))


def _seed(*entropy: int) -> int:
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


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
        ValueError: The data don't fill a batch.
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
            dataset.set_loader_cfg(num_workers=workers)
        else:
            order = (
                RepeatAugSampler(dataset, world_size, rank, num_repeats=args.aug_repeats)
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
        indices = self.dataset.corrupt.nonzero().flatten().tolist()
        return len(indices), [self.dataset.filename(index) for index in indices]


def create_validation_loader(
    dataset: Dataset,
    args: argparse.Namespace,
    data_config: dict[str, Any],
    device: torch.device,
    rank: int,
    world_size: int,
) -> PrefetchLoader:
    """Validation batches of one process, in order; the sampler says how many are padding.

    Args:
        dataset: Validation set of :func:`create_datasets`, without a transform.
        args: Arguments of train.py.
        data_config: timm's resolved data configuration of the model.
        device: Device of the batches.
        rank: Rank of this process.
        world_size: Number of processes.
    """
    dataset.transform = timm.data.create_transform(
        data_config["input_size"],
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        use_prefetcher=True,
    )
    stream = isinstance(dataset, IterableDataset)
    if stream:
        dataset.set_loader_cfg(num_workers=args.workers)
    loader = DataLoader(
        dataset,
        batch_size=args.validation_batch_size or args.batch_size,
        sampler=None if stream else OrderedDistributedSampler(dataset, world_size, rank),
        num_workers=args.workers,
        collate_fn=fast_collate,
        pin_memory=device.type == "cuda",
        worker_init_fn=partial(_init_worker, skipped=multiprocessing.Value("q", 0)),
        generator=torch.Generator(),  # its own: starting the workers must not advance the run's random state
    )
    return PrefetchLoader(
        loader, data_config["mean"], data_config["std"], channels=data_config["input_size"][0], device=device
    )


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
