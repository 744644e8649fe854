"""The convolution with a mixture of kernels for each sample: CondConv, DY-Conv, ODConv and KernelWarehouse.

A sample's kernel is made of cells, each a mixture of the layer's bank by the sample's attention. A batch of kernels is
B times the layer, so none is kept: samples pass through in chunks of bounded size, and the backward pass mixes again.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import traced, transforms
from .eager import limits
from .library import pad_alike, without_autocast
from .types import Geometry, Limits

CALL = (
    "Tensor x, Tensor attention, Tensor cells, Tensor? positions, int[] shape, int[] stride, int[] padding, "
    "int[] dilation, int groups"
)


class Mixture(NamedTuple):
    """The tensors that a mixed convolution is a function of, all of one dtype.

    Attributes:
        x: Input (B, Cin, H, W).
        attention: Share of each cell of the bank in each cell of a sample's kernel (B, m, n). The m cells of a kernel
            are counted by kernel rows, then kernel columns, filters and input channels.
        cells: The bank (n, co, ci, a, b): whole kernels, m = 1, or pieces that divide them.
        positions: Gate of each kernel position (B, kh*kw), or None.
    """

    x: Tensor
    attention: Tensor
    cells: Tensor
    positions: Tensor | None


def mix(attention: Tensor, cells: Tensor, shape: list[int]) -> Tensor:
    """Kernels (B, Cout, Cin/groups, kh, kw) of that shape: one product of attention (B, m, n) and bank."""
    batch = attention.shape[0]
    count, co, ci, a, b = cells.shape[0], cells.shape[1], cells.shape[2], cells.shape[3], cells.shape[4]
    mixed = torch.matmul(attention.reshape(-1, count), cells.reshape(count, -1))
    if [co, ci, a, b] == shape:
        return mixed.view(batch, co, ci, a, b)
    grid = mixed.view([batch, shape[2] // a, shape[3] // b, shape[0] // co, shape[1] // ci, co, ci, a, b])
    return grid.permute([0, 3, 5, 4, 6, 1, 7, 2, 8]).reshape([batch, shape[0], shape[1], shape[2], shape[3]])


def unmix(grad: Tensor, cells: Tensor) -> Tensor:
    """Gradient of the mixed cells (B*m, co*ci*a*b), given that of the kernels."""
    (batch, filters, channels, kh, kw), (_, co, ci, a, b) = grad.shape, cells.shape
    grid = grad.reshape([batch, filters // co, co, channels // ci, ci, kh // a, a, kw // b, b])
    return grid.permute([0, 5, 7, 1, 3, 2, 4, 6, 8]).reshape(-1, co * ci * a * b)


def plain(mixture: Mixture, shape: list[int], geometry: Geometry, groups: int) -> Tensor:
    """The convolution in plain operations, with derivatives of any order; no size of batch or map is baked in."""
    x, positions = mixture.x, mixture.positions
    kernels = mix(mixture.attention, mixture.cells, shape)
    if positions is not None:
        kernels = kernels * positions.view(-1, 1, 1, shape[2], shape[3])
    # As traced.convolve has them: (B, Cout, kh*Cin*kw).
    rows = kernels.permute(0, 1, 3, 2, 4).reshape(x.shape[0], shape[0], shape[1] * shape[2] * shape[3])
    if groups == 1:
        return traced.convolve(x, rows, geometry)
    kernel_parts = rows.chunk(groups, dim=1)
    parts: list[Tensor] = []
    for i, part in enumerate(x.chunk(groups, dim=1)):
        parts.append(traced.convolve(part, kernel_parts[i], geometry))
    return torch.cat(parts, dim=1)


def mixed_conv2d(mixture: Mixture, shape: list[int], geometry: Geometry, groups: int) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.mixed_conv2d` by its operator."""
    x, attention, cells, positions = mixture
    x, geometry = pad_alike(x, geometry)
    if x.numel() == 0:
        size = (max(side, 0) for side in geometry.output_size(x.shape[2], x.shape[3]))
        # Still a function of its inputs, as nn.Conv2d's output is.
        return x.sum() + attention.sum() + cells.sum() + x.new_zeros(len(x), shape[0], *size)
    with without_autocast(x):
        return torch.ops.fdconv_zoo.mixed_conv2d.default(
            x, attention, cells, positions, shape, stride=geometry.stride, padding=geometry.padding,
            dilation=geometry.dilation, groups=groups,
        )  # fmt: skip


