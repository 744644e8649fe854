"""The data sets of ``train.py``: both splits with the same numbers for the same classes, and nothing in silence."""

import argparse
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm.data
from timm.data import ImageDataset, ImageNetInfo
from timm.data.readers.class_map import load_class_map
from torch.utils.data import Dataset
from torchvision.datasets import FakeData, ImageFolder

from common.image_folders import FolderReader, describe_named, find_split, renumber
from common.images import ImageSet, channels_mode, check_ranges, load_image

IMAGENET_IMAGES = 1_281_167
_logger = logging.getLogger("train")


def create_datasets(args: argparse.Namespace, rank: int = 0, world_size: int = 1) -> list[Dataset]:
    """Training set and validation set; nothing of the model is needed, so that mistakes are told before its download.

    Args:
        args: Arguments of train.py.
        rank: Of this process, which reads the headers of its part of the TIFFs.
        world_size: Number of processes.

    Raises:
        ValueError: The data can't be opened, or their labels don't fit each other.
        UnusableImagesError: A TIFF has pixels of unknown range.
    """
    if not args.dataset and not Path(args.data_dir).exists():
        raise ValueError(f"there is no data directory {args.data_dir}")
    mode = channels_mode(args.in_chans)
    train, val = _open_folders(args, mode) if not args.dataset else _open_named(args, mode)
    for split in (train, val):
        paths = [path for path, _ in _samples(split) if path.lower().endswith((".tif", ".tiff"))]
        check_ranges(paths[rank::world_size], args.workers)
    return [train, val]


def synthetic_datasets(args: argparse.Namespace, num_classes: int, input_size: tuple[int, int, int]) -> list[Dataset]:
    """Random images in place of both sets, as many for training as ImageNet has.

    Args:
        args: Arguments of train.py.
        num_classes: Classes of the model.
        input_size: (channels, height, width) of the images.
    """
    sizes = IMAGENET_IMAGES, args.validation_batch_size or args.batch_size
    return [FakeData(size, input_size, num_classes, random_offset=args.seed) for size in sizes]


def _samples(dataset: Dataset) -> list[tuple[str, int]]:
    """Paths and labels of a data set of one file an image, empty for others."""
    source = getattr(dataset, "reader", dataset)
    return source.samples if isinstance(source, FolderReader | ImageFolder) else []


def _open_folders(args: argparse.Namespace, mode: str) -> list[Dataset]:
    """The splits of a folder; a class has the number of the training set, whether or not others have images."""
    train_root, val_root = _split_folders(args)
    class_map = None
    if args.class_map:
        try:
            class_map = load_class_map(args.class_map, args.data_dir)
        except (AssertionError, OSError) as error:
            raise ValueError(f"can't read --class-map {args.class_map}: {error}") from error
    train = FolderReader(train_root, class_map)
    synsets = ImageNetInfo().label_names()
    if class_map is None and args.num_classes == len(synsets) and train.class_to_idx.keys() < set(synsets):
        # Some of ImageNet's classes for a classifier of all: its outputs keep their meaning, as validate.py takes them.
        train = FolderReader(train_root, {synset: index for index, synset in enumerate(synsets)})
    try:
        val = FolderReader(val_root, train.class_to_idx)
    except ValueError as error:
        raise ValueError(f"{error} (the numbers are those of {args.class_map or train_root})") from error
    for reader in (train, val):
        _logger.info(reader.describe())
    return [ImageSet(train, mode), ImageSet(val, mode)]


def _split_folders(args: argparse.Namespace) -> list[Path]:
    root = Path(args.data_dir)
    if not root.is_dir():
        raise ValueError(f"{root} is one file, which can't be both splits: unpack it into train/ and val/, or use wds/")
    try:
        return [find_split(root, split) for split in (args.train_split, args.val_split)]
    except ValueError as error:
        raise ValueError(
            f"{error}. Make {root}/train/<class>/ and {root}/val/<class>/, or name the folders with --train-split and "
            "--val-split"
        ) from error


