"""Images with a class for each pixel, from a folder of images and one of PNG masks."""

import json
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pil_to_tensor
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from common.image_folders import ENDINGS, describe_ignored
from common.images import check_range, load_image


def pair_files(
    images: Path, masks: Path, image_suffix: str, mask_suffix: str
) -> tuple[list[tuple[Path, Path]], Counter[str]]:
    """Return the images, subfolders included, with the masks of the same names in the same subfolders.

    And the files among them that are no images, by ending.

    Args:
        images: Folder of images.
        masks: Folder of masks.
        image_suffix: End of an image's name; others are left out. Empty for all images, whatever their format.
        mask_suffix: Takes its place in the mask's name.

    Raises:
        ValueError: There are no images, or one has no mask.
    """
    files = [path for path in images.rglob("*") if path.is_file() and not path.name.startswith(".")]
    ignored = Counter(path.suffix.lower() or "without an ending" for path in files if not _is_image(path))
    found = [path for path in files if _is_image(path) and path.name.endswith(image_suffix)]
    if not found:
        whose = f" whose names end in {image_suffix}" if image_suffix else f"{describe_ignored(ignored)}"
        raise ValueError(f"no images in {images}{whose}; images end in {', '.join(sorted(ENDINGS))}")
    pairs = []
    for path in sorted(found):
        name = path.name.removesuffix(image_suffix or path.suffix) + mask_suffix
        pairs.append((path, (masks / path.relative_to(images)).with_name(name)))
    # Masks may lie beside the images.
    masks_found = {os.path.abspath(mask) for _, mask in pairs}
    pairs = [pair for pair in pairs if os.path.abspath(pair[0]) not in masks_found]
    if not pairs:
        raise ValueError(
            f"each image in {images} would be its own mask: --image-suffix and --mask-suffix tell them apart"
        )
    alone = [pair for pair in pairs if not pair[1].is_file()]
    if alone:
        image, mask = alone[0]
        raise ValueError(f"{len(alone)} of {len(pairs)} images in {images} have no mask: {mask} of {image} is missing")
    return pairs, ignored


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in ENDINGS


def check_sizes(path: Path, mask: Tensor, size: tuple[int, int]) -> None:
    """Refuse a mask (H, W) of another size than its image.

    Raises:
        ValueError: Names the file and both sizes.
    """
    if tuple(mask.shape) != size:
        raise ValueError(f"{path} is {tuple(mask.shape)} pixels, its image {size}")