class Chunk:
    """Samples with kernels of their own.

    Args:
        mixture: Of these samples.
        shape: Shape (Cout, Cin/groups, kh, kw) of a kernel.
        geometry: Geometry of the convolution, its padding the same on both sides.
        groups: Groups of channels.
    """

    def __init__(self, mixture: Mixture, shape: list[int], geometry: Geometry, groups: int) -> None:
        self.mixture, self.geometry, self.groups = mixture, geometry, groups
        self.mixed = mix(mixture.attention, mixture.cells, shape)
        self.gate = None if mixture.positions is None else mixture.positions.view(-1, 1, 1, *shape[2:])
        self.kernels = self.mixed if self.gate is None else self.mixed * self.gate
        self.pointwise = groups == 1 and tuple(shape[2:]) == (1, 1) and max(geometry.padding) == 0

    def _places(self) -> Tensor:
        """The places (B, Cin, Hout*Wout) that a pointwise kernel looks at."""
        down, right = self.geometry.stride
        return self.mixture.x[:, :, ::down, ::right].flatten(2)

    def forward(self, size: tuple[int, int]) -> Tensor:
        """The output (B, Cout, *size)."""
        x = self.mixture.x
        if self.pointwise:
            return torch.bmm(self.kernels.flatten(2), self._places()).unflatten(2, size)
        out = F.conv2d(
            x.reshape(1, -1, *x.shape[2:]), self.kernels.flatten(0, 1), stride=self.geometry.stride,
            padding=(self.geometry.padding[2], self.geometry.padding[0]), dilation=self.geometry.dilation,
            groups=len(x) * self.groups,
        )  # fmt: skip
        return out.view(len(x), -1, *size)

    def backward(self, grad: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Gradients of the input, of the mixed cells (B*m, co*ci*a*b) and of the positions' gate."""
        x, positions = self.mixture.x, self.mixture.positions
        if self.pointwise:
            flat, (down, right) = grad.flatten(2), self.geometry.stride
            grad_kernels = torch.bmm(flat, self._places().mT).view_as(self.kernels)
            grad_x = None
            if need_x:
                places = torch.bmm(self.kernels.flatten(2).mT, flat).unflatten(2, grad.shape[2:])
                grad_x = places if down * right == 1 else torch.zeros_like(x)
                if down * right > 1:
                    grad_x[:, :, ::down, ::right] = places
        else:
            grad_x, grad_kernels, _ = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), x.reshape(1, -1, *x.shape[2:]), self.kernels.flatten(0, 1),
                bias_sizes=None, stride=self.geometry.stride,
                padding=(self.geometry.padding[2], self.geometry.padding[0]), dilation=self.geometry.dilation,
                transposed=False, output_padding=(0, 0), groups=len(x) * self.groups,
                output_mask=(need_x, True, False),
            )  # fmt: skip
            grad_x = grad_x.view_as(x) if need_x else None
            grad_kernels = grad_kernels.view_as(self.kernels)
        grad_positions = None
        if self.gate is not None:
            grad_positions = (grad_kernels * self.mixed).sum((1, 2)).view_as(positions)
            grad_kernels = grad_kernels * self.gate
        return grad_x, unmix(grad_kernels, self.mixture.cells), grad_positions


