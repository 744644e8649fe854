"""A model made static for ``export.py``, and what that costs in accuracy."""

import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from common.image_folders import FolderReader, find_split
from common.images import ImageSet, channels_mode
from common.inference import Accuracy, inference_loader
from fdconv_zoo import to_static

BATCH_SIZE = 32


def calibrate(model: nn.Module, root: Path, images: int, labelled: Dataset, config: dict[str, Any]) -> nn.Module:
    """Make a model static with its weights at their mean over images, and print its accuracy before and after.

    Args:
        model: It becomes the static one.
        root: Of the data set. The mean is over images of its split for training, where it has one.
        images: How many, drawn at random.
        labelled: To measure the accuracy on.
        config: Preprocessing, as timm's loader takes it.

    Raises:
        UnusableImagesError: No image can be read.
    """
    reader = FolderReader(_folder(root))
    # Drawn once for all: the same file comes out again.
    reader.samples = random.Random(0).sample(reader.samples, min(images, len(reader)))
    print(f"accuracy of the dynamic model, on {len(labelled):,} images ...", file=sys.stderr, flush=True)
    dynamic = measure(model, labelled, config)
    print(f"means over {len(reader):,} images of {reader.root} ...", file=sys.stderr, flush=True)
    static = to_static(model, load(ImageSet(reader, channels_mode(config["input_size"][0])), config))
    result = measure(static, labelled, config)
    print(
        f"{'':<10}{'top-1':>9}{'top-5':>9}   on {len(labelled):,} images, means over {len(reader):,} of {reader.root}"
    )
    for name, (top1, top5) in (("dynamic", dynamic), ("static", result)):
        print(f"{name:<10}{top1:>9.3f}{top5:>9.3f}", flush=True)
    return static


def _folder(root: Path) -> Path:
    for split in ("train", "validation"):
        try:
            return find_split(root, split)
        except ValueError:
            continue
    return root


def load(dataset: Dataset, config: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the images that can be read, preprocessed as for inference, and their labels."""
    loader = inference_loader(dataset, config, BATCH_SIZE, torch.device("cpu"))
    return ((images, target) for images, target in loader if len(images))


@torch.inference_mode()
def measure(model: nn.Module, dataset: Dataset, config: dict[str, Any]) -> tuple[float, float]:
    """Top-1 and top-5 accuracy in per cent.

    Raises:
        UnusableImagesError: No image can be read.
    """
    counted = Accuracy()
    for images, target in load(dataset, config):
        counted.update(model(images), target)
    return counted.compute()
