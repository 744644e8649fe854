"""Images of timm's readers as 8-bit pictures, and what is done about those that can't be read."""

import contextlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from timm.data.loader import fast_collate
from timm.data.readers.reader import Reader
from torch import Tensor
from torch.utils.data import Dataset

_logger = logging.getLogger("images")


class UnusableImagesError(RuntimeError):
    """Images that nothing sensible can be done with; the message names one and says why."""

    def __str__(self) -> str:
        # One that was raised in a loader process has its whole traceback in front.
        return super().__str__().strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: ")


class CorruptImageError(OSError):
    """An image can't be decoded; the message names it."""


def channels_mode(channels: int) -> str:
    """Pillow's name of a model's channels: grey for one."""
    return "L" if channels == 1 else "RGB"


def decode_image(file: BinaryIO, mode: str, name: Callable[[], str]) -> Image.Image:
    """Decode an image to 8 bits a channel; of 16-bit greys the whole range becomes 0 to 255.

    Pillow's own conversion would cut 16-bit values off at 255 and round floats in [0, 1] to black.

    Args:
        file: The encoded image.
        mode: Pillow's name of the wanted channels, `RGB` or `L`.
        name: Tells the image's name, for errors: some data sets read a whole sample for it.

    Raises:
        CorruptImageError: The image can't be decoded.
        UnusableImagesError: It has floats or 32-bit integers, whose black and white nobody knows.
    """
    try:
        image = Image.open(file)
        image.load()
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise CorruptImageError(f"{name()}: {error}") from error
    check_range(image, name)
    if _has_sixteen_bits(image):
        image = Image.fromarray(np.rint(np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
    return image.convert(mode)


def _has_sixteen_bits(image: Image.Image) -> bool:
    # Pillow brings greys of PGM files to 16 bits, and hands them over as it does 32.
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))


def check_range(image: Image.Image, name: Callable[[], str]) -> None:
    """Refuse an image whose pixels have no known range; its header is enough.

    Args:
        image: As `Image.open` returns it.
        name: Tells its name.

    Raises:
        UnusableImagesError: It has floats or 32-bit integers.
    """
    if image.mode in ("F", "I") and not _has_sixteen_bits(image):
        raise UnusableImagesError(
            f"{name()} has {'floating-point' if image.mode == 'F' else '32-bit integer'} pixels, whose black and white "
            "nobody knows: save it with 8 or 16 bits"
        )


def check_ranges(paths: Sequence[str], workers: int) -> None:
    """Refuse the first of some files, by their headers, whose pixels have no known range; what is corrupt is left.

    Args:
        paths: Of images; among a folder's only TIFFs need it.
        workers: Threads that read.

    Raises:
        UnusableImagesError: See :func:`check_range`.
    """

    def check(path: str) -> None:
        with contextlib.suppress(OSError, SyntaxError), Image.open(path) as image:
            check_range(image, lambda: path)

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        list(pool.map(check, paths))


def load_image(path: str, mode: str) -> Image.Image:
    """Decode the image in a file, see :func:`decode_image`; for torchvision's data sets."""
    with open(path, "rb") as file:
        return decode_image(file, mode, lambda: path)


class ImageSet(Dataset):
    """Images and labels of one of timm's readers.

    Args:
        reader: Gives a file and a label for each index, and names for errors.
        mode: Pillow's name of the channels, `RGB` or `L`.

    Attributes:
        transform: Of the decoded image.
    """

    def __init__(self, reader: Reader, mode: str = "RGB") -> None:
        self.reader, self.mode = reader, mode
        self.transform: Callable[[Image.Image], Any] | None = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Returns image and label, -1 where there is none.

        Raises:
            CorruptImageError: The image can't be decoded.
            UnusableImagesError: Its pixels have no known range.
        """
        file, label = self.reader[index]
        with file:
            image = decode_image(file, self.mode, partial(self.filename, index))
        return image if self.transform is None else self.transform(image), -1 if label is None else label

    def filename(self, index: int) -> str:
        """Path of an image, within the folder or the data set; its index where it has none."""
        return str(self.reader.filename(index) or f"index {index}")


class CorruptImages:
    """The images of a data set that could not be read, noted by all its loader processes.

    Args:
        dataset: Has a method `filename` where the images have names.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.flags = torch.zeros(len(dataset), dtype=torch.uint8).share_memory_()

    def note(self, index: int, error: OSError) -> None:
        """Note an image, and say so the first time."""
        if not self.flags[index]:
            self.flags[index] = 1
            named = isinstance(error, CorruptImageError)
            _logger.warning(f"left out: {error}" if named else f"left out {self.name(index)}: {error}")

    def names(self) -> list[str]:
        """Names of those found so far: paths, or indices where the images have none."""
        return [self.name(index) for index in self.flags.nonzero().flatten().tolist()]

    def name(self, index: int) -> str:
        """Path of an image, its index where it has none."""
        filename = getattr(self.dataset, "filename", None)
        return filename(index) if filename else f"index {index}"


class ReadableImages(Dataset):
    """A data set to be measured on: ``None`` stands for an image that can't be read, see :func:`collate_readable`.

    Args:
        dataset: Images and labels.

    Attributes:
        corrupt: The images that could not be read.
        transform: The data set's own.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.corrupt = CorruptImages(dataset)

    @property
    def transform(self) -> Callable[[Image.Image], Any] | None:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Callable[[Image.Image], Any]) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int] | None:
        try:
            return self.dataset[index]
        except OSError as error:
            self.corrupt.note(index, error)
            return None


def collate_readable(samples: list[tuple[Any, int] | None], channels: int) -> tuple[Tensor, Tensor]:
    """timm's collation without the images that can't be read; a batch of length 0 where none can."""
    readable = [sample for sample in samples if sample is not None]
    if not readable:
        return torch.zeros(0, channels, 1, 1, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)
    return fast_collate(readable)