def _open_named(args: argparse.Namespace, mode: str) -> list[Dataset]:
    """The splits of a data set that timm has a name for."""
    options = [
        {"split": args.train_split, "is_training": True, "batch_size": args.batch_size,
         "num_samples": args.train_num_samples},
        {"split": args.val_split, "batch_size": args.validation_batch_size or args.batch_size,
         "num_samples": args.val_num_samples},
    ]  # fmt: skip
    roots: list[Any] = [args.data_dir] * 2
    if args.dataset.lower() in ("torch/image_folder", "torch/folder"):
        roots = _split_folders(args)
        options = [{**option, "search_split": False, "loader": partial(load_image, mode=mode)} for option in options]
    create = partial(
        timm.data.create_dataset,
        args.dataset,
        download=args.dataset_download,
        class_map=args.class_map,
        seed=args.seed,
        input_img_mode=mode,
        input_key=args.input_key,
        target_key=args.target_key,
    )
    try:
        train, val = (create(root=root, **option) for root, option in zip(roots, options, strict=True))
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(f"can't open data set {args.dataset!r} in {args.data_dir}: {error}") from error
    _number_alike(train, val)
    for split, dataset in ((args.train_split, train), (args.val_split, val)):
        _logger.info(describe_named(split, dataset, class_numbers(dataset)))
    return [ImageSet(each.reader, mode) if isinstance(each, ImageDataset) else each for each in (train, val)]


def _number_alike(train: Dataset, val: Dataset) -> None:
    """Give the validation set the training set's numbers of the classes.

    Raises:
        ValueError: It has classes of its own, or numbers that can't be changed.
    """
    wanted, own = class_numbers(train), class_numbers(val)
    if wanted == own or not own:
        return
    unknown = sorted(own.keys() - wanted.keys())
    if unknown or not isinstance(val, ImageFolder):
        raise ValueError(
            f"validation has classes that training has not: {', '.join(unknown[:3])}"
            if unknown
            else "validation numbers its classes otherwise than training: give --class-map"
        )
    renumber(val, wanted)


def class_numbers(dataset: Dataset) -> Mapping[str, int]:
    """Numbers of the classes by name, empty where the data set tells none."""
    return getattr(getattr(dataset, "reader", dataset), "class_to_idx", None) or {}


def class_names(dataset: Dataset, num_classes: int) -> list[str]:
    """Names of the model's outputs, or of the first ones, by their numbers; empty where the data set tells others."""
    names = {index: str(name) for name, index in class_numbers(dataset).items()}
    told = range(min(len(names), num_classes))
    return [names[index] for index in told] if names.keys() == set(told) else []


def check_classes(dataset: Dataset, num_classes: int, chosen: bool) -> None:
    """Refuse a training set that the model's outputs are not made for; say so where more of them were chosen.

    Args:
        dataset: The training set.
        num_classes: Outputs of the model.
        chosen: The user gave their number.

    Raises:
        ValueError: There is one class only, or there are fewer outputs than classes, or more and nobody chose so.
    """
    labels = class_numbers(dataset)
    if labels and max(labels.values()) >= num_classes:
        count = max(labels.values()) + 1
        raise ValueError(f"the data has {count} classes, the model {num_classes}: give --num-classes {count}")
    if len(labels) == 1:
        raise ValueError(f"the training set has one class only, {next(iter(labels))}: a classifier needs two")
    if labels and len(labels) < num_classes:
        if not chosen:
            raise ValueError(
                f"the data has {len(labels)} classes, the model {num_classes} outputs: give "
                f"--num-classes {max(labels.values()) + 1} (or {num_classes}, to keep them)"
            )
        _logger.warning(f"the data has {len(labels)} classes, the model {num_classes} outputs: the rest learns nothing")


def check_same_classes(path: Path, names: list[str]) -> None:
    """Refuse data whose classes have other numbers than those of the run that is gone on with.

    Args:
        path: The run's file of names, one a line; older runs have none.
        names: Of the outputs by the data of now, empty where they tell none.

    Raises:
        ValueError: Names the first class that differs.
    """
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for index, (old, new) in enumerate(zip(before, names, strict=False)):
        if old != new:
            raise ValueError(
                f"output {index} is {old} by {path} and {new} by the data of now: a resumed run has the same classes, "
                "others are for a new run with --initial-checkpoint"
            )
