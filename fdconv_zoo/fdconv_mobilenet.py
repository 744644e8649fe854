"""MobileNetV2 with FDConv in place of its pointwise convolutions of more than 16 channels.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783
MobileNetV2: Inverted Residuals and Linear Bottlenecks, CVPR 2018, https://arxiv.org/abs/1801.04381
"""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models._efficientnet_builder import decode_arch_def, resolve_bn_args
from timm.models.efficientnet import EfficientNet
from torch import Tensor, nn

from .build import ConvertedModel, build_fdconv
from .conversion import filter_pretrained
from .default_cfgs import converted_cfgs
from .layers import FDLinear
from .methods import layer_options


class FDConvMobileNet(ConvertedModel, EfficientNet):
    """timm's EfficientNet, which its MobileNets are, with FDConv2d for its pointwise convolutions."""

    # Pointwise convolutions have no FBM, but the official order of coefficients.
    options = frozenset(layer_options(FDLinear) | {"mask_grid"})

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        return isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Moves a static MobileNet's weights into the Fourier domain; FDConv weights stay as they are."""
    return filter_pretrained(state_dict, model)


def _create_fdconv_mobilenet(variant: str, pretrained: bool = False, **kwargs: Any) -> FDConvMobileNet:
    return build_fdconv(
        FDConvMobileNet,
        variant,
        pretrained,
        checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3, 4), feature_cls="getter", flatten_sequential=True),
        **kwargs,
    )


default_cfgs = generate_default_cfgs(converted_cfgs("mobilenetv2_100", "mobilenetv2_100_fdconv", default="ra_in1k"))


@register_model
def mobilenetv2_100_fdconv(pretrained: bool = False, **kwargs: Any) -> FDConvMobileNet:
    """MobileNetV2 1.0 with FDConv."""
    blocks = [
        ["ds_r1_k3_s1_c16"],
        ["ir_r2_k3_s2_e6_c24"],
        ["ir_r3_k3_s2_e6_c32"],
        ["ir_r4_k3_s2_e6_c64"],
        ["ir_r3_k3_s1_e6_c96"],
        ["ir_r3_k3_s2_e6_c160"],
        ["ir_r1_k3_s1_e6_c320"],
    ]
    norm_layer = kwargs.pop("norm_layer", None) or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs))
    model_args = dict(
        block_args=decode_arch_def(blocks), num_features=1280, stem_size=32, act_layer=nn.ReLU6, norm_layer=norm_layer
    )
    return _create_fdconv_mobilenet("mobilenetv2_100_fdconv", pretrained, **dict(model_args, **kwargs))
