"""Training data with augmentations that do not depend on how far a process got.

The sampler of a room yields keys (index, epoch, position), and the data set draws all randomness of a sample from
(seed, epoch, position). A run that is resumed at a position therefore sees what the uninterrupted run saw, whatever the
number of loader workers, without decoding the images it skips; and the samples of an epoch are the same for any number
of processes.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import ImageDataset
from torch.utils.data import Dataset

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


class _RecordingReader:
    """Reader that remembers the indices it was asked for, which shows what timm's ``ImageDataset`` skipped."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.requested: list[int] = []

    def __getitem__(self, index: int) -> Any:
        self.requested.append(index)
        return self.reader[index]

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # not there yet while a spawned worker unpickles this object
            raise AttributeError(name)
        return getattr(self.reader, name)


class SeededDataset(Dataset):
    """Map-style data set addressed by :class:`SampleKey`, which notes the images that can't be read.

    The next image takes the place of one that fails to load with an ``OSError``, as in timm's ``ImageDataset``.

    Args:
        dataset: Data set of timm or torchvision.
        seed: Seed of the run.

    Attributes:
        corrupt: Shared ``uint8`` tensor (len(dataset),), 1 where an image was found corrupt by any loader worker.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.corrupt = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()
        if isinstance(dataset, ImageDataset):
            dataset.reader = _RecordingReader(dataset.reader)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey) -> tuple[Any, Any]:
        with seeded((self.seed, key.epoch, key.position)):
            if isinstance(self.dataset, ImageDataset):
                return self._read_image_dataset(key.index)
            for offset in range(MAX_CONSECUTIVE_CORRUPT):
                index = (key.index + offset) % len(self)
                try:
                    return self.dataset[index]
                except OSError:
                    self.corrupt[index] = 1
        raise RuntimeError(f"{MAX_CONSECUTIVE_CORRUPT} images in a row from index {key.index} on can't be read")

    def _read_image_dataset(self, index: int) -> tuple[Any, Any]:
        requested = self.dataset.reader.requested
        requested.clear()
        sample = self.dataset[index]
        self.corrupt[requested[:-1]] = 1
        return sample

    def filename(self, index: int) -> str:
        """Name of an image for a report: its path where the data set has one, its index where not."""
        if isinstance(self.dataset, ImageDataset):
            return str(self.dataset.filename(index))
        return f"index {index}"
