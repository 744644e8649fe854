"""Swin Transformer with FDConv in place of both linear layers of every MLP.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783
Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021, https://arxiv.org/abs/2103.14030

Patch embedding, attention, patch merging and head stay static. The paper gives +3M parameters for Swin-T and no
details; KSM's reduction of 1/32 gives +3.23M.

With `features_only=True` any input size works, and maps are (B, C, H, W), for dense heads. Windows are shifted in every
second block then, as in dense Swins: timm's classifier leaves that out in a stage of one window, the last one at the
size of its pretraining. `always_partition=False` leaves it out too, at any size.
"""

from functools import partial
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer import checkpoint_filter_fn as static_filter_fn
from torch import Tensor, nn

from .build import ConvertedModel, build_fdconv
from .conversion import filter_pretrained, init_static
from .default_cfgs import converted_cfgs
from .layers import FDLinear
from .methods import layer_options


class FDConvSwin(ConvertedModel, SwinTransformer):
    """timm's SwinTransformer with FDLinear in its MLPs."""

    options = frozenset(layer_options(FDLinear))
    defaults: ClassVar[dict[str, Any]] = {"reduction": 1 / 32}

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        return ".mlp." in name

    @torch.jit.ignore
    def init_weights(self, mode: str = "", **kwargs: Any) -> None:
        """Initialises as the static model would be, with every gate at 1."""
        init_static(self, partial(super().init_weights, mode, **kwargs))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Moves a static Swin Transformer's weights, timm's or the original ones, into the Fourier domain."""
    return filter_pretrained(static_filter_fn(state_dict, model), model)


def _create_fdconv_swin(variant: str, pretrained: bool = False, **kwargs: Any) -> FDConvSwin:
    feature_cfg = dict(out_indices=kwargs.pop("out_indices", (0, 1, 2, 3)), flatten_sequential=True)
    if kwargs.get("features_only") and kwargs.get("feature_cls", "getter") == "getter":
        feature_cfg["feature_cls"] = "getter"
        kwargs.setdefault("strict_img_size", False)
        kwargs.setdefault("always_partition", True)
    return build_fdconv(FDConvSwin, variant, pretrained, checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs)


default_cfgs = generate_default_cfgs(
    converted_cfgs("swin_tiny_patch4_window7_224", "swin_tiny_fdconv", default="ms_in1k")
    | converted_cfgs("swin_small_patch4_window7_224", "swin_small_fdconv", default="ms_in1k")
    | converted_cfgs("swin_base_patch4_window7_224", "swin_base_fdconv", default="ms_in22k_ft_in1k")
    | converted_cfgs("swin_base_patch4_window12_384", "swin_base_384_fdconv", default="ms_in22k_ft_in1k")
    | converted_cfgs("swin_large_patch4_window7_224", "swin_large_fdconv", default="ms_in22k_ft_in1k")
    | converted_cfgs("swin_large_patch4_window12_384", "swin_large_384_fdconv", default="ms_in22k_ft_in1k")
)


@register_model
def swin_tiny_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvSwin:
    """Swin-T with FDConv, 224x224, window 7."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24))
    return _create_fdconv_swin("swin_tiny_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def swin_small_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvSwin:
    """Swin-S with FDConv, 224x224, window 7."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24))
    return _create_fdconv_swin("swin_small_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def swin_base_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvSwin:
    """Swin-B with FDConv, 224x224, window 7."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_fdconv_swin("swin_base_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def swin_base_384_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvSwin:
    """Swin-B with FDConv, 384x384, window 12."""
    model_args = dict(patch_size=4, window_size=12, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    return _create_fdconv_swin("swin_base_384_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def swin_large_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvSwin:
    """Swin-L with FDConv, 224x224, window 7."""
    model_args = dict(patch_size=4, window_size=7, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))
    return _create_fdconv_swin("swin_large_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def swin_large_384_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvSwin:
    """Swin-L with FDConv, 384x384, window 12."""
    model_args = dict(patch_size=4, window_size=12, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48))
    return _create_fdconv_swin("swin_large_384_fdconv", pretrained, **dict(model_args, **kwargs))
