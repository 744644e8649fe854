"""MaskDINO's head: detection, instance, panoptic and semantic segmentation on four maps of any backbone.

Paper: Mask DINO: Towards A Unified Transformer-based Framework for Object Detection and Segmentation, CVPR 2023,
https://arxiv.org/abs/2206.02777

Importing it needs transformers and scipy (the extra `dense`); `import fdconv_zoo` does not import it.
"""

from .checkpoints import convert_official_state_dict, official_config
from .config import MaskDinoConfig
from .denoising import noise_targets
from .head import MaskDino
from .inference import instances, one_image, panoptic, semantic
from .loss import MaskDinoLoss
from .matcher import match
from .types import Instances, NoisedTargets, Outputs, Panoptic, Prediction, Target

__all__ = [
    "Instances",
    "MaskDino",
    "MaskDinoConfig",
    "MaskDinoLoss",
    "NoisedTargets",
    "Outputs",
    "Panoptic",
    "Prediction",
    "Target",
    "convert_official_state_dict",
    "instances",
    "match",
    "noise_targets",
    "official_config",
    "one_image",
    "panoptic",
    "semantic",
]
