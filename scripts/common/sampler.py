"""Training data with augmentations that do not depend on how far a process got.

The sampler of a room yields keys (index, epoch, position), and the data set draws all randomness of a sample from
(seed, epoch, position). A run that is resumed at a position therefore sees what the uninterrupted run saw, whatever the
number of loader workers, without decoding the images it skips; and the samples of an epoch are the same for any number
of processes that share them out evenly.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from common.images import CorruptImages, UnusableImagesError

MAX_CONSECUTIVE_CORRUPT = 10


class SampleKey(NamedTuple):
    """What a sampler asks the data set for: an image, and the place in training that it is for."""

    index: int
    epoch: int
    position: int


@contextmanager
def seeded(entropy: tuple[int, ...]) -> Iterator[None]:
    """Seed Python's, NumPy's and PyTorch's CPU generators, and put them back as they were afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed would reseed the GPU's generator too, which the model's dropout uses.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class SeededDataset(Dataset):
    """Map-style data set addressed by :class:`SampleKey`, which notes the images that can't be read.

    The next image takes the place of one that fails to load with an ``OSError``, as in timm's ``ImageDataset``.

    Args:
        dataset: Images and labels.
        seed: Seed of the run.

    Attributes:
        corrupt: The images that could not be read.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.corrupt = CorruptImages(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, Any]:
        with seeded((self.seed, key.epoch, key.position)):
            for offset in range(MAX_CONSECUTIVE_CORRUPT):
                index = (key.index + offset) % len(self)
                try:
                    return self.dataset[index]
                except OSError as error:
                    self.corrupt.note(index, error)
        raise UnusableImagesError(
            f"{MAX_CONSECUTIVE_CORRUPT} images in a row from {self.corrupt.name(key.index)} on can't be read"
        )
