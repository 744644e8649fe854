"""MaskDINO on any timm backbone: semantic segmentation, and instances as torchvision's detectors find them."""

import argparse
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import box_convert, clip_boxes_to_image, masks_to_boxes

from dense.backbones import create_backbone
from dense.coco import Target as CocoTarget
from dense.masks import class_masks
from fdconv_zoo.maskdino import (
    MaskDino,
    MaskDinoConfig,
    MaskDinoLoss,
    Prediction,
    Target,
    instances,
    noise_targets,
    one_image,
    semantic,
)

# of the published models for COCO
INSTANCE = {
    "extra_levels": 1,
    "coarse_first": False,
    "encoder_ffn_dim": 2048,
    "num_queries": 300,
    "select_queries": True,
    "initial_boxes": "bitmask",
    "softmax_classes": False,
}


class MaskDinoModel(nn.Module):
    """A backbone, the head and its losses.

    Args:
        backbone: timm's, with four maps, finest first.
        config: Of the head.
    """

    def __init__(self, backbone: nn.Module, config: MaskDinoConfig) -> None:
        super().__init__()
        self.backbone, self.head, self.criterion = backbone, MaskDino(config), MaskDinoLoss(config)

    def terms(self, images: Tensor, targets: list[Target]) -> dict[str, Tensor]:
        """Returns the unweighted losses for images (B, 3, H, W)."""
        noised = noise_targets(targets, self.head.config)
        return self.criterion(self.head(self.backbone(images), noised), targets, noised)

    def predict(self, images: Tensor) -> Prediction:
        """Returns the last prediction for images (B, 3, H, W)."""
        return self.head(self.backbone(images)).predictions[-1]


def normalised(corners: Tensor, size: tuple[int, int]) -> Tensor:
    """Return boxes (n, 4), x1 y1 x2 y2 in pixels of images of a size (H, W), as the head takes them.

    The size is that of the padded images, as the head knows no padding. The original divides by the image's own.
    """
    height, width = size
    return box_convert(corners / corners.new_tensor((width, height, width, height)), "xyxy", "cxcywh")


def class_targets(labels: Tensor, ignore_index: int) -> list[Target]:
    """Return a target of each class that is in a map of labels (B, H, W), boxes around its pixels."""
    size = tuple(labels.shape[-2:])
    targets = []
    for masks, classes in zip(*class_masks(labels, ignore_index), strict=True):
        corners = masks_to_boxes(masks)
        corners[:, 2:] += 1  # the last row and column are in the box
        targets.append(Target(classes, normalised(corners, size), masks))
    return targets


