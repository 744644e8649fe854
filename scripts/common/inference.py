"""Inference over a data set: batches of the images that can be read, and the accuracy of the answers."""

from functools import partial
from typing import Any

import torch
from timm.data import create_loader
from timm.utils import AverageMeter, accuracy
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from common.images import ReadableImages, UnusableImagesError, collate_readable


def inference_loader(
    dataset: Dataset, config: dict[str, Any], batch_size: int, device: torch.device, workers: int = 0
) -> Any:
    """timm's loader of batches of images (B, C, H, W), preprocessed as for inference, and labels (B,).

    Images that can't be read are left out, and noted in `loader.dataset.corrupt`; a batch of none is of length 0. A
    stream is taken as it is.

    Args:
        dataset: Images and labels.
        config: Preprocessing, as timm's loader takes it.
        batch_size: Images at a time.
        device: That the batches are brought to.
        workers: Processes that read images.
    """
    stream = isinstance(dataset, IterableDataset)
    return create_loader(
        dataset if stream else ReadableImages(dataset),
        batch_size=batch_size,
        num_workers=workers,
        device=device,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        collate_fn=None if stream else partial(collate_readable, channels=config["input_size"][0]),
        **config,
    )


class Accuracy:
    """Top-1 and top-5 accuracy in per cent over batches."""

    def __init__(self) -> None:
        self._top1, self._top5 = AverageMeter(), AverageMeter()

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Count a batch: logits (B, classes), labels (B,)."""
        for meter, hits in zip((self._top1, self._top5), accuracy(logits, target, topk=(1, 5)), strict=True):
            meter.update(hits.item(), len(target))

    def compute(self) -> tuple[float, float]:
        """Top-1 and top-5.

        Raises:
            UnusableImagesError: No image was counted.
        """
        if not self._top1.count:
            raise UnusableImagesError("no image can be read")
        return self._top1.avg, self._top5.avg
