"""Convolution of each sample with a weight of its own in eager mode, and its gradients.

The weights are matrices (B, R, C) with R = Cout*kh and C = Cin*kw, as the Fourier transform yields them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import pad, unfold


@dataclass(frozen=True)
class Geometry:
    """Geometry of a convolution, and how to compute it.

    Attributes:
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros above and below, and left and right.
        dilation: Vertical and horizontal dilation.
        by_groups: Convolve by one grouped convolution instead of a matrix product.
        stack_rows: The kernel's rows become channels of a (1, kw) convolution, whose kernels are the weight matrix as
            it lies in memory.
        channels_last: Memory format of the output.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    by_groups: bool
    stack_rows: bool
    channels_last: bool


class SampleConv:
    """Convolves the samples of a chunk with weights of their own, in the layout of the weight matrix."""

    def __init__(self, x: Tensor, geometry: Geometry) -> None:
        self.x, self.geometry = x, geometry
        (kh, kw), (top, left) = geometry.kernel_size, geometry.padding
        self.maps = self.patches = None
        self.arguments = geometry.stride, geometry.padding, geometry.dilation
        if geometry.stack_rows:
            self.maps = unfold(pad(x, (0, 0, top, top)), (kh, 1), (geometry.stride[0], 1), geometry.dilation)
            self.size = self.maps.shape[-2:]
            self.maps = self.maps.view(len(x), -1, *self.size)
            self.arguments = (1, geometry.stride[1]), (0, left), (1, geometry.dilation[1])
        elif geometry.by_groups:
            self.maps = x
        else:
            if (kh, kw) == (1, 1) and geometry.padding == (0, 0):
                patches = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
            else:
                patches = unfold(
                    pad(x, (left, left, top, top)), geometry.kernel_size, geometry.stride, geometry.dilation
                )
            self.size = patches.shape[-2:]
            self.patches = patches.reshape(len(x), -1, patches.shape[-2] * patches.shape[-1])

    def _kernels(self, weight: Tensor) -> Tensor:
        kh, kw = self.geometry.kernel_size
        kernels = weight.view(len(weight), -1, kh, weight.shape[2] // kw, kw)
        if self.geometry.stack_rows:
            return kernels.view(-1, kh * kernels.shape[3], 1, kw)
        return torch.stack(kernels.unbind(2), dim=3).flatten(0, 1)

    def forward(self, weight: Tensor, out: Tensor) -> None:
        """Convolves with weight matrices (B, R, C) and writes the output (B, Cout, Hout, Wout) to `out`."""
        batch = len(self.x)
        if self.maps is not None:
            maps = self.maps.reshape(1, -1, *self.maps.shape[2:])
            out.copy_(F.conv2d(maps, self._kernels(weight), None, *self.arguments, groups=batch).view_as(out))
            return
        kernels, places = weight.view(batch, -1, self.patches.shape[1]), out.flatten(2)
        if self.geometry.channels_last:
            torch.bmm(self.patches.mT, kernels.mT, out=places.mT)
        else:
            torch.bmm(kernels, self.patches, out=places)

    def grad_weight(self, grad: Tensor, rows: int) -> Tensor:
        """Gradient of the weight matrices (B, R, C), given R and that of the output."""
        batch, (kh, kw) = len(self.x), self.geometry.kernel_size
        if self.maps is not None:
            height = 1 if self.geometry.stack_rows else kh
            shape = (batch * rows // kh, self.maps.shape[1], height, kw)
            kernels = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), self.maps.reshape(1, -1, *self.maps.shape[2:]),
                grad.new_empty(1).expand(shape), None, *self.arguments, False, (0, 0), batch, (False, True, False),
            )[1]  # fmt: skip
            return kernels.view(batch, -1, *shape[1:]).transpose(2, 3).reshape(batch, rows, -1)
        return torch.bmm(grad.flatten(2), self.patches.mT).view(batch, rows, -1)

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input (B, Cin, H, W), given that of the output."""
        batch = len(self.x)
        if self.maps is not None:
            maps = self.maps.reshape(1, -1, *self.maps.shape[2:])
            out = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), maps, self._kernels(weight),
                None, *self.arguments, False, (0, 0), batch, (True, False, False),
            )[0]  # fmt: skip
            return self._fold(out, 1, 1, 0) if self.geometry.stack_rows else out.view_as(self.x)
        kernels = weight.view(batch, -1, self.patches.shape[1])
        if self.geometry.channels_last:
            patches = torch.bmm(grad.flatten(2).mT, kernels).mT
        else:
            patches = torch.bmm(kernels.mT, grad.flatten(2))
        (_, kw), (_, left) = self.geometry.kernel_size, self.geometry.padding
        return self._fold(patches, kw, self.geometry.stride[1], left)

    def _fold(self, patches: Tensor, kernel_width: int, stride: int, padding: int) -> Tensor:
        """Adjoint of taking patches: sums (B, kh*Cin*kw, Hout, Wout) into (B, Cin, H, W).

        Args:
            patches: Gradient of the patches.
            kernel_width: Columns of the kernel that patches were taken of: kw, or 1 for stacked rows.
            stride: Horizontal stride of the patches.
            padding: Horizontal padding of the map.
        """
        geometry, (height, width), kh = self.geometry, self.size, self.geometry.kernel_size[0]
        top, channels = geometry.padding[0], self.x.shape[1]
        if (kh, kernel_width) == (1, 1) and (geometry.stride[0], stride, top, padding) == (1, 1, 0, 0):
            return patches.unflatten(2, self.size)
        patches = patches.reshape(len(self.x), kh, channels, kernel_width, height, width)
        shape = (len(self.x), channels, self.x.shape[2] + 2 * top, self.x.shape[3] + 2 * padding)
        out = patches.new_zeros(shape)
        for i in range(kh):
            start = i * geometry.dilation[0]
            rows = slice(start, start + (height - 1) * geometry.stride[0] + 1, geometry.stride[0])
            for j in range(kernel_width):
                start = j * geometry.dilation[1]
                places = slice(start, start + (width - 1) * stride + 1, stride)
                out[:, :, rows, places] += patches[:, i, :, j]
        return out[:, :, top : shape[2] - top, padding : shape[3] - padding]
