"""What a model costs: its parameters and its multiply-accumulates, Fourier transforms included."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .layers.ops.flops import flops_of
from .layers.ops.registry import OPERATORS, counted_kernel

aten = torch.ops.aten


def _transform_flops(shape: Sequence[int], dims: Sequence[int]) -> float:
    """Customary cost of complex FFTs, 5 N log2 N each, over `dims` (N points together) of a tensor of this shape."""
    points = math.prod(shape[dim] for dim in dims)
    return 5 * math.prod(shape) * math.log2(points)


def _fft_c2c_flops(shape: Sequence[int], dims: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return round(_transform_flops(shape, dims))


def _fft_r2c_flops(shape: Sequence[int], dims: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return round(_transform_flops(shape, dims) / 2)


def _fft_c2r_flops(
    shape: Sequence[int], dims: Sequence[int], *args: Any, out_shape: Sequence[int], **kwargs: Any
) -> int:
    return round(_transform_flops(out_shape, dims) / 2)


_FFT_FLOPS = {
    aten._fft_c2c: _fft_c2c_flops,
    aten._fft_r2c: _fft_r2c_flops,
    aten._fft_c2r: _fft_c2r_flops,
}


def _with_transforms(operator: str) -> Callable[..., int]:
    """Formula of one of FDConv's operators, the Fourier transforms in it included."""
    formula = flops_of(counted_kernel(OPERATORS[operator]), _FFT_FLOPS)
    formula._get_raw = True  # FlopCounterMode hands over tensors, not their shapes
    return formula


_FLOPS = _FFT_FLOPS | {getattr(torch.ops.fdconv_zoo, name): _with_transforms(name) for name in OPERATORS}


def count_parameters(model: nn.Module) -> int:
    """Return the number of learnable values, frozen ones included, buffers (BatchNorm's statistics) not."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, input_size: Sequence[int]) -> int:
    """Return the multiply-accumulates of one forward pass on one image, in eval mode.

    Counted: convolutions (transposed and grouped ones too), matrix products, attention, and Fourier transforms at
    the customary 5 N log2 N FLOPs for a complex transform of N points and half of it for a real one; two FLOPs are
    one multiply-accumulate. Not counted: anything elementwise (biases, activations, normalisation, FDConv's products
    of gates with spectra, kernels and bands), pooling, and data movement. Static models come out at the figures that
    timm publishes (resnet50: 4.1 G at 224).

    Nothing is computed: the shapes go through a copy on torch's meta device, and the model is left as it was.

    Args:
        model: Any model with one image tensor as its input.
        input_size: Shape of one image, (channels, height, width).

    Raises:
        ValueError: `input_size` is not three positive integers.
    """
    if len(input_size) != 3 or any(size < 1 for size in input_size):
        raise ValueError(f"input_size must be (channels, height, width), all positive, got {tuple(input_size)}")
    shadow = copy.deepcopy(model).to("meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        shadow(torch.empty(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2
