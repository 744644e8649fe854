"""The images that ``validate.py`` measures on, numbered as the model's outputs are."""

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from timm.data import (
    ImageDataset,
    ImageNetInfo,
    add_img_extensions,
    create_dataset,
    get_img_extensions,
    infer_imagenet_subset,
)
from timm.data.readers.class_map import load_class_map
from torch import nn
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder

from common.image_folders import ENDINGS, FolderReader, describe_named, find_split_or_root, renumber
from common.images import ImageSet, load_image
from fdconv_zoo.run_files import CLASSES_FILE


def open_dataset(args: argparse.Namespace, model: nn.Module, mode: str, tell: bool) -> Dataset:
    """Open the images, with the numbers of the model's outputs where they can be known.

    They are known from `--class-map`, from the classes.txt that a run of train.py leaves beside its checkpoint, from a
    published model's `label_names` if some folders have them, or where all folders are named by ImageNet synsets and
    the model is of ImageNet.

    Args:
        args: Arguments of validate.py.
        model: Has the outputs.
        mode: Pillow's name of the channels, `RGB` or `L`.
        tell: Print what is odd about the data.

    Raises:
        ValueError: A split is missing, or classes have no output.
    """
    open_numbered = _open_folder(args, mode) if _is_folder(args) else _open_named(args, mode)
    dataset = open_numbered(None)
    reader = getattr(dataset, "reader", None)
    if args.class_map and reader is None:
        raise ValueError("torch/ datasets take no --class-map")
    labels = found = _class_numbers(dataset)
    numbers, source = _known_numbers(args, model, labels)
    if not reader and type(dataset) is not ImageFolder:
        # torchvision's other sets have numbers of their own, and mostly other names for the same classes.
        if numbers is not None and numbers.keys() >= labels.keys() and labels.items() - numbers.items():
            raise ValueError(f"{args.dataset} numbers its classes otherwise than {source}")
        numbers = None
    if numbers is not None and labels:
        if unknown := sorted(labels.keys() - numbers.keys()):
            raise ValueError(
                f"{len(unknown)} classes of the data are not in {source}: {', '.join(unknown[:3])}"
                f"{', ...' if len(unknown) > 3 else ''}"
            )
        labels = numbers
    if numbers is not None and numbers != found:
        if reader:
            dataset = open_numbered(numbers)
        else:
            renumber(dataset, numbers)
    if labels and max(labels.values()) >= model.num_classes:
        raise ValueError(
            f"{len(labels)} classes in the data, {model.num_classes} outputs of the model: "
            "give --num-classes with a checkpoint, or --class-map"
        )
    if tell:
        print(
            dataset.reader.describe()
            if isinstance(reader, FolderReader)
            else describe_named(args.split or "validation", dataset, found),
            file=sys.stderr,
        )
        if numbers is None and labels and len(labels) < model.num_classes:
            print(
                f"warning: the model has {model.num_classes} outputs, the data {len(labels)} classes, taken for the "
                "first outputs in the order of their names; --class-map says otherwise",
                file=sys.stderr,
            )
    return dataset


def _is_folder(args: argparse.Namespace) -> bool:
    return not args.dataset and Path(args.data_dir).is_dir()


def _split_folder(args: argparse.Namespace) -> Path:
    root = Path(args.data_dir)
    try:
        return find_split_or_root(root, args.split)
    except ValueError as error:
        raise ValueError(f"{error}. Choose one with --split ('.' is {root} itself)") from error


def _open_folder(args: argparse.Namespace, mode: str) -> Callable[[Mapping[str, int] | None], Dataset]:
    folder = _split_folder(args)
    return lambda numbers: ImageSet(FolderReader(folder, numbers), mode)


def _open_named(args: argparse.Namespace, mode: str) -> Callable[[Mapping[str, int] | None], Dataset]:
    """How to open a tar file or a data set that timm has a name for."""
    create = partial(
        create_dataset,
        args.dataset,
        root=args.data_dir,
        split=args.split or "validation",
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_key=args.input_key,
        target_key=args.target_key,
        input_img_mode=mode,
    )
    if args.dataset.lower() in ("torch/image_folder", "torch/folder"):
        create = partial(create, root=_split_folder(args), search_split=False, loader=partial(load_image, mode=mode))

    add_img_extensions(tuple(ENDINGS - get_img_extensions(as_set=True)))  # for timm's reader of tar files

    def open_numbered(numbers: Mapping[str, int] | None) -> Dataset:
        dataset = create(class_map=dict(numbers) if numbers else None)
        return ImageSet(dataset.reader, mode) if isinstance(dataset, ImageDataset) else dataset

    return open_numbered


def _class_numbers(dataset: Dataset) -> Mapping[str, int]:
    reader = getattr(dataset, "reader", None)
    # the reader of tar files has another name for it
    return getattr(reader or dataset, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}


def _known_numbers(
    args: argparse.Namespace, model: nn.Module, labels: Mapping[str, int]
) -> tuple[Mapping[str, int] | None, str]:
    """Numbers of the model's outputs by class, and where they are from; None where nothing tells them."""
    beside = args.checkpoint.parent / CLASSES_FILE if args.checkpoint else None
    file = args.class_map or (str(beside) if beside and beside.is_file() else None)
    if file:
        try:
            return load_class_map(file, args.data_dir or ""), file
        except (AssertionError, OSError) as error:
            raise ValueError(f"can't read the names of classes in {file}: {error}") from error
    published = None if args.checkpoint else (getattr(model, "pretrained_cfg", None) or {}).get("label_names")
    names = {str(name): index for index, name in enumerate(published or ())}
    if names.keys() & labels.keys():
        return names, "the model's label_names"
    subset = infer_imagenet_subset(model)
    if subset and labels:
        synsets = {synset: index for index, synset in enumerate(ImageNetInfo(subset).label_names())}
        if labels.keys() <= synsets.keys():
            return synsets, "ImageNet"
    return None, ""
