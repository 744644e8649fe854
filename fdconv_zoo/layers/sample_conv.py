"""Convolution of each sample with a weight of its own in eager mode, and its gradients.

The weights are matrices (B, R, C) with R = Cout*kh and C = Cin*kw, as the Fourier transform yields them.
"""

from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .functional import pad


@dataclass(frozen=True)
class Geometry:
    """Geometry of a convolution, and how to compute it.

    Attributes:
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros above and below, and left and right.
        dilation: Vertical and horizontal dilation.
        by_groups: Convolve by one grouped convolution instead of a matrix product.
        gate_input: Apply the element gate to the input's patches, where they are fewer than the weights.
        channels_last: Memory format of the output.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    by_groups: bool
    gate_input: bool
    channels_last: bool


def output_size(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Height and width of a convolution's output; below 1 where the padded input is smaller than the kernel."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )


class SampleConv:
    """Convolves the samples of a chunk with weights of their own, in the layout of the weight matrix.

    Args:
        x: Input (B, Cin, H, W).
        element: Element gate (B, kh*Cin*kw) in the dtype of `x`, used where the input is gated, or None.
        geometry: Geometry of the convolution.
    """

    def __init__(self, x: Tensor, element: Tensor | None, geometry: Geometry) -> None:
        self.x, self.geometry = x, geometry
        self.element = element if geometry.gate_input else None
        self.patches = self.operand = None
        if geometry.by_groups:
            return
        (kh, kw), (top, left), (down, right) = geometry.kernel_size, geometry.padding, geometry.stride
        self.size = output_size(x.shape[2:], geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
        padded = pad(x, (left, left, top, top))
        if (kh, kw) == (1, 1):
            patches = padded[:, :, ::down, ::right]
        else:
            # One view, copied once: a kernel's place is as far from the next one as dilation times a pixel.
            samples, channels, rows, columns = padded.stride()
            strides = samples, rows * geometry.dilation[0], channels, columns * geometry.dilation[1]
            patches = padded.as_strided(
                (len(x), kh, x.shape[1], kw, *self.size), (*strides, rows * down, columns * right)
            )
        self.patches = patches.reshape(len(x), -1, self.size[0] * self.size[1])
        self.operand = self.patches if self.element is None else self.patches * self.element[:, :, None]

    def _groups(self, maps: Tensor) -> Tensor:
        """Maps (B, C, H, W) as the groups of one sample."""
        return maps.reshape(1, -1, *maps.shape[2:])

    def _kernels(self, weight: Tensor) -> Tensor:
        kh, kw = self.geometry.kernel_size
        kernels = weight.view(len(weight), -1, kh, weight.shape[2] // kw, kw)
        return torch.stack(kernels.unbind(2), dim=3).flatten(0, 1)

    def _gradients(self, grad: Tensor, kernels: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Gradients of input and kernels of the grouped convolution, as far as they are wanted."""
        return torch.ops.aten.convolution_backward(
            self._groups(grad), self._groups(self.x), kernels, None, self.geometry.stride, self.geometry.padding,
            self.geometry.dilation, False, (0, 0), len(self.x), (*wanted, False),
        )[:2]  # fmt: skip

    def forward(self, weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """Convolves and scales.

        Args:
            weight: Weight matrices (B, R, C).
            scale: Factor of each filter (B, Cout), or None.
            out: Takes the output (B, Cout, Hout, Wout).
        """
        batch = len(self.x)
        if self.operand is None:
            arguments = self.geometry.stride, self.geometry.padding, self.geometry.dilation
            result = F.conv2d(self._groups(self.x), self._kernels(weight), None, *arguments, groups=batch).view_as(out)
            if scale is None:
                out.copy_(result)
            else:
                torch.mul(result, scale[:, :, None, None], out=out)
            return
        kernels, places = weight.view(batch, -1, self.operand.shape[1]), out.flatten(2)
        scale_weight = scale is not None and kernels.shape[2] < places.shape[2]
        if scale_weight:
            kernels = kernels * scale[:, :, None]
        if self.geometry.channels_last:
            torch.bmm(self.operand.mT, kernels.mT, out=places.mT)
        else:
            torch.bmm(kernels, self.operand, out=places)
        if scale is not None and not scale_weight:
            places.mul_(scale[:, :, None])

    def grad_weight(self, grad: Tensor, rows: int) -> Tensor:
        """Gradient of the weight matrices (B, R, C), given R and that of the output."""
        batch, (kh, kw) = len(self.x), self.geometry.kernel_size
        if self.operand is None:
            shape = (batch * rows // kh, self.x.shape[1], kh, kw)
            kernels = self._gradients(grad, grad.new_empty(1).expand(shape), (False, True))[1]
            return kernels.view(batch, -1, *shape[1:]).transpose(2, 3).reshape(batch, rows, -1).contiguous()
        return torch.bmm(grad.flatten(2), self.operand.mT).view(batch, rows, -1)

    def grad_input(self, grad: Tensor, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of the input (B, Cin, H, W) and of its gate, if it has one, given that of the output."""
        if self.operand is None:
            return self._gradients(grad, self._kernels(weight), (True, False))[0].view_as(self.x), None
        kernels = weight.view(len(weight), -1, self.operand.shape[1])
        if self.geometry.channels_last:
            patches = torch.bmm(grad.flatten(2).mT, kernels).mT
        else:
            patches = torch.bmm(kernels.mT, grad.flatten(2))
        if self.element is None:
            return self._fold(patches), None
        return self._fold(patches * self.element[:, :, None]), (patches * self.patches).sum(2)

    def _fold(self, patches: Tensor) -> Tensor:
        """Adjoint of taking patches: sums (B, kh*Cin*kw, Hout*Wout) into (B, Cin, H, W)."""
        (kh, kw), (top, left) = self.geometry.kernel_size, self.geometry.padding
        stride, dilation = self.geometry.stride, self.geometry.dilation
        if (kh, kw, top, left, *stride) == (1, 1, 0, 0, 1, 1):
            return patches.unflatten(2, self.size)
        patches = patches.reshape(len(self.x), kh, -1, kw, *self.size)
        shape = (*self.x.shape[:2], self.x.shape[2] + 2 * top, self.x.shape[3] + 2 * left)
        out = patches.new_zeros(shape)
        for i, j in product(range(kh), range(kw)):
            rows = slice(i * dilation[0], i * dilation[0] + self.size[0] * stride[0], stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + self.size[1] * stride[1], stride[1])
            out[:, :, rows, columns].add_(patches[:, i, :, j])
        return out[:, :, top : shape[2] - top, left : shape[3] - left]
