"""What a prediction says: a class for each pixel, instances, or a segment for each pixel (Section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert

from .config import MaskDinoConfig
from .types import Instances, Panoptic, Prediction

TEMPERATURE = 0.06  # that makes weights of sigmoid classes
MIN_SCORE = 0.25  # of a panoptic segment
MIN_OWNED = 0.8  # part of a mask that is not another's


def class_weights(logits: Tensor, config: MaskDinoConfig) -> Tensor:
    """Return how much a query stands for each class (..., K), in sum at most 1."""
    if config.softmax_classes:
        return logits.float().softmax(-1)[..., :-1]
    return (logits.float().sigmoid() / TEMPERATURE).softmax(-1)


def resize(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize maps (B, C, h, w) bilinearly."""
    return F.interpolate(masks.float(), size, mode="bilinear", align_corners=False)


def semantic(prediction: Prediction, config: MaskDinoConfig, padded_size: tuple[int, int]) -> Tensor:
    """Return a score (B, K, H, W) of each class at each pixel of the padded images.

    Args:
        prediction: The last one.
        config: Of the head.
        padded_size: H and W of the head's images, which are to be cut out of it.
    """
    masks = resize(prediction.masks, padded_size).sigmoid()
    return torch.einsum("bqk,bqhw->bkhw", class_weights(prediction.logits, config), masks)


def one_image(
    prediction: Prediction,
    index: int,
    padded_size: tuple[int, int],
    image_size: tuple[int, int],
    size: tuple[int, int],
) -> Prediction:
    """Return what is said of one image, (Q, ...), with masks and boxes in pixels of the image as it was.

    Args:
        prediction: Of a batch.
        index: Of the image.
        padded_size: H and W of the batch.
        image_size: H and W of the image in it.
        size: H and W of the image before it was resized.

    Returns:
        Logits (Q, K), boxes (Q, 4) as x1 y1 x2 y2, and logits of masks (Q, H, W).
    """
    masks = resize(prediction.masks[index : index + 1], padded_size)[..., : image_size[0], : image_size[1]]
    height, width = (padded * whole / part for padded, whole, part in zip(padded_size, size, image_size, strict=True))
    boxes = prediction.boxes[index].float()
    corners = box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor((width, height, width, height))
    return Prediction(prediction.logits[index], corners, resize(masks, size)[0])


def instances(
    prediction: Prediction, config: MaskDinoConfig, top: int = 100, things: set[int] | None = None
) -> Instances:
    """Return the objects with the best scores: of the class times how sure the mask is within itself.

    Args:
        prediction: Of `one_image`.
        config: Of the head.
        top: Pairs of a query and a class, at most.
        things: Classes that are counted, where there are others too; those of others among the best are left out.

    Raises:
        ValueError: The classes are softmax's.
    """
    _check_sigmoid(config)
    probabilities = prediction.logits.float().sigmoid()
    scores, index = probabilities.flatten().topk(min(top, probabilities.numel()))
    if things is not None:
        counted = torch.isin(index % config.num_classes, index.new_tensor(sorted(things)))
        scores, index = scores[counted], index[counted]
    query, labels = index // config.num_classes, index % config.num_classes
    logits = prediction.masks[query]
    masks = logits > 0
    sure = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    scores = scores * sure
    order = scores.argsort(descending=True)
    return Instances(*(part[order] for part in (scores, labels, prediction.boxes[query], masks)))


def panoptic(prediction: Prediction, config: MaskDinoConfig, things: set[int]) -> Panoptic:
    """Return the segments of one image; objects of stuff classes of the same class are one.

    Args:
        prediction: Of `one_image`.
        config: Of the head.
        things: Classes that are counted.

    Raises:
        ValueError: The classes are softmax's.
    """
    _check_sigmoid(config)
    kept = prediction.logits.float().sigmoid().amax(-1) > MIN_SCORE
    weights, classes = class_weights(prediction.logits[kept], config).max(-1)
    masks = prediction.masks[kept].sigmoid()
    segments = masks.new_zeros(masks.shape[-2:], dtype=torch.int32)
    found: list[int] = []
    if not len(masks):
        return Panoptic(segments, found)
    owner = (weights[:, None, None] * masks).argmax(0)
    stuff: dict[int, int] = {}
    for query, label in enumerate(classes.tolist()):
        owned, sure = owner == query, masks[query] >= 0.5
        segment = owned & sure
        if not segment.any() or owned.sum() / sure.sum() < MIN_OWNED:
            continue
        if label in stuff:
            segments[segment] = stuff[label]
            continue
        found.append(label)
        segments[segment] = len(found)
        if label not in things:
            stuff[label] = len(found)
    return Panoptic(segments, found)


def _check_sigmoid(config: MaskDinoConfig) -> None:
    if config.softmax_classes:
        raise ValueError("instances and panoptic segments need softmax_classes=False: each class a probability")