def chunks(mixture: Mixture, shape: list[int], limit: int) -> Iterator[tuple[slice, Mixture]]:
    """The samples in chunks whose kernels have up to `limit` elements; at least one sample each."""
    x, attention, cells, positions = mixture
    size = max(1, limit // max(1, shape[0] * shape[1] * shape[2] * shape[3]))
    for start in range(0, len(x), size):
        part = slice(start, start + size)
        yield part, Mixture(x[part], attention[part], cells, None if positions is None else positions[part])


def kernel(
    device_limits: Limits, x: Tensor, attention: Tensor, cells: Tensor, positions: Tensor | None, shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """The operator by PyTorch's operations."""
    geometry = Geometry.of(shape[2:], stride, padding, dilation)
    size = geometry.checked_output_size(x.shape[2], x.shape[3])
    output = x.new_empty(len(x), shape[0], *size)
    for part, mixture in chunks(Mixture(x.contiguous(), attention, cells, positions), shape, device_limits.chunk):
        output[part] = Chunk(mixture, shape, geometry, groups).forward(size)
    return output


def backward_kernel(
    device_limits: Limits, grad: Tensor, x: Tensor, attention: Tensor, cells: Tensor, positions: Tensor | None,
    shape: list[int], stride: list[int], padding: list[int], dilation: list[int], groups: int, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the input if it is needed, of attention and cells, and of the positions' gate if there is one."""
    geometry = Geometry.of(shape[2:], stride, padding, dilation)
    grad, x, count = grad.contiguous(), x.contiguous(), len(cells)
    grad_x = torch.empty_like(x) if need_x else None
    # Half precision would lose what each chunk adds.
    exact = torch.promote_types(cells.dtype, torch.float32)
    grad_attention, grad_cells = torch.empty_like(attention), torch.zeros_like(cells, dtype=exact).view(count, -1)
    grad_positions = None if positions is None else torch.empty_like(positions)
    for part, mixture in chunks(Mixture(x, attention, cells, positions), shape, device_limits.chunk):
        part_x, mixed, part_positions = Chunk(mixture, shape, geometry, groups).backward(grad[part], need_x)
        grad_attention[part] = torch.mm(mixed, cells.reshape(count, -1).mT).view_as(mixture.attention)
        shares = mixture.attention.reshape(-1, count).mT
        if exact == cells.dtype:
            grad_cells.addmm_(shares, mixed)
        else:
            grad_cells += torch.mm(shares, mixed)
        if grad_x is not None:
            grad_x[part] = part_x
        if grad_positions is not None:
            grad_positions[part] = part_positions
    found = (grad_x, grad_attention, grad_cells.view_as(cells).to(cells.dtype), grad_positions)
    return [gradient for gradient in found if gradient is not None]


def on_cpu(*arguments: Any) -> Tensor:
    """The operator on a CPU."""
    limits.keep_freed_memory()
    return kernel(limits.CPU, *arguments)


def elsewhere(*arguments: Any) -> Tensor:
    """The operator on other devices."""
    return kernel(limits.OTHER, *arguments)


def backward_on_cpu(*arguments: Any) -> list[Tensor]:
    """The backward pass on a CPU."""
    return backward_kernel(limits.CPU, *arguments)


def backward_elsewhere(*arguments: Any) -> list[Tensor]:
    """The backward pass on other devices."""
    return backward_kernel(limits.OTHER, *arguments)


def fake(
    x: Tensor, attention: Tensor, cells: Tensor, positions: Tensor | None, shape: list[int], stride: list[int],
    padding: list[int], dilation: list[int], groups: int,
) -> Tensor:  # fmt: skip
    """Empty tensor in the shape of the output."""
    geometry = Geometry.of(shape[2:], stride, padding, dilation)
    return x.new_empty(x.shape[0], shape[0], *geometry.checked_output_size(x.shape[2], x.shape[3]))


def backward_fake(
    grad: Tensor, x: Tensor, attention: Tensor, cells: Tensor, positions: Tensor | None, shape: list[int],
    stride: list[int], padding: list[int], dilation: list[int], groups: int, need_x: bool,
) -> list[Tensor]:  # fmt: skip
    """Empty tensors in the shapes of the gradients."""
    found = (x if need_x else None, attention, cells, positions)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in found if t is not None]


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs alone for the backward pass."""
    x, attention, cells, positions, *ctx.rest = inputs
    ctx.save_for_backward(x, attention, cells, positions)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    x, attention, cells, positions = ctx.saved_tensors
    shape, stride, padding, dilation, groups = ctx.rest
    need_x = ctx.needs_input_grad[0]
    with without_autocast(grad):
        if not transforms.needs_plain_gradients(grad):
            grads = torch.ops.fdconv_zoo.mixed_conv2d_backward.default(
                grad, x, attention, cells, positions, shape, stride=stride, padding=padding, dilation=dilation,
                groups=groups, need_x=need_x,
            )  # fmt: skip
            grads = grads if need_x else [None, *grads]
            return *grads, *[None] * (9 - len(grads))
        geometry = Geometry.of(shape[2:], stride, padding, dilation)

        def function(*tensors: Tensor) -> Tensor:
            return plain(Mixture(*tensors, *([None] if positions is None else [])), list(shape), geometry, groups)

        grads = transforms.gradients(function, [t for t in (x, attention, cells, positions) if t is not None], grad)
    return *grads, *[None] * (9 - len(grads))
