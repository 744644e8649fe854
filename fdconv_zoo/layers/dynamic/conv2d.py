"""What the dynamic convolutions beside FDConv share: arguments, geometry, and the way to what they compute."""

from collections.abc import Callable

import torch
from timm.layers import to_2tuple
from torch import Tensor

from ..base import DynamicConvolution
from ..layout import is_channels_last, to_channels_last
from ..ops import mixed_conv2d
from ..ops.types import Geometry
from ..padding import explicit_pads


class DynamicConv2d(DynamicConvolution):
    """A dynamic convolution of maps, in place of nn.Conv2d.

    Args:
        in_channels: Input channels Cin.
        out_channels: Filters Cout.
        kernel_size: Height and width, or one number for both.
        stride: Vertical and horizontal stride, or one number for both.
        padding: Zeros above/below and left/right, one number for both, "same" or "valid".
        dilation: Vertical and horizontal dilation, or one number for both.
        groups: Groups of channels.

    Shape:
        (B, Cin, H, W) to (B, Cout, Hout, Wout) as nn.Conv2d; the dtype is that of the input.

    Raises:
        ValueError: On numbers out of range, groups that don't divide the channels, or an input of the wrong shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int],
        padding: int | tuple[int, int] | str,
        dilation: int | tuple[int, int],
        groups: int,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = to_2tuple(kernel_size)
        self.stride = to_2tuple(stride)
        self.padding = padding if isinstance(padding, str) else to_2tuple(padding)
        self.dilation = to_2tuple(dilation)
        self.groups = groups
        undivided = groups < 1 or in_channels % groups or out_channels % groups
        if min(in_channels, out_channels, *self.kernel_size) < 1 or undivided:
            raise ValueError(
                f"{in_channels} to {out_channels} channels, kernel_size={kernel_size}, groups={groups}, but all must "
                "be above 0, and groups divide the channels"
            )
        self.pads = explicit_pads(self.padding, self.kernel_size, self.stride, self.dilation)

    @property
    def static_shape(self) -> tuple[int, int, int, int]:
        """Shape (Cout, Cin/groups, kh, kw) of the static weight."""
        return self.out_channels, self.in_channels // self.groups, self.kernel_size[0], self.kernel_size[1]

    @torch.jit.ignore
    @torch.no_grad()
    def reset_modulation(self) -> None:
        """Starts again from the static weight, as a layer made from the static one does."""
        self.set_static(self.static_weight(), self.static_bias())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DynamicConv2d":
        """Moves the module; a bank has five dimensions and is no volume that could be channels-last."""

        def move(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten(1)).view(tensor.shape) if tensor.dim() == 5 else fn(tensor)

        return super()._apply(move, recurse)

    def _compute(self, x: Tensor, by_kernels: bool) -> Tensor:
        """Convolves x (B, Cin, H, W) with a kernel of its own for each sample."""
        if x.dim() != 4 or x.shape[1] != self.in_channels or not x.is_floating_point():
            raise ValueError(
                f"input of shape {list(x.shape)} and dtype {x.dtype}, but the layer takes "
                f"(B, {self.in_channels}, H, W) of floating-point numbers"
            )
        channels_last = is_channels_last(x)
        out = self._convolve(x)
        return to_channels_last(out) if channels_last else out

    def _geometry(self) -> Geometry:
        return Geometry(self.kernel_size, self.stride, self.pads, self.dilation)

    def _mix(self, x: Tensor, attention: Tensor, cells: Tensor, positions: Tensor | None) -> Tensor:
        """Convolves x with kernels mixed by attention (B, m, n) from cells (n, co, ci, a, b)."""
        shape = [self.out_channels, self.in_channels // self.groups, self.kernel_size[0], self.kernel_size[1]]
        return mixed_conv2d(x, attention, cells, positions, shape, geometry=self._geometry(), groups=self.groups)


def pooled(x: Tensor) -> Tensor:
    """Mean of x over space (B, Cin), in float32 at least."""
    return x.mean([2, 3], dtype=torch.promote_types(x.dtype, torch.float32))


def add_bias(out: Tensor, bias: Tensor | None) -> Tensor:
    """Adds a bias (Cout,) or (B, Cout) to a map (B, Cout, H, W)."""
    return out if bias is None else out + bias.to(out.dtype)[..., None, None]