def class_masks(labels: Tensor, ignore_index: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the targets of maps of labels (B, H, W): each image's classes (N,), and a mask of each (N, H, W).

    Pixels without a class are in no mask.
    """
    classes = [present[present != ignore_index] for present in (image.unique() for image in labels)]
    masks = [(image == present[:, None, None]).float() for image, present in zip(labels, classes, strict=True)]
    return masks, classes


def sum_over_processes(pixels: list[int], rank: int, world: int) -> list[int]:
    """Pixels of each class over the masks of all processes, by torchrun's store: a process group comes later.

    Args:
        pixels: Of the masks that this process has read.
        rank: Of this process.
        world: Number of processes.

    Returns:
        The sums in process 0, which waits for the others; its own in each other.
    """
    if world == 1:
        return pixels
    store, _, _ = next(rendezvous("env://"))
    counts = PrefixStore("pixels of masks", store)
    counts.set(str(rank), json.dumps(pixels))
    if rank:
        return pixels
    return [sum(column) for column in zip(*(json.loads(counts.get(str(i))) for i in range(world)), strict=True)]


class MaskFolders(Dataset):
    """Images (3, H, W), normalised, with masks (H, W) of class indices, int64.

    In training they are scaled, cropped, mirrored and shifted in color, of one size; in validation the image has the
    shorter side `scale_size` and the mask its own size.

    Args:
        images: Folder of images.
        masks: Folder of masks, PNG with the index of the class in each pixel.
        image_suffix: As for `pair_files`.
        mask_suffix: As for `pair_files`.
        num_classes: Classes, to check the masks.
        ignore_index: Pixels without a class.
        reduce_zero_label: 0 is without a class, and all others are one too high.
        mask_values: Values of the masks that are classes 0, 1 and so on, all others have no class; empty for masks
            that have the classes themselves.
        mean: Of each channel.
        std: Of each channel.
        scale_size: Shorter side in pixels.
        crop_size: Height and width of crops for training; None for validation.
        scale: Range of random scales, on top of `scale_size`.

    Raises:
        ValueError: There are no images, or one has no mask.
    """

    def __init__(
        self,
        images: Path,
        masks: Path,
        *,
        image_suffix: str,
        mask_suffix: str,
        num_classes: int,
        ignore_index: int,
        reduce_zero_label: bool,
        mask_values: Sequence[int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        scale_size: int,
        crop_size: tuple[int, int] | None,
        scale: tuple[float, float],
    ) -> None:
        self.images = images
        self.pairs, self.ignored = pair_files(images, masks, image_suffix, mask_suffix)
        self.mask_values = torch.tensor(mask_values, dtype=torch.int64)
        self.num_classes, self.ignore_index, self.reduce_zero_label = num_classes, ignore_index, reduce_zero_label
        self.crop_size = crop_size
        self.resize = v2.Resize(scale_size)
        normalize = [v2.ToDtype({ImageTensor: torch.float32, "others": None}, scale=True), v2.Normalize(mean, std)]
        if crop_size is None:
            self.transform = v2.Compose(normalize)
        else:
            low, high = (round(scale_size * factor) for factor in scale)
            self.transform = v2.Compose(
                [
                    v2.RandomResize(low, high + 1),
                    v2.RandomCrop(crop_size, pad_if_needed=True, fill={ImageTensor: 0, Mask: ignore_index}),
                    v2.RandomHorizontalFlip(),
                    v2.RandomPhotometricDistort(),
                    *normalize,
                ]
            )

    def __len__(self) -> int:
        return len(self.pairs)

    def describe(self) -> str:
        """A line: images, and the files among them that are not read, by ending."""
        return f"{self.images}: {len(self)} images{describe_ignored(self.ignored)}"

    def check(self, part: slice, workers: int) -> list[int]:
        """Read masks, and the sizes of their images, before a training breaks off at one.

        Args:
            part: Which of the images.
            workers: Threads that read.

        Returns:
            Pixels of each class.

        Raises:
            ValueError: As when an image is taken; names the file.
        """
        with ThreadPoolExecutor(max(workers, 1)) as pool:
            counts = list(pool.map(self._check_pair, self.pairs[part]))
        return torch.stack([torch.zeros(self.num_classes, dtype=torch.long), *counts]).sum(0).tolist()

    def _check_pair(self, pair: tuple[Path, Path]) -> Tensor:
        image_path, mask_path = pair
        try:
            mask = self._read_mask(mask_path)
            with Image.open(image_path) as image:
                check_range(image, lambda: str(image_path))
                size = (image.height, image.width)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"can't read {image_path} with its mask: {error}") from error
        if self.crop_size is not None:
            check_sizes(mask_path, mask, size)
        return mask[mask != self.ignore_index].bincount(minlength=self.num_classes)

    def _read_mask(self, path: Path) -> Tensor:
        mask = torch.from_numpy(np.array(Image.open(path)))
        if mask.is_floating_point():
            raise ValueError(f"{path} has floating-point values: a mask has integers, the index of each pixel's class")
        mask = mask.long()
        if mask.dim() != 2:
            raise ValueError(f"{path} has {tuple(mask.shape)} values: a mask has one a pixel, the index of its class")
        if ((mask < 0) & (mask != self.ignore_index)).any():
            raise ValueError(f"{path} has the negative class {int(mask.min())}")
        if len(self.mask_values):
            classes = torch.full((int(max(mask.max(), self.mask_values.max())) + 1,), self.ignore_index)
            classes[self.mask_values] = torch.arange(len(self.mask_values))
            # What is ignored may be negative, which as an index is counted from the end.
            mask = torch.where(mask < 0, self.ignore_index, classes[mask.clamp(min=0)])
        if self.reduce_zero_label:
            mask = torch.where((mask == 0) | (mask == self.ignore_index), self.ignore_index, mask - 1)
        if ((mask >= self.num_classes) & (mask != self.ignore_index)).any():
            values = mask[(mask >= self.num_classes) & (mask != self.ignore_index)].unique().tolist()
            raise ValueError(
                f"{path} has classes {values[:5]}, allowed are 0 to {self.num_classes - 1} and {self.ignore_index}"
            )
        return mask

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Returns image and mask.

        Raises:
            ValueError: A file can't be read, or a mask has other classes; names the file.
            UnusableImagesError: The image's pixels have no known range.
        """
        image_path, mask_path = self.pairs[index]
        try:
            image, mask = pil_to_tensor(load_image(str(image_path), "RGB")), self._read_mask(mask_path)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"can't read {image_path} with its mask: {error}") from error
        if self.crop_size is None:
            return self.transform(ImageTensor(self.resize(image))).as_subclass(Tensor), mask
        check_sizes(mask_path, mask, tuple(image.shape[-2:]))
        image, mask = self.transform(ImageTensor(image), Mask(mask))
        return image.as_subclass(Tensor), mask.as_subclass(Tensor)
