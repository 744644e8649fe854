"""timm's backbones as all heads take them: maps of their last stages."""

from typing import Any

import timm
import torch
from torch import nn

# Finest first, of strides 4 to 32.
LEVELS = (-4, -3, -2, -1)


def swin_options(name: str) -> dict[str, Any]:
    """Keyword arguments for images of any size, and maps (B, C, H, W), that the zoo's Swin has without being asked.

    Args:
        name: Of a model of timm; others than its static Swin need none.
    """
    if timm.model_entrypoint(name.partition(".")[0]).__module__ != "timm.models.swin_transformer":
        return {}
    return {"strict_img_size": False, "always_partition": True, "feature_cls": "getter"}


def create_backbone(name: str, options: dict[str, Any], levels: tuple[int, ...] = LEVELS) -> nn.Module:
    """Return a timm model of a list of maps.

    What it draws is drawn aside: a head that is built after it starts from the same numbers on every backbone.

    Args:
        name: Of the model.
        options: Keyword arguments of `timm.create_model` that choose weights and size.
        levels: Stages whose maps are wanted, counted from the last, -1.
    """
    with torch.random.fork_rng(devices=[]):
        return timm.create_model(name, features_only=True, out_indices=levels, **options)
