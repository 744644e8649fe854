"""Folders of small images for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_images(root: Path, *places: str, count: int = 2, ending: str = ".png") -> Path:
    """Write ``count`` images of 40 x 32 pixels, each of one grey, into each place below ``root``."""
    for number, place in enumerate(places):
        (root / place).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (40, 32), (40 * number + i,) * 3).save(root / place / f"{i}{ending}")
    return root


def write_sixteen_bits(path: Path, value: int) -> None:
    """Write a 16-bit grey image of one value."""
    Image.fromarray(np.full((32, 32), value, np.uint16)).save(path)
