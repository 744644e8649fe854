"""ConvNeXt with FDConv in place of both linear layers of every MLP.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783
ConvNeXt: A ConvNet for the 2020s, CVPR 2022, https://arxiv.org/abs/2201.03545

Depthwise 7x7 convolutions, stem, downsampling and head stay static. The paper gives +3M parameters for ConvNeXt-T and
no details; KSM's reduction of 1/64 gives +2.93M.
"""

from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.convnext import checkpoint_filter_fn as static_filter_fn
from torch import Tensor, nn

from .build import ConvertedModel, build_fdconv
from .conversion import filter_pretrained, static_shapes
from .default_cfgs import converted_cfgs
from .layers import FDLinear
from .methods import layer_options


class FDConvNeXt(ConvertedModel, ConvNeXt):
    """timm's ConvNeXt with FDLinear in its MLPs, or pointwise FDConv2d where they are convolutions."""

    options = frozenset(layer_options(FDLinear))
    defaults: ClassVar[dict[str, Any]] = {"reduction": 1 / 64}

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        return ".mlp." in name


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Moves a static ConvNeXt's weights, timm's or the original ones, into the Fourier domain."""
    return filter_pretrained(static_filter_fn(state_dict, static_shapes(model)), model)


def _create_fdconv_convnext(variant: str, pretrained: bool = False, **kwargs: Any) -> FDConvNeXt:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build_fdconv(FDConvNeXt, variant, pretrained, checkpoint_filter_fn, feature_cfg=feature_cfg, **kwargs)


default_cfgs = generate_default_cfgs(
    converted_cfgs("convnext_atto", "convnext_atto_fdconv", default="d2_in1k")
    | converted_cfgs("convnext_tiny", "convnext_tiny_fdconv", default="fb_in1k")
    | converted_cfgs("convnext_small", "convnext_small_fdconv", default="fb_in1k")
    | converted_cfgs("convnext_base", "convnext_base_fdconv", default="fb_in1k")
)


@register_model
def convnext_atto_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvNeXt:
    """ConvNeXt-Atto with FDConv."""
    model_args = dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320), conv_mlp=True)
    return _create_fdconv_convnext("convnext_atto_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_tiny_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvNeXt:
    """ConvNeXt-Tiny with FDConv."""
    model_args = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768))
    return _create_fdconv_convnext("convnext_tiny_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_small_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvNeXt:
    """ConvNeXt-Small with FDConv."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768))
    return _create_fdconv_convnext("convnext_small_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def convnext_base_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvNeXt:
    """ConvNeXt-Base with FDConv."""
    model_args = dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024))
    return _create_fdconv_convnext("convnext_base_fdconv", pretrained, **dict(model_args, **kwargs))
