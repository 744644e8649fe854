"""MaskDINO's losses: classes, boxes and masks of every prediction, each matched anew, and of the noised slots."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss

from .config import MaskDinoConfig
from .denoising import noised_pairs
from .matcher import ALPHA, GAMMA, Pairs, match
from .parts import Mask2FormerConfig, Mask2FormerLoss
from .types import NoisedTargets, Outputs, Prediction, Target


def check_targets(targets: Sequence[Target], config: MaskDinoConfig) -> None:
    """Refuse targets that the losses would be wrong of.

    Raises:
        ValueError: Names the image and what is wrong.
    """
    sizes = {tuple(target.masks.shape[-2:]) for target in targets}
    if len(sizes) > 1:
        raise ValueError(f"masks of {sorted(sizes)} pixels: all must have the size of the padded images")
    for index, (labels, boxes, masks) in enumerate(targets):
        if not len(labels) == len(boxes) == len(masks):
            raise ValueError(f"image {index} has {len(labels)} labels, {len(boxes)} boxes and {len(masks)} masks")
        if not len(labels):
            continue
        if labels.min() < 0 or labels.max() >= config.num_classes:
            raise ValueError(f"image {index} has labels {labels.tolist()}: they must be 0 to {config.num_classes - 1}")
        if boxes.min() < 0 or boxes.max() > 1 or boxes[:, 2:].min() <= 0:
            raise ValueError(f"image {index} has boxes that are not (cx, cy, w, h) in [0, 1] with an area")


def targets_of_all_processes(targets: Sequence[Target], device: torch.device) -> Tensor:
    """Return the mean number of targets over all processes, at least 1."""
    count = torch.tensor(float(sum(len(target.labels) for target in targets)), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(count)
        count /= dist.get_world_size()
    return count.clamp(min=1)


class MaskDinoLoss(nn.Module):
    """All terms of a head's outputs.

    Args:
        config: Of the head.
    """

    def __init__(self, config: MaskDinoConfig) -> None:
        super().__init__()
        self.config = config
        part = Mask2FormerConfig(
            num_labels=config.num_classes,
            train_num_points=config.num_points,
            no_object_weight=config.no_object_weight,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
        )
        self.mask2former = Mask2FormerLoss(part, {})
        self.weights = {
            "loss_ce": config.class_weight,
            "loss_bbox": config.box_weight,
            "loss_giou": config.giou_weight,
            "loss_mask": config.mask_weight,
            "loss_dice": config.dice_weight,
        }

    def forward(
        self, outputs: Outputs, targets: Sequence[Target], denoising: NoisedTargets | None = None
    ) -> dict[str, Tensor]:
        """Returns the terms, unweighted.

        Their names end in nothing for the last prediction, `_0`, `_1` and so on for the others, `_interm` for the
        selection, and `_dn`, `_dn_1` and so on for noised slots. Without targets, terms but the classes' are 0.

        Args:
            outputs: Of the head in training.
            targets: Of each image, masks of the padded size.
            denoising: The noised targets that the head was given.

        Raises:
            ValueError: A target can't be one.
            RuntimeError: A prediction is not finite.
        """
        check_targets(targets, self.config)
        device = outputs.predictions[-1].masks.device
        count = targets_of_all_processes(targets, device)
        terms: dict[str, Tensor] = {}
        with torch.autocast(device.type, enabled=False):
            matched = _suffixed(outputs.predictions, "")
            if outputs.selection is not None:
                matched["_interm"] = outputs.selection
            for suffix, prediction in matched.items():
                prediction = _float(prediction)
                pairs = match(prediction, targets, self.config)
                terms |= self._terms(prediction, targets, pairs, count, suffix)
            if denoising is not None:
                noised = _suffixed(outputs.noised, "_dn")
                if not self.config.select_queries:
                    # content and boxes of learnt queries are parameters: the original has no such loss before a layer
                    del noised["_dn_0"]
                pairs = noised_pairs(targets, denoising)
                for suffix, prediction in noised.items():
                    terms |= self._terms(_float(prediction), targets, pairs, count * denoising.groups, suffix)
        return terms

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Returns the weighted sum; a term has the weight of its kind, whatever its suffix."""
        return torch.stack([self.weights["_".join(name.split("_")[:2])] * term for name, term in terms.items()]).sum()

    def _terms(
        self, prediction: Prediction, targets: Sequence[Target], pairs: Pairs, count: Tensor, suffix: str
    ) -> dict[str, Tensor]:
        """Return the five terms of one prediction.

        Args:
            prediction: Of all images, float32.
            targets: Of each image.
            pairs: Queries and targets of each image.
            count: What sums over objects are divided by.
            suffix: End of the terms' names.
        """
        query = torch.cat([queries for queries, _ in pairs])
        image = torch.cat([torch.full_like(queries, index) for index, (queries, _) in enumerate(pairs)])
        labels = torch.cat([target.labels[chosen] for target, (_, chosen) in zip(targets, pairs, strict=True)])
        wanted = torch.cat([target.boxes[chosen] for target, (_, chosen) in zip(targets, pairs, strict=True)])
        found = prediction.boxes[image, query]
        corners = (box_convert(boxes, "cxcywh", "xyxy") for boxes in (found, wanted))
        if self.config.softmax_classes:
            classes = self.mask2former.loss_labels(prediction.logits, [target.labels for target in targets], pairs)
            loss_ce = classes["loss_cross_entropy"]
        else:
            one_hot = torch.zeros_like(prediction.logits)
            one_hot[image, query, labels] = 1
            loss_ce = sigmoid_focal_loss(prediction.logits, one_hot, ALPHA, GAMMA, reduction="sum") / count
        masks = self.mask2former.loss_masks(
            masks_queries_logits=prediction.masks,
            mask_labels=[target.masks.float() for target in targets],
            indices=pairs,
            num_masks=count,
        )
        terms = {
            "loss_ce": loss_ce,
            "loss_bbox": (found - wanted).abs().sum() / count,
            "loss_giou": generalized_box_iou_loss(*corners, reduction="sum") / count,
            "loss_mask": masks["loss_mask"],
            "loss_dice": masks["loss_dice"],
        }
        return {f"{name}{suffix}": term for name, term in terms.items()}


def _suffixed(predictions: Sequence[Prediction], kind: str) -> dict[str, Prediction]:
    """Return predictions by the ends of their terms' names: the last has no number."""
    *earlier, last = predictions
    return {kind: last} | {f"{kind}_{number}": prediction for number, prediction in enumerate(earlier)}


def _float(prediction: Prediction) -> Prediction:
    return Prediction(*(part.float() for part in prediction))
