"""Mask2Former of transformers for semantic segmentation, with any timm backbone."""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    TimmBackbone,
    TimmBackboneConfig,
)

from dense.backbones import LEVELS, create_backbone, swin_options
from dense.masks import class_masks
from fdconv_zoo.dense import build_transformers_head


class BackboneConfig(TimmBackboneConfig):
    """A timm model with keyword arguments (`options`), for which transformers' own class has no place."""

    model_type = "timm_backbone_with_options"


class Backbone(TimmBackbone):
    """The timm model that a `BackboneConfig` describes, with random weights."""

    config_class = BackboneConfig

    def __init__(self, config: BackboneConfig, **kwargs: Any) -> None:
        super().__init__(config, **config.options, **kwargs)


AutoBackbone.register(BackboneConfig, Backbone)


class Mask2Former(nn.Module):
    """transformers' model with labels for each pixel in place of masks.

    Args:
        network: The model.
        ignore_index: Label of pixels without a class.
    """

    def __init__(self, network: Mask2FormerForUniversalSegmentation, ignore_index: int) -> None:
        super().__init__()
        self.network, self.ignore_index = network, ignore_index

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Returns the weighted sum of all losses for images (B, 3, H, W) and labels (B, H, W).

        Each process counts the masks of its own images, where the paper's code takes the mean over all processes.
        """
        masks, classes = class_masks(labels, self.ignore_index)
        return self.network(pixel_values=images, mask_labels=masks, class_labels=classes).loss

    def forward(self, images: Tensor) -> Tensor:
        """Returns a score (B, classes, H, W), the sum over all queries of class probability times mask probability.

        Paper: Per-Pixel Classification is Not All You Need for Semantic Segmentation, section 3.4,
        https://arxiv.org/abs/2107.06278
        """
        outputs = self.network(pixel_values=images)
        masks = F.interpolate(outputs.masks_queries_logits, images.shape[-2:], mode="bilinear", align_corners=False)
        classes = outputs.class_queries_logits.softmax(-1)[..., :-1]
        return torch.einsum("bqc,bqhw->bchw", classes, masks.sigmoid())


def create_mask2former(args: argparse.Namespace, backbone_options: dict[str, Any]) -> tuple[Mask2Former, nn.Module]:
    """Return the network and the timm backbone in it.

    Args:
        args: Arguments of train_dense.py.
        backbone_options: Keyword arguments of `timm.create_model` that choose weights and size.
    """
    backbone = create_backbone(args.backbone, backbone_options)
    config = Mask2FormerConfig(
        backbone_config=BackboneConfig(
            backbone=args.backbone,
            out_indices=list(LEVELS),
            options={**swin_options(args.backbone), **args.backbone_kwargs},
        ),
        num_labels=args.num_classes,
        **args.head_kwargs,
    )
    network = build_transformers_head(Mask2FormerForUniversalSegmentation, config, backbone)
    inner = next(module for module in network.modules() if isinstance(module, Backbone))
    return Mask2Former(network, args.ignore_index), inner._backbone
