"""timm's backbones as all heads take them: maps of their last stages."""

from typing import Any

import timm
from torch import nn

# Finest first, of strides 4 to 32.
LEVELS = (-4, -3, -2, -1)


def create_backbone(name: str, options: dict[str, Any], levels: tuple[int, ...] = LEVELS) -> nn.Module:
    """Return a timm model of a list of maps.

    Args:
        name: Of the model.
        options: Keyword arguments of `timm.create_model` that choose weights and size.
        levels: Stages whose maps are wanted, counted from the last, -1.
    """
    return timm.create_model(name, features_only=True, out_indices=levels, **options)
