"""ResNets with FDConv in place of every 3x3 and 1x1 convolution of their residual branches.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

Stem and downsample shortcuts stay static. ResNet-50 has 3,647,120 parameters more than its static twin.
"""

from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .build import ConvertedModel, build_fdconv
from .conversion import filter_pretrained, init_static
from .default_cfgs import converted_cfgs
from .layers import FDConv2d
from .methods import layer_options


class FDConvResNet(ConvertedModel, ResNet):
    """timm's ResNet with FDConv2d in its residual branches."""

    options = frozenset(layer_options(FDConv2d))

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        return name.startswith("layer")

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialises as the static model would be, with every gate at 1."""
        init_static(self, partial(super().init_weights, zero_init_last=zero_init_last))


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Moves a static ResNet's weights into the Fourier domain; FDConv weights stay as they are."""
    return filter_pretrained(state_dict, model)


def _create_fdconv_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    return build_fdconv(FDConvResNet, variant, pretrained, checkpoint_filter_fn, **kwargs)


default_cfgs = generate_default_cfgs(
    converted_cfgs("resnet18", "resnet18_fdconv", default="a1_in1k")
    | converted_cfgs("resnet34", "resnet34_fdconv", default="a1_in1k")
    | converted_cfgs("resnet50", "resnet50_fdconv", default="a1_in1k")
    | converted_cfgs("resnet101", "resnet101_fdconv", default="a1h_in1k")
    | converted_cfgs("resnet152", "resnet152_fdconv", default="a1h_in1k")
    | converted_cfgs("wide_resnet50_2", "wide_resnet50_2_fdconv", default="racm_in1k")
    | converted_cfgs("wide_resnet101_2", "wide_resnet101_2_fdconv", default="tv2_in1k")
)


@register_model
def resnet18_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    """ResNet-18 with FDConv."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_fdconv_resnet("resnet18_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    """ResNet-34 with FDConv."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3))
    return _create_fdconv_resnet("resnet34_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    """ResNet-50 with FDConv."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create_fdconv_resnet("resnet50_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    """ResNet-101 with FDConv."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create_fdconv_resnet("resnet101_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    """ResNet-152 with FDConv."""
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3))
    return _create_fdconv_resnet("resnet152_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def wide_resnet50_2_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    """Wide ResNet-50-2 with FDConv."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create_fdconv_resnet("wide_resnet50_2_fdconv", pretrained, **dict(model_args, **kwargs))


@register_model
def wide_resnet101_2_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvResNet:
    """Wide ResNet-101-2 with FDConv."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), base_width=128)
    return _create_fdconv_resnet("wide_resnet101_2_fdconv", pretrained, **dict(model_args, **kwargs))
