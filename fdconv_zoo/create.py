"""One constructor for a network's convolutions: FDConv where the paper has it, static elsewhere."""

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import nn

from .choice import is_large, is_narrow
from .layers import FDConv2d


def create_conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    bias: bool = True,
    padding_mode: str = "zeros",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> FDConv2d | nn.Conv2d:
    """Makes FDConv2d, or nn.Conv2d where conversion leaves one: narrow, grouped, large, padded with other than zeros.

    Narrow is below 17 input or output channels, large above 9 positions of the kernel (3x3), as in the paper's models.

    Args:
        in_channels: As for nn.Conv2d, and so on up to `dtype`.
        **kwargs: Keyword arguments of FDConv2d, of no consequence where the layer is static.

    Raises:
        ValueError: As FDConv2d does.
    """
    factory = {"device": device, "dtype": dtype}
    geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias)
    is_left = is_narrow(in_channels, out_channels) or is_large(to_2tuple(kernel_size))
    if is_left or groups > 1 or padding_mode != "zeros":
        return nn.Conv2d(*geometry, padding_mode, **factory)
    return FDConv2d(*geometry, **kwargs, **factory)
