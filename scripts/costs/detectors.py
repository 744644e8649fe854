"""The detectors of the paper's Table 1, on torch's meta device, and what their forward pass costs."""

from typing import Any

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN, MaskRCNN

from fdconv_zoo.cost import count_macs
from fdconv_zoo.dense import FeaturePyramid

HEADS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
COCO_CLASSES = 80
PROPOSALS = 1000
MASKS = 100


class DummyForward(nn.Module):
    """What OpenMMLab's counter runs: all of a detector but the choice of boxes, for a fixed number of them.

    Args:
        detector: torchvision's Faster or Mask R-CNN.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, x: Tensor) -> list[Tensor]:
        """Takes images (1, 3, H, W), each side a multiple of 32, to the raw outputs of the heads."""
        maps = list(self.detector.backbone(x).values())
        channels = maps[0].shape[1]
        heads = self.detector.roi_heads
        scores, deltas = self.detector.rpn.head(maps)
        regions = heads.box_head(x.new_empty(PROPOSALS, channels, *heads.box_roi_pool.output_size))
        outputs = [*scores, *deltas, *heads.box_predictor(regions)]
        if heads.has_mask():
            regions = x.new_empty(MASKS, channels, *heads.mask_roi_pool.output_size)
            outputs.append(heads.mask_predictor(heads.mask_head(regions)))
        return outputs


def build_detector(head: str, model: str, **kwargs: Any) -> nn.Module:
    """Return a detector for COCO on the meta device, in eval mode; the keywords are the backbone's."""
    with torch.device("meta"):
        backbone = timm.create_model(model, features_only=True, out_indices=(-4, -3, -2, -1), **kwargs)
        return HEADS[head](FeaturePyramid(backbone), num_classes=COCO_CLASSES + 1).eval()


def count_detector_macs(detector: nn.Module, size: tuple[int, int]) -> int:
    """Return the multiply-accumulates of a detector on an image of that height and width."""
    return count_macs(DummyForward(detector), (3, *size))
