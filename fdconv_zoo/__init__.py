"""Frequency Dynamic Convolution (FDConv, CVPR 2025) for timm: importing this package registers its models."""

from . import dynamic_convnext, dynamic_resnet, fdconv_convnext, fdconv_mobilenet, fdconv_resnet, fdconv_swin
from .banks import drop_banks, keep_banks
from .conversion import (
    convert,
    convert_official_state_dict,
    convert_static_state_dict,
    convert_to_fdconv,
    summary,
)
from .create import create_conv2d
from .default_cfgs import static_name
from .layers import FDConv1d, FDConv2d, FDConv3d, FDLinear
from .modulation import freeze_static, modulation_parameters
from .pretrained import PretrainedError
from .static import to_static
from .temperature import set_temperature
from .version import __version__

__all__ = [
    "FDConv1d",
    "FDConv2d",
    "FDConv3d",
    "FDLinear",
    "PretrainedError",
    "__version__",
    "convert",
    "convert_official_state_dict",
    "convert_static_state_dict",
    "convert_to_fdconv",
    "create_conv2d",
    "drop_banks",
    "dynamic_convnext",
    "dynamic_resnet",
    "fdconv_convnext",
    "fdconv_mobilenet",
    "fdconv_resnet",
    "fdconv_swin",
    "freeze_static",
    "keep_banks",
    "modulation_parameters",
    "set_temperature",
    "static_name",
    "summary",
    "to_static",
]
