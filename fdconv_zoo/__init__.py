"""Frequency Dynamic Convolution (FDConv, CVPR 2025) for timm: importing this package registers its models."""

from . import fdconv_convnext, fdconv_mobilenet, fdconv_resnet, fdconv_swin
from .banks import drop_banks, keep_banks
from .convert import (
    convert_official_state_dict,
    convert_static_state_dict,
    convert_to_fdconv,
    summary,
)
from .default_cfgs import static_name
from .layers import FDConv2d, FDLinear
from .pretrained import PretrainedError
from .version import __version__

__all__ = [
    "FDConv2d",
    "FDLinear",
    "PretrainedError",
    "__version__",
    "convert_official_state_dict",
    "convert_static_state_dict",
    "convert_to_fdconv",
    "drop_banks",
    "fdconv_convnext",
    "fdconv_mobilenet",
    "fdconv_resnet",
    "fdconv_swin",
    "keep_banks",
    "static_name",
    "summary",
]
