"""Images with boxes and masks from a COCO-format json, as torchvision's detectors take them."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask

Target = dict[str, Tensor]


def read_annotations(path: Path) -> COCO:
    """Read a COCO json.

    Raises:
        ValueError: The file can't be read or lacks a part; names it.
    """
    try:
        with path.open(encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"can't read {path}: {error}") from error
    missing = [key for key in ("images", "annotations", "categories") if key not in content]
    if missing:
        raise ValueError(f"{path} is no COCO file of boxes: it has no {', '.join(missing)}")
    coco = COCO()
    coco.dataset = content
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            coco.createIndex()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO file of boxes: an entry has no {error}") from error
    return coco


class CocoBoxes(Dataset):
    """Images of a COCO json with their objects; labels are 1 and up, in the order of the categories' ids.

    Args:
        images: Folder of the images.
        annotations: The json.
        with_masks: Reads the objects' masks too.
        train: Leaves out images without objects, and mirrors half of the images.

    Raises:
        ValueError: The json can't be used, an image is missing, or no image is left.
    """

    def __init__(self, images: Path, annotations: Path, with_masks: bool, train: bool) -> None:
        self.folder, self.with_masks, self.train = images, with_masks, train
        self.coco = read_annotations(annotations)
        self.categories = sorted(self.coco.cats)
        self.label_of = {category: label for label, category in enumerate(self.categories, 1)}
        self.ids = [key for key in sorted(self.coco.imgs) if not train or self._objects(key)]
        if not self.ids:
            raise ValueError(f"{annotations} has no images{' with objects' if train else ''}")
        present = {path.name for path in images.iterdir()} if images.is_dir() else set()
        names = [self.coco.imgs[key]["file_name"] for key in self.ids]
        # names may have folders in them
        gone = [name for name in names if name not in present and not (images / name).is_file()]
        if gone:
            raise ValueError(f"{len(gone)} of {len(names)} images of {annotations} are not in {images}: {gone[0]}, ...")
        unknown = {entry["category_id"] for entry in self.coco.anns.values()} - set(self.categories)
        if unknown:
            raise ValueError(f"{annotations} has objects of unknown category_id {sorted(unknown)[:5]}")
        self.mirror = v2.RandomHorizontalFlip(0.5 if train else 0.0)

    def _objects(self, key: int) -> list[dict[str, Any]]:
        """Objects of an image with an area; those that stand for crowds only where they are evaluated."""
        entries = self.coco.imgToAnns[key]
        return [
            entry for entry in entries if min(entry["bbox"][2:]) > 0 and not (self.train and entry.get("iscrowd", 0))
        ]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """Returns an image (3, H, W) in [0, 1] and its target with boxes (N, 4) as x1 y1 x2 y2, labels, iscrowd, area.

        Raises:
            ValueError: The image can't be decoded; names it.
        """
        key = self.ids[index]
        path = self.folder / self.coco.imgs[key]["file_name"]
        try:
            image = decode_image(str(path), ImageReadMode.RGB)
        except RuntimeError as error:
            raise ValueError(f"can't read {path}: {error}") from error
        size = tuple(image.shape[-2:])
        objects = self._objects(key)
        boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        target: dict[str, Any] = {
            "boxes": BoundingBoxes(boxes, format="XYXY", canvas_size=size),
            "labels": torch.tensor([self.label_of[entry["category_id"]] for entry in objects], dtype=torch.int64),
            "iscrowd": torch.tensor([entry.get("iscrowd", 0) for entry in objects], dtype=torch.int64),
            "area": torch.tensor([entry.get("area", entry["bbox"][2] * entry["bbox"][3]) for entry in objects]),
        }
        if self.with_masks:
            masks = [torch.from_numpy(self.coco.annToMask(entry)) for entry in objects]
            target["masks"] = Mask(torch.stack(masks) if masks else torch.zeros(0, *size, dtype=torch.uint8))
        image, target = self.mirror(v2.functional.to_dtype(image, torch.float32, scale=True), target)
        return image, {name: value.as_subclass(Tensor) for name, value in target.items()}


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch is lists: images differ in size, and the detector puts them together."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