class MaskDinoSegmenter(MaskDinoModel):
    """Labels for each pixel in place of masks.

    Args:
        backbone: timm's, with four maps, finest first.
        config: Of the head.
        ignore_index: Label of pixels without a class.
    """

    def __init__(self, backbone: nn.Module, config: MaskDinoConfig, ignore_index: int) -> None:
        super().__init__(backbone, config)
        self.ignore_index = ignore_index

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the weighted sum of all losses for images (B, 3, H, W) and labels (B, H, W)."""
        return self.criterion.total(self.terms(images, class_targets(labels, self.ignore_index)))

    def forward(self, images: Tensor) -> Tensor:
        """Returns a score (B, classes, H, W), the sum over all queries of class times mask probability."""
        return semantic(self.predict(images), self.head.config, tuple(images.shape[-2:]))


class MaskDinoDetector(MaskDinoModel):
    """Called as torchvision's detectors are.

    Args:
        backbone: timm's, with four maps, finest first.
        config: Of the head.
        transform: torchvision's, which resizes, normalises and pads.
    """

    def __init__(self, backbone: nn.Module, config: MaskDinoConfig, transform: GeneralizedRCNNTransform) -> None:
        super().__init__(backbone, config)
        self.transform = transform

    def forward(
        self, images: list[Tensor], targets: list[CocoTarget] | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """Returns the weighted losses in training, else what is in each image.

        Args:
            images: (3, H, W) in [0, 1], of any sizes.
            targets: In training: boxes (n, 4) as x1 y1 x2 y2, labels (n,) from 1, masks (n, H, W).

        Returns:
            The sum of each kind over all predictions; or of each image `boxes`, `labels`, `scores`, best first, and
            `masks` (n, 1, H, W) of 0 and 1.
        """
        before = [tuple(image.shape[-2:]) for image in images]
        batch, resized = self.transform(images, targets)
        padded = tuple(batch.tensors.shape[-2:])
        if self.training:
            terms = self.terms(batch.tensors, [self._target(target, padded) for target in resized])
            kinds = self.criterion.weights
            return {kind: self.criterion.total(_of_kind(terms, kind)) for kind in kinds}
        prediction = self.predict(batch.tensors)
        found = []
        for index, (inside, size) in enumerate(zip(batch.image_sizes, before, strict=True)):
            scores, labels, boxes, masks = instances(
                one_image(prediction, index, padded, tuple(inside), size), self.head.config
            )
            boxes = clip_boxes_to_image(boxes, size)
            found.append({"boxes": boxes, "labels": labels + 1, "scores": scores, "masks": masks[:, None].float()})
        return found

    @staticmethod
    def _target(target: CocoTarget, padded: tuple[int, int]) -> Target:
        height, width = target["masks"].shape[-2:]
        masks = nn.functional.pad(target["masks"], (0, padded[1] - width, 0, padded[0] - height))
        # COCO has boxes that reach over the border by parts of a pixel
        boxes = clip_boxes_to_image(target["boxes"], (height, width))
        return Target(target["labels"] - 1, normalised(boxes, padded), masks)


def _of_kind(terms: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    return {name: term for name, term in terms.items() if name == kind or name.startswith(f"{kind}_")}


def create_config(args: argparse.Namespace, backbone: nn.Module, num_classes: int, **defaults: Any) -> MaskDinoConfig:
    """Return the head's configuration.

    Args:
        args: Arguments of train_dense.py, whose `head_kwargs` come before the defaults.
        backbone: Has the channels.
        num_classes: Classes without "none".
        **defaults: Of the task.

    Raises:
        ValueError: A key of `head_kwargs` is no field of the configuration.
    """
    known = {field.name for field in fields(MaskDinoConfig)} - {"num_classes", "in_channels"}
    unknown = sorted(args.head_kwargs.keys() - known)
    if unknown:
        raise ValueError(f"--head-kwargs {', '.join(unknown)}: {args.head} has {', '.join(sorted(known))}")
    channels = tuple(backbone.feature_info.channels())
    return MaskDinoConfig(num_classes=num_classes, in_channels=channels, **{**defaults, **args.head_kwargs})


def create_maskdino_segmenter(args: argparse.Namespace, options: dict[str, Any]) -> tuple[nn.Module, nn.Module]:
    """Return the network for semantic segmentation and the timm backbone in it.

    Args:
        args: Arguments of train_dense.py.
        options: Keyword arguments of `timm.create_model` that choose weights and size.
    """
    backbone = create_backbone(args.backbone, options)
    return MaskDinoSegmenter(backbone, create_config(args, backbone, args.num_classes), args.ignore_index), backbone


def create_maskdino_detector(
    args: argparse.Namespace,
    num_classes: int,
    options: dict[str, Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> tuple[nn.Module, nn.Module]:
    """Return the network for instances and the timm backbone in it.

    Args:
        args: Arguments of train_dense.py.
        num_classes: Classes without the background.
        options: Keyword arguments of `timm.create_model` that choose weights and size.
        mean: Of the images that the backbone knows.
        std: Their standard deviation.

    Raises:
        ValueError: The options choose softmax classes.
    """
    backbone = create_backbone(args.backbone, options)
    config = create_config(args, backbone, num_classes, **INSTANCE)
    if config.softmax_classes:
        raise ValueError("maskdino_instance needs softmax_classes=False: each class a probability of its own")
    transform = GeneralizedRCNNTransform(tuple(args.min_size), args.max_size, list(mean), list(std))
    return MaskDinoDetector(backbone, config, transform), backbone
