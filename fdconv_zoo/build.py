"""Builds a model the way timm does, with its weights downloaded and verified by this package."""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg
from torch import Tensor, nn

from .pretrained import resolve_pretrained


def build_fdconv(
    model_cls: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_filter_fn: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
    **kwargs: Any,
) -> nn.Module:
    """Builds a registered model.

    Args:
        model_cls: Class of the model.
        variant: Registered name without a tag.
        pretrained: Loads pretrained weights.
        pretrained_filter_fn: Moves a checkpoint of the static model into the Fourier domain.
        **kwargs: As for timm's `build_model_with_cfg`.

    Raises:
        PretrainedError: If the weights can't be had whole.
    """
    if pretrained:
        kwargs["pretrained_cfg_overlay"] = resolve_pretrained(
            variant, kwargs.get("pretrained_cfg"), kwargs.get("pretrained_cfg_overlay"), kwargs.get("cache_dir")
        )
    return build_model_with_cfg(model_cls, variant, pretrained, pretrained_filter_fn=pretrained_filter_fn, **kwargs)
