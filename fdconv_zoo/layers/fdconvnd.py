"""What FDConv1d and FDConv3d share: options and geometry of a convolution of any number of dimensions."""

import math
from collections.abc import Callable

import torch
from timm.layers import to_ntuple
from timm.models.metaformer import StarReLU
from torch import Tensor, nn

from .base import DynamicConvolution
from .fdconv import _FDLayer
from .fdw import GainMaps
from .padding import explicit_pads


class FDConvNd(_FDLayer, DynamicConvolution):
    """Frequency dynamic convolution of other things than maps.

    Args:
        in_channels: Input channels Cin.
        out_channels: Filters Cout.
        kernel_size: A side for each dimension, or one number for all.
        stride: Stride along each dimension, or one number for all.
        padding: Zeros on both sides of each dimension, one number for all, "same" or "valid".
        dilation: Dilation along each dimension, or one number for all.
        groups: Only 1 is possible.
        bias: Adds a learnt bias.
        num_bands: Frequency groups n of the FDW.
        reduction: Ratio of KSM's hidden channels to Cin; at least 16 are kept.
        cutoffs: FBM's band limits in cycles per sample, falling. Used where the kernel is larger than 1.
        ksm: False leaves out the gates of KSM and keeps the gains of the frequency groups.
        fbm: False leaves out FBM.
        norm_layer: Normalisation in KSM, or timm's name of it. BatchNorm takes its running statistics for a batch of
            one in training.
        act_layer: Activation in KSM, or timm's name of it.
        init_weights: False leaves static weight and bias to be set.
        gain_maps: Gain maps of other layers, to copy this one's from or to add it to: a map takes long to make.
        device: Device of the parameters.
        dtype: Dtype of the parameters; spectra are computed in float32 at least.

    Raises:
        ValueError: On groups other than 1, a `num_bands` or `cutoffs` out of range, or an input of the wrong shape.
        TypeError: As for :class:`FDConv2d`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        num_bands: int = 64,
        reduction: float = 1 / 16,
        cutoffs: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16),
        ksm: bool = True,
        fbm: bool = True,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: str | Callable[..., nn.Module] = StarReLU,
        init_weights: bool = True,
        gain_maps: GainMaps | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name, dims = type(self).__name__, len(self.fbm_class.kernel)
        if groups != 1:
            raise ValueError(f"groups={groups}, but {name} has one weight matrix for all channels: only groups=1")
        kernel, strides, dilations = (to_ntuple(dims)(value) for value in (kernel_size, stride, dilation))
        pads = padding if isinstance(padding, str) else to_ntuple(dims)(padding)
        if any(len(value) != dims for value in (kernel, strides, dilations)) or min(kernel) < 1:
            raise ValueError(f"kernel_size={kernel_size}, but it and all others are one number or {dims}, above 0")
        super().__init__(
            in_channels,
            out_channels,
            (kernel[0], math.prod(kernel[1:])),
            bias=bias,
            num_bands=num_bands,
            reduction=reduction,
            cutoffs=cutoffs,
            mask_grid=None,
            has_options=True,
            ksm=ksm,
            fbm=fbm,
            norm_layer=norm_layer,
            act_layer=act_layer,
            recompute=True,
            fused=True,
            init_weights=init_weights,
            gain_maps=gain_maps,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = kernel
        self.stride = strides
        self.padding = pads
        self.dilation = dilations
        self.groups = groups
        self.pads = explicit_pads(pads, kernel, strides, dilations)

    def _check_input(self, x: Tensor) -> None:
        if x.dim() != 2 + len(self.stride) or x.shape[1] != self.in_channels:
            sides = len(self.stride)
            raise ValueError(
                f"input of shape {list(x.shape)}, but FDConv{sides}d takes a batch of {self.in_channels} channels and "
                f"{sides} dimensions"
            )
        if not x.is_floating_point():
            raise ValueError(f"input of dtype {x.dtype}, but FDConv{len(self.stride)}d takes floating-point numbers")
