"""Fashion-MNIST as Debian's package dataset-fashion-mnist has it."""

import gzip
from pathlib import Path

import torch
from torch import Tensor

FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {split: (f"{split}-images-idx3-ubyte.gz", f"{split}-labels-idx1-ubyte.gz") for split in ("train", "t10k")}


def read_idx(path: Path) -> Tensor:
    """Read a gzipped idx file of bytes: the format of MNIST, a header with the sizes and then the values.

    Raises:
        ValueError: It is none.
    """
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    dims = data[3] if data[:3] == b"\0\0\x08" else 0
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    if not dims or len(data) != 4 + 4 * dims + torch.Size(shape).numel():
        raise ValueError(f"{path} is no idx file of bytes")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=4 + 4 * dims).view(shape)


def read_split(folder: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) uint8 and labels (N,) int64 of `train` or `t10k`.

    Raises:
        FileNotFoundError: A file is missing; says how to install it.
        ValueError: A file is not what it should be.
    """
    missing = [name for name in FILES[split] if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(
            f"no {missing[0]} in {folder}: run `apt-get install dataset-fashion-mnist` on Debian or Ubuntu, or give "
            "--data-dir"
        )
    images, labels = (read_idx(folder / name) for name in FILES[split])
    if images.dim() != 3 or len(images) != len(labels):
        raise ValueError(f"{folder}: {list(images.shape)} {split} images and {list(labels.shape)} labels")
    return images.unsqueeze(1), labels.long()
