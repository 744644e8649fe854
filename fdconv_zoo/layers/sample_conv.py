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
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    by_groups: bool


class SampleConv:
    """Convolves the samples of a chunk with weights of their own, in the layout of the weight matrix."""

    def __init__(self, x: Tensor, geometry: Geometry) -> None:
        self.x, self.geometry = x, geometry
        self.patches = None
        if not geometry.by_groups:
            kh, kw = geometry.kernel_size
            if (kh, kw) == (1, 1) and geometry.padding == (0, 0):
                patches = x[:, :, :: geometry.stride[0], :: geometry.stride[1]]
            else:
                (top, left) = geometry.padding
                patches = unfold(
                    pad(x, (left, left, top, top)), geometry.kernel_size, geometry.stride, geometry.dilation
                )
            self.size = patches.shape[-2:]
            self.patches = patches.reshape(len(x), -1, patches.shape[-2] * patches.shape[-1])

    def _arguments(self) -> tuple[tuple[int, int], ...]:
        return self.geometry.stride, self.geometry.padding, self.geometry.dilation

    def _kernels(self, weight: Tensor) -> Tensor:
        kh, kw = self.geometry.kernel_size
        kernels = weight.view(len(weight), -1, kh, weight.shape[2] // kw, kw).transpose(2, 3)
        return kernels.reshape(-1, *kernels.shape[2:])

    def forward(self, weight: Tensor) -> Tensor:
        """Output (B, Cout, Hout, Wout) for weight matrices (B, R, C)."""
        batch = len(self.x)
        if self.patches is None:
            x = self.x.reshape(1, -1, *self.x.shape[2:])
            out = F.conv2d(x, self._kernels(weight), None, *self._arguments(), groups=batch)
            return out.view(batch, -1, *out.shape[2:])
        return torch.bmm(weight.view(batch, -1, self.patches.shape[1]), self.patches).view(batch, -1, *self.size)

    def grad_weight(self, grad: Tensor, rows: int) -> Tensor:
        """Gradient of the weight matrices (B, R, C), given R and that of the output."""
        batch, (kh, kw) = len(self.x), self.geometry.kernel_size
        if self.patches is None:
            shape = (batch * rows // kh, self.x.shape[1], kh, kw)
            kernels = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), self.x.reshape(1, -1, *self.x.shape[2:]),
                grad.new_empty(1).expand(shape), None, *self._arguments(), False, (0, 0), batch, (False, True, False),
            )[1]  # fmt: skip
            return kernels.view(batch, -1, *shape[1:]).transpose(2, 3).reshape(batch, rows, -1)
        return torch.bmm(grad.flatten(2), self.patches.mT).view(batch, rows, -1)

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input (B, Cin, H, W), given that of the output."""
        batch = len(self.x)
        if self.patches is None:
            out = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), self.x.reshape(1, -1, *self.x.shape[2:]),
                self._kernels(weight), None, *self._arguments(), False, (0, 0), batch, (True, False, False),
            )[0]  # fmt: skip
            return out.view_as(self.x)
        patches = torch.bmm(weight.view(batch, -1, self.patches.shape[1]).mT, grad.flatten(2))
        return self._fold(patches.view(batch, -1, *self.size))

    def _fold(self, patches: Tensor) -> Tensor:
        """Adjoint of taking patches: sums (B, kh*Cin*kw, Hout, Wout) into (B, Cin, H, W)."""
        geometry, (height, width), (kh, kw) = self.geometry, self.size, self.geometry.kernel_size
        (top, left), channels = geometry.padding, self.x.shape[1]
        if (kh, kw) == (1, 1) and geometry.stride == (1, 1) and geometry.padding == (0, 0):
            return patches
        patches = patches.view(len(patches), kh, channels, kw, height, width)
        shape = (len(patches), channels, self.x.shape[2] + 2 * top, self.x.shape[3] + 2 * left)
        out = patches.new_zeros(shape)
        for i in range(kh):
            rows = slice(
                i * geometry.dilation[0],
                i * geometry.dilation[0] + (height - 1) * geometry.stride[0] + 1,
                geometry.stride[0],
            )
            for j in range(kw):
                start = j * geometry.dilation[1]
                places = slice(start, start + (width - 1) * geometry.stride[1] + 1, geometry.stride[1])
                out[:, :, rows, places] += patches[:, i, :, j]
        return out[:, :, top : shape[2] - top, left : shape[3] - left]
