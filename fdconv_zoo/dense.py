"""Backbones in heads for detection and segmentation: torchvision's detectors, and transformers' models.

segmentation-models-pytorch needs nothing from here: its encoder `tu-resnet50_fdconv` is the timm model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, FeaturePyramidNetwork, LastLevelMaxPool

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class FeaturePyramid(nn.Module):
    """A timm backbone and a feature pyramid, as torchvision's detectors take them.

    Paper: Feature Pyramid Networks for Object Detection, CVPR 2017, https://arxiv.org/abs/1612.03144

    Args:
        backbone: Made by `timm.create_model(..., features_only=True, out_indices=...)`. Faster and Mask R-CNN take
            `out_indices=(-4, -3, -2, -1)`, RetinaNet takes `(-3, -2, -1)`.
        out_channels: Channels of every map of the pyramid.
        extra_blocks: Makes the coarser maps. None for one more, by pooling (Faster and Mask R-CNN); for RetinaNet
            `LastLevelP6P7(out_channels, out_channels)`.

    Raises:
        ValueError: `backbone` was not made with `features_only=True`.
    """

    def __init__(self, backbone: nn.Module, out_channels: int = 256, extra_blocks: ExtraFPNBlock | None = None) -> None:
        super().__init__()
        feature_info = getattr(backbone, "feature_info", None)
        if not hasattr(feature_info, "channels"):
            raise ValueError(
                f"{type(backbone).__name__} gives no feature maps: make it with timm.create_model(..., "
                "features_only=True, out_indices=(-4, -3, -2, -1))"
            )
        self.body = backbone
        self.fpn = FeaturePyramidNetwork(feature_info.channels(), out_channels, extra_blocks or LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Returns the pyramid of images (B, 3, H, W).

        Returns:
            Maps (B, out_channels, h, w), finest first: "0", "1", ... as many as the backbone gives, and "pool" or
            what `extra_blocks` adds.
        """
        return self.fpn({str(level): features for level, features in enumerate(self.body(x))})


def build_transformers_head(
    head_class: type[PreTrainedModel], config: PreTrainedConfig, backbone: nn.Module
) -> PreTrainedModel:
    """Builds a model of transformers whose timm backbone has the weights of a given one.

    transformers builds the timm model that `config.backbone_config` names with random weights, whatever
    `use_pretrained_backbone` says; `TimmBackbone.from_pretrained` loads weights and then sets BatchNorm's statistics
    back to 0 and 1; and DETR initialises linear layers of the backbone anew, so that not even gates are at 1. Weights
    that are copied in afterwards are out of reach of all of that.

    Args:
        head_class: E.g. `transformers.Mask2FormerForUniversalSegmentation`.
        config: Its configuration, with a `TimmBackboneConfig` as its `backbone_config`.
        backbone: `timm.create_model(name, features_only=True, pretrained=True)`, of the name in the configuration.

    Returns:
        The model, in training mode; the backbone inside it computes what `backbone` does in eval mode.

    Raises:
        ValueError: The configuration's backbone is not timm's, or `backbone` does not fit it.
    """
    model = head_class(config)
    inner = _timm_backbone(model)
    try:
        inner.load_state_dict(backbone.state_dict())
    except RuntimeError as error:
        name = config.backbone_config.backbone
        raise ValueError(f"the weights given are not those of {name} with features_only=True: {error}") from error
    return model


def load_transformers_head(head_class: type[PreTrainedModel], folder: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Loads what `save_pretrained` wrote, whole.

    DETR holds the timm model in a way that keeps transformers' `from_pretrained` from making the buffers that no
    file holds: they are left as uninitialised memory. Here they are made.

    Args:
        head_class: Class of the saved model.
        folder: A folder, or a name on the Hub.
        **kwargs: As for `from_pretrained`.

    Raises:
        ValueError: The model's backbone is not timm's.
    """
    model = head_class.from_pretrained(folder, **kwargs)
    for module in _timm_backbone(model).modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    return model


def _timm_backbone(model: nn.Module) -> nn.Module:
    for module in model.modules():
        # timm's features_only models; a whole timm model has a list here
        if hasattr(getattr(module, "feature_info", None), "channels"):
            return module
    raise ValueError(f"{type(model).__name__} has no timm backbone: give its config a TimmBackboneConfig")
