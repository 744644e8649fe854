"""Which query is matched to which target: the cheapest assignment."""

from collections.abc import Sequence

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from .config import MaskDinoConfig
from .parts import pair_wise_dice_loss, pair_wise_sigmoid_cross_entropy_loss, sample_point
from .types import Prediction, Target

ALPHA, GAMMA = 0.25, 2  # of the focal loss
Pairs = list[tuple[Tensor, Tensor]]


def class_cost(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the focal cost (Q, n) of logits (Q, K or K + 1) for labels (n,).

    Of each class alone, also where the classes are softmax's: "none" then costs nothing.
    """
    p = logits.sigmoid()[:, labels]
    positive = ALPHA * (1 - p) ** GAMMA * -torch.log(p + 1e-8)
    return positive - (1 - ALPHA) * p**GAMMA * -torch.log(1 - p + 1e-8)


def costs(logits: Tensor, boxes: Tensor, masks: Tensor, target: Target, config: MaskDinoConfig) -> Tensor:
    """Return what it costs (Q, n) to match each query of an image to each target, all in float32.

    Masks are compared at random points, the same for all.

    Args:
        logits: (Q, K or K + 1).
        boxes: (Q, 4).
        masks: Logits (Q, h, w).
        target: Of the image.
        config: Of the head.
    """
    points = torch.rand(1, config.num_points, 2, device=masks.device)
    found = sample_point(masks[None], points, align_corners=False)[0]
    wanted = sample_point(target.masks[None].float(), points, align_corners=False)[0]
    overlap = generalized_box_iou(box_convert(boxes, "cxcywh", "xyxy"), box_convert(target.boxes, "cxcywh", "xyxy"))
    return (
        config.class_weight * class_cost(logits, target.labels)
        + config.box_weight * torch.cdist(boxes, target.boxes, p=1)
        - config.giou_weight * overlap
        + config.mask_weight * pair_wise_sigmoid_cross_entropy_loss(found, wanted)
        + config.dice_weight * pair_wise_dice_loss(found, wanted)
    )


@torch.no_grad()
def match(prediction: Prediction, targets: Sequence[Target], config: MaskDinoConfig) -> Pairs:
    """Return for each image the matched queries and their targets (n,), in the order of the queries.

    Args:
        prediction: Of all images, float32.
        targets: Of each image.
        config: Of the head.

    Raises:
        RuntimeError: A cost is not finite.
    """
    pairs = []
    for index, target in enumerate(targets):
        if not len(target.labels):
            nothing = target.labels.new_zeros(0, dtype=torch.int64)
            pairs.append((nothing, nothing))
            continue
        logits, boxes, masks = (part[index] for part in prediction)
        cost = costs(logits, boxes, masks, target, config).cpu()
        if not cost.isfinite().all():
            raise RuntimeError(f"the cost of matching image {index} is not finite: the training has diverged")
        pairs.append(tuple(torch.from_numpy(part).to(masks.device) for part in linear_sum_assignment(cost)))
    return pairs
