"""What the head takes from transformers, which may move it: then this module fails and says what is gone."""

import inspect
from collections.abc import Callable
from typing import Any

TRIED = "5.24"

try:
    from transformers import DeformableDetrConfig, Mask2FormerConfig
    from transformers.models.deformable_detr.modeling_deformable_detr import (
        DeformableDetrMultiscaleDeformableAttention as DeformableAttentionPart,
    )
    from transformers.models.mask2former.modeling_mask2former import (
        Mask2FormerLoss,
        pair_wise_dice_loss,
        pair_wise_sigmoid_cross_entropy_loss,
        sample_point,
    )
except ImportError as error:
    raise ImportError(
        f"the MaskDINO head needs transformers and scipy, and parts of transformers that release {TRIED} has: {error}"
    ) from error

__all__ = [
    "DeformableAttentionPart",
    "DeformableDetrConfig",
    "Mask2FormerConfig",
    "Mask2FormerLoss",
    "pair_wise_dice_loss",
    "pair_wise_sigmoid_cross_entropy_loss",
    "sample_point",
]


def require_arguments(part: Callable[..., Any], *names: str) -> None:
    """Refuse a part that does not name its arguments so: its `**kwargs` would take them, and nobody would use them.

    Raises:
        ImportError: Names the part and the arguments.
    """
    missing = [name for name in names if name not in inspect.signature(part).parameters]
    if missing:
        raise ImportError(
            f"{part.__module__}.{part.__qualname__} has no argument {', '.join(missing)}: the MaskDINO head was tried "
            f"with transformers {TRIED}"
        )


require_arguments(
    DeformableAttentionPart.forward,
    "hidden_states",
    "encoder_hidden_states",
    "position_embeddings",
    "reference_points",
    "spatial_shapes",
    "spatial_shapes_list",
    "level_start_index",
)
require_arguments(Mask2FormerLoss.loss_masks, "masks_queries_logits", "mask_labels", "indices", "num_masks")
require_arguments(Mask2FormerLoss.loss_labels, "class_queries_logits", "class_labels", "indices")
