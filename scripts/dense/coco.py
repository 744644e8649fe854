"""Images with boxes and masks from a COCO-format json, as torchvision's detectors take them."""

import contextlib
import io
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.transforms import v2
from torchvision.tv_tensors import BoundingBoxes, Mask
from torchvision.tv_tensors import Image as ImageTensor

from common.images import check_range, load_image

Target = dict[str, Tensor]
KEYS = ("boxes", "labels", "iscrowd", "area")
ROUNDED = 1  # pixels that a box may lie beyond its image by rounding, as COCO's own do


class CocoObjects(CocoDetection):
    """torchvision's data set with the objects that a detector learns, and errors that name the file.

    Labels, in place of the categories' ids, are 1 and up in the order of the ids. Objects without an area, or outside
    of their image, are left out; boxes that lie partly outside are cut off at its edge.

    Args:
        images: Folder of the images.
        annotations: The json.
        train: Leaves out objects that stand for crowds, which are for the evaluation, and images without objects.
        with_masks: Objects must have a segmentation.
        transforms: Of image and target.

    Attributes:
        categories: Their ids, in order.
        category_names: Their names by id.
        left_out: What of the json is not used, in words, with its number.
        cut_off: Number of boxes that were cut off.

    Raises:
        ValueError: The json can't be used, an image is missing, or no image is left.
    """

    def __init__(
        self, images: Path, annotations: Path, train: bool, with_masks: bool, transforms: v2.Transform
    ) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                super().__init__(images, str(annotations), transforms=transforms)
        except (OSError, ValueError) as error:
            raise ValueError(f"can't read {annotations}: {error}") from error
        except KeyError as error:
            raise ValueError(f"{annotations} is no COCO file of boxes: an entry has no {error}") from error
        except (AssertionError, TypeError) as error:
            raise ValueError(f"{annotations} is no COCO file of boxes: {error}") from error
        missing = [key for key in ("images", "annotations", "categories") if key not in self.coco.dataset]
        if missing:
            raise ValueError(f"{annotations} is no COCO file of boxes: it has no {', '.join(missing)}")
        self.annotations, self.train = annotations, train
        self.categories = sorted(self.coco.cats)
        self.category_names = {key: str(self.coco.cats[key].get("name")) for key in self.categories}
        self.label_of = {category: label for label, category in enumerate(self.categories, 1)}
        unknown = {entry["category_id"] for entry in self.coco.anns.values()} - set(self.categories)
        if unknown:
            raise ValueError(f"{annotations} has objects of unknown category_id {sorted(unknown)[:5]}")
        self.cut_off = 0
        self.left_out = self._check_objects(annotations, with_masks)
        listed = len(self.ids)
        self.ids = [key for key in self.ids if not train or self._load_target(key)]
        self.left_out["images without objects"] = listed - len(self.ids)
        if not self.ids:
            raise ValueError(f"{annotations} has no images{' with objects' if train else ''}")
        present = {path.name for path in images.iterdir()} if images.is_dir() else set()
        names = [self.coco.imgs[key]["file_name"] for key in self.ids]
        # names may have folders in them
        gone = [name for name in names if name not in present and not (images / name).is_file()]
        if gone:
            raise ValueError(f"{len(gone)} of {len(names)} images of {annotations} are not in {images}: {gone[0]}, ...")

    def _check_objects(self, annotations: Path, with_masks: bool) -> Counter[str]:
        """Count the objects that can't be used; refuse those that should have been usable."""
        left_out: Counter[str] = Counter()
        entries = self.coco.dataset["annotations"]  # `coco.anns` has one of those with the same id
        for entry in entries:
            box = entry.get("bbox")
            if not isinstance(box, list) or len(box) != 4:
                raise ValueError(f"{annotations}: object {entry['id']} has the bbox {box}, not [x, y, width, height]")
        if entries and all(0 <= value <= 1 for entry in entries for value in entry["bbox"]):
            raise ValueError(f"{annotations}: all boxes lie between 0 and 1, but those of COCO are in pixels")
        for entry in entries:
            if entry["image_id"] not in self.coco.imgs:
                left_out["objects of images that are not listed"] += 1
            elif min(entry["bbox"][2:]) <= 0:
                left_out["objects without an area"] += 1
            elif not self._lies_inside(entry):
                left_out["objects outside of their image"] += 1
            elif self.train and entry.get("iscrowd", 0):
                left_out["crowds"] += 1
            elif with_masks and not entry.get("segmentation"):
                raise ValueError(
                    f"{annotations}: object {entry['id']} has no segmentation, from which mask_rcnn learns "
                    "(and maskdino_instance): faster_rcnn and retinanet need boxes only"
                )
        return left_out

    def _lies_inside(self, entry: dict[str, Any]) -> bool:
        """Cut an object's box off at the edge of its image; whether something is left of it."""
        size = self._image_size(entry["image_id"])
        if size is None:
            return True
        x, y, width, height = entry["bbox"]
        left, top, right, bottom = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
        if max(left - x, top - y, x + width - right, y + height - bottom) > ROUNDED:
            entry["bbox"] = [left, top, max(right - left, 0), max(bottom - top, 0)]
            if "area" in entry:
                entry["area"] = min(entry["area"], entry["bbox"][2] * entry["bbox"][3])
            self.cut_off += right > left and bottom > top
        return right > left and bottom > top

    def _image_size(self, id: int) -> tuple[int, int] | None:
        """Width and height by the json, by the file where it has none; None where that can't be read either."""
        image = self.coco.imgs[id]
        if not (image.get("width") and image.get("height")):
            try:
                with Image.open(self.root / image["file_name"]) as file:
                    image["width"], image["height"] = file.size  # kept: it is asked for with each object
            except (OSError, SyntaxError):
                return None
        return image["width"], image["height"]

    def check(self, part: slice, workers: int) -> None:
        """Read the headers of images, before a training breaks off at one, or goes by boxes of other pixels.

        Args:
            part: Which of the images.
            workers: Threads that read.

        Raises:
            ValueError: A file can't be read, or has another size than the json says; names it.
            UnusableImagesError: Its pixels have no known range.
        """
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            list(pool.map(self._check_image, self.ids[part]))

    def _check_image(self, id: int) -> None:
        path = self.root / self.coco.imgs[id]["file_name"]
        try:
            with Image.open(path) as image:
                check_range(image, lambda: str(path))
                size = image.size
        except (OSError, SyntaxError) as error:
            raise ValueError(f"can't read {path}: {error}") from error
        if size != (said := self._image_size(id)):
            raise ValueError(
                f"{path} is {size[0]} x {size[1]} pixels, by {self.annotations} {said[0]} x {said[1]}: "
                "its boxes are those of another size"
            )

    def describe(self) -> str:
        """A line: images, categories, what of the json is not used, and what is cut off."""
        left_out = ", ".join(f"{count} {what}" for what, count in self.left_out.items() if count)
        line = f"{self.annotations}: {len(self)} images, {len(self.categories)} categories"
        if left_out:
            line += f", left out {left_out}"
        return f"{line}, {self.cut_off} boxes cut off at the edge of their image" if self.cut_off else line

    def _load_image(self, id: int) -> Image.Image:
        try:
            return load_image(str(self.root / self.coco.imgs[id]["file_name"]), "RGB")
        except OSError as error:
            raise ValueError(f"can't read {error}") from error

    def _load_target(self, id: int) -> list[dict[str, Any]]:
        return [
            {
                "iscrowd": 0,
                "area": entry["bbox"][2] * entry["bbox"][3],
                **entry,
                "category_id": self.label_of[entry["category_id"]],
            }
            for entry in self.coco.imgToAnns[id]
            if min(entry["bbox"][2:]) > 0 and not (self.train and entry.get("iscrowd", 0))
        ]


