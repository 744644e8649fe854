"""The bank: each frequency group's part of the weight, of which a sample's weight is a sum (Eq. 4-5).

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

Mixing is linear, so n transforms serve any number of samples. Groups are disjoint: a coefficient takes part in one
transform each way.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..fourier import GainMap, column_scale, lines_to_rows
from . import transforms

# Elements of the matrices that are transformed at once.
CHUNK = 1 << 26


def group_chunks(num_bands: int, elements: int) -> Iterator[slice]:
    """Slices of the groups, given the elements of one matrix."""
    step = max(1, CHUNK // elements)
    return (slice(start, min(start + step, num_bands)) for start in range(0, num_bands, step))


def group_of_coefficients(gain_map: GainMap, num_bands: int, count: int) -> Tensor:
    """Group of each coefficient (R, count), int64."""
    tiles = (gain_map.tiles % num_bands).long()
    return tiles[gain_map.index].flatten(1)[:, :count]


def make_bank(coefficients: Tensor, gain_map: GainMap, num_bands: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Weight matrix of each group at a gain of one.

    Args:
        coefficients: Spectrum (R, C//2+1, 2), transformed in float32 at least.
        gain_map: Which gain each coefficient takes.
        num_bands: Groups n.
        columns: Columns C of the weight matrix.
        dtype: That of the result.

    Returns:
        Bank (n, R, C).
    """
    exact = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    rows, count = exact.shape[:2]
    half = torch.view_as_complex(exact.contiguous()) / column_scale(columns, exact.device, exact.dtype)
    groups = group_of_coefficients(gain_map, num_bands, count)
    bank = exact.new_empty(num_bands, rows, columns, dtype=dtype)
    for chunk in group_chunks(num_bands, rows * columns):
        number = torch.arange(chunk.start, chunk.stop, device=groups.device)[:, None, None]
        lines = torch.fft.ifft(torch.where(groups == number, half, 0), dim=1, norm="ortho")
        bank[chunk] = lines_to_rows(lines, columns)
    return bank


def bank_adjoint(grad: Tensor, gain_map: GainMap) -> Tensor:
    """Gradient (R, C//2+1, 2) of the coefficients, given that of the bank (n, R, C); float32 at least."""
    num_bands, rows, columns = grad.shape
    exact_dtype = torch.promote_types(grad.dtype, torch.float32)
    groups = group_of_coefficients(gain_map, num_bands, columns // 2 + 1)
    found = grad.new_zeros(groups.shape, dtype=exact_dtype.to_complex())
    for chunk in group_chunks(num_bands, rows * columns):
        half = torch.fft.rfft2(grad[chunk].to(exact_dtype), norm="ortho")
        number = groups - chunk.start
        own = half.gather(0, number.clamp(0, len(half) - 1)[None])[0]
        found = torch.where((number >= 0) & (number < len(half)), own, found)
    return torch.view_as_real(found * column_scale(columns, grad.device, exact_dtype))


# As an operator


def bank_kernel(
    coefficients: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """:func:`make_bank`."""
    return make_bank(coefficients, GainMap(gain_index, gain_tiles), num_bands, columns, dtype)


def bank_fake(
    coefficients: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Empty tensor in the shape of the bank."""
    return coefficients.new_empty(num_bands, len(coefficients), columns, dtype=dtype)


def bank_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the gain map: the bank is linear in the coefficients."""
    coefficients, *gain_map = inputs[:3]
    ctx.save_for_backward(*gain_map)
    ctx.dtype = coefficients.dtype


def bank_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    if transforms.needs_plain_gradients(grad):
        found = bank_backward_kernel(grad, *ctx.saved_tensors, ctx.dtype)
    else:
        found = torch.ops.fdconv_zoo.bank_backward.default(grad, *ctx.saved_tensors, ctx.dtype)
    return found, None, None, None, None, None


def bank_backward_kernel(grad: Tensor, gain_index: Tensor, gain_tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`bank_adjoint`, in the dtype of the coefficients."""
    return bank_adjoint(grad, GainMap(gain_index, gain_tiles)).to(dtype)


def bank_backward_fake(grad: Tensor, gain_index: Tensor, gain_tiles: Tensor, dtype: torch.dtype) -> Tensor:
    """Empty tensor in the shape of the coefficients' gradient."""
    return grad.new_empty(grad.shape[1], grad.shape[2] // 2 + 1, 2, dtype=dtype)
