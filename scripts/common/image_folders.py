"""Folders of images, one folder a class: the folder of a split, the numbers of the classes, and what is not read."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from timm.data.readers.reader import Reader
from timm.utils.misc import natural_key
from torch.utils.data import Dataset, IterableDataset
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

ENDINGS = frozenset(IMG_EXTENSIONS)
# Names of one split, as timm takes them for the same.
SYNONYMS = (
    ("train", "training"),
    ("val", "valid", "validation", "eval", "evaluation"),
    ("test", "testing"),
)


def find_split(root: Path, split: str) -> Path:
    """The folder of a split in the root of a data set.

    Args:
        root: It has a folder for each split, and those a folder for each class.
        split: Name of the split or a synonym of it.

    Raises:
        ValueError: There is no such folder; names those there are.
    """
    names = [split, *next((group for group in SYNONYMS if split in group), ())]
    for name in names:
        if (root / name).is_dir():
            return root / name
    folders = sorted(child.name for child in root.iterdir() if child.is_dir())
    there = ", ".join(folders[:8]) + (f", ... ({len(folders)} in all)" if len(folders) > 8 else "")
    raise ValueError(f"{root} has no folder for the split {split}; its folders: {there or 'none'}")


def find_split_or_root(root: Path, split: str | None) -> Path:
    """The folder to validate on: that of the split, or without one the root itself if it has no splits.

    Raises:
        ValueError: The split is not there, or the root has splits and none of them is for validation, or they lie in
            a folder of it.
    """
    if split is not None:
        return find_split(root, split)
    splits = {name for group in SYNONYMS for name in group}
    if any(child.name.lower() in splits for child in root.iterdir() if child.is_dir()):
        return find_split(root, "validation")
    # Taken for parts of the way to a class, all splits would be measured on.
    deeper = min((path for path in root.glob("*/*") if path.name.lower() in splits and path.is_dir()), default=None)
    if deeper is not None:
        raise ValueError(f"{root} has a folder {deeper.relative_to(root)}: give {deeper.parent}, which has the splits")
    return root


def describe_ignored(ignored: Counter[str]) -> str:
    """What a line says of files that are not read, counted by ending."""
    return "".join(f", {count} {ending} ignored" for ending, count in ignored.most_common(6))


def renumber(folder: ImageFolder, numbers: Mapping[str, int]) -> None:
    """Gives the classes of torchvision's reader of folders other numbers, by their names."""
    folder.target_transform = [numbers[name] for name in folder.classes].__getitem__


def describe_named(split: str, dataset: Dataset, labels: Mapping[str, int]) -> str:
    """A line on a split of a data set that is no folder: images and classes, where it tells them.

    Args:
        split: Its name.
        dataset: A stream may not tell its length.
        labels: Numbers of the classes by name; empty where they have no names.
    """
    images = "a stream of images" if isinstance(dataset, IterableDataset) else f"{len(dataset)} images"
    return f"{split}: {images}" + (f", {len(labels)} classes" if labels else "")


def _order(name: str) -> tuple[Any, str]:
    """timm's order of names, and one of those that are alike to it: a and A, 1 and 01. Sets have another every time."""
    return natural_key(name), name


class FolderReader(Reader):
    """Images of a folder with labels, for timm's data sets: timm's folder reader, which leaves nothing out in silence.

    A class is the name of the folder that the images lie in; classes are numbered and images are sorted as timm does.
    Hidden files and folders are none of it.

    Args:
        root: The folder of a split.
        class_to_idx: Numbers of the classes; ``None`` numbers those that are found.

    Attributes:
        samples: Path and label of each image.
        class_to_idx: Numbers of the classes.
        missing: Classes with a number and no image.
        ignored: Files that are not read, by ending.
        nested: Some images lie deeper than in a folder of the root.

    Raises:
        ValueError: There are no images, some lie outside of the classes' folders, or have no number.
    """

    def __init__(self, root: Path, class_to_idx: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.root = root
        self.ignored: Counter[str] = Counter()
        self.nested = False
        found: list[tuple[str, str]] = []
        for folder, folders, names in os.walk(root, followlinks=True):
            # Jupyter keeps copies in .ipynb_checkpoints, macOS a ._x.jpg beside x.jpg: no class, and no image.
            folders[:] = [name for name in folders if not name.startswith(".")]
            label = "" if folder == str(root) else os.path.basename(folder)
            for name in names:
                ending = os.path.splitext(name)[1].lower()
                if name.startswith("."):
                    continue
                if ending in ENDINGS:
                    found.append((os.path.join(folder, name), label))
                    self.nested |= bool(label) and os.path.dirname(folder) != str(root)
                else:
                    self.ignored[ending or "without an ending"] += 1
        if not found:
            raise ValueError(
                f"Found 0 images in {root}{describe_ignored(self.ignored)}; images end in {', '.join(sorted(ENDINGS))}"
            )
        if stray := [path for path, label in found if not label]:
            raise ValueError(
                f"{len(stray)} images lie in {root} itself, in no folder of a class: {min(stray)}, ...; "
                "the place is <split>/<class>/<image>"
            )
        classes = {label for _, label in found}
        if class_to_idx is None:
            class_to_idx = {label: index for index, label in enumerate(sorted(classes, key=_order))}
        if unknown := sorted(classes - class_to_idx.keys(), key=_order):
            shown = ", ".join(unknown[:3]) + (", ..." if len(unknown) > 3 else "")
            raise ValueError(f"{root} has {len(unknown)} unknown classes: {shown}")
        self.class_to_idx = dict(class_to_idx)
        self.missing = sorted(self.class_to_idx.keys() - classes, key=_order)
        self.samples = [(path, self.class_to_idx[label]) for path, label in found]
        self.samples.sort(key=lambda sample: _order(sample[0]))

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        path, label = self.samples[index]
        return open(path, "rb"), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        path = self.samples[index][0]
        if basename:
            return os.path.basename(path)
        return path if absolute else os.path.relpath(path, self.root)

    def describe(self) -> str:
        """A line: images, classes, those without images, and the files that are not read, by ending."""
        classes = len(self.class_to_idx) - len(self.missing)
        line = f"{self.root}: {len(self)} images, {classes} class{'es' if classes > 1 else ''}"
        if self.nested:
            names = [name for name in self.class_to_idx if name not in self.missing]
            line += f" by the innermost folders ({', '.join(names[:3])}{', ...' if classes > 3 else ''})"
        if self.missing:
            shown = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
            line += f", none of {len(self.missing)} more ({shown})"
        return line + describe_ignored(self.ignored)