def complete_target(image: Image.Image, target: dict[str, Any], with_masks: bool) -> tuple[Image.Image, Target]:
    """Make tensors of the wrapper's lists; for an image without objects, of which it tells the id only, of length 0."""
    if "boxes" not in target:
        height, width = v2.functional.get_size(image)
        target = {
            "boxes": BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(height, width)),
            "labels": torch.zeros(0, dtype=torch.int64),
            "iscrowd": [],
            "area": [],
        }
        if with_masks:
            target["masks"] = Mask(torch.zeros(0, height, width, dtype=torch.uint8))
    iscrowd, area = torch.tensor(target["iscrowd"], dtype=torch.int64), torch.tensor(target["area"])
    return image, {**target, "iscrowd": iscrowd, "area": area}


def coco_boxes(images: Path, annotations: Path, with_masks: bool, train: bool) -> CocoObjects:
    """Images (3, H, W) in [0, 1] of a COCO json, with boxes (N, 4) as x1 y1 x2 y2, labels, iscrowd and area.

    Args:
        images: Folder of the images.
        annotations: The json.
        with_masks: Reads the objects' masks (N, H, W) too.
        train: Leaves out crowds and images without objects, and mirrors half of the images.

    Raises:
        ValueError: The json can't be used, an image is missing, or no image is left; later, where an image can't be
            decoded.
        UnusableImagesError: Later, where an image's pixels have no known range.
    """
    transforms = v2.Compose(
        [
            partial(complete_target, with_masks=with_masks),
            v2.ToImage(),
            v2.ToDtype({ImageTensor: torch.float32, BoundingBoxes: torch.float32, "others": None}, scale=True),
            v2.RandomHorizontalFlip(0.5 if train else 0.0),
            v2.ToPureTensor(),
        ]
    )
    keys = (*KEYS, "masks") if with_masks else KEYS
    return wrap_dataset_for_transforms_v2(CocoObjects(images, annotations, train, with_masks, transforms), keys)


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[list[Tensor], list[Target]]:
    """A batch is lists: images differ in size, and the detector puts them together."""
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
