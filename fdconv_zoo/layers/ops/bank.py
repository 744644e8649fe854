"""The bank: each frequency group's part of the weight, of which a sample's weight is a sum (Eq. 4-5).

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

Mixing is linear, so n transforms serve any number of samples. Groups are disjoint: a coefficient takes part in one
transform each way.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..fourier import GainMap, as_complex, column_scale
from . import transforms, triton

# Elements of the matrices that are transformed at once.
CHUNK = 1 << 26


def group_chunks(num_bands: int, elements: int) -> Iterator[slice]:
    """Slices of the groups, given the elements of one matrix."""
    step = max(1, CHUNK // elements)
    return (slice(start, min(start + step, num_bands)) for start in range(0, num_bands, step))


def group_of_coefficients(gain_map: GainMap, num_bands: int, count: int) -> Tensor:
    """Group of each coefficient (R, count), int32."""
    tiles = gain_map.tiles % num_bands
    return tiles[gain_map.index].flatten(1)[:, :count]


def make_hermitian(spectra: Tensor, columns: int) -> Tensor:
    """Takes from half spectra (n, R, C//2+1), in place, what no real matrix has: see :func:`drop_unpaired`.

    It lies in the columns that are their own mirror image. A transform of both axes at once wants them to be right
    before it.
    """
    rows = spectra.shape[1]
    lines = spectra[:, :, :: columns // 2] if columns % 2 == 0 else spectra[:, :, :1]
    mirror = (rows - torch.arange(rows, device=spectra.device)) % rows
    # Not the lazy conj(): within a call that torch.compile is set up in, add_ takes it as it was.
    lines.add_(lines.index_select(1, mirror).conj_physical()).mul_(0.5)
    return spectra


def matrix_shape(bank: Tensor, kernel_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the weight matrix, given a bank (n, Cout*kh*kw, Cin)."""
    return bank.shape[1] // kernel_size[1], bank.shape[2] * kernel_size[1]


def transform(spectra: Iterable[tuple[slice, Tensor]], bank: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Fills a bank (n, Cout*kh*kw, Cin), given groups and their half spectra."""
    (rows, columns), (kh, kw) = matrix_shape(bank, kernel_size), kernel_size
    by_position = bank.view(len(bank), rows // kh, kh, kw, columns // kw)
    for groups, half in spectra:
        matrices = torch.fft.irfft2(half, s=(rows, columns), norm="forward")
        by_position[groups] = matrices.unflatten(2, (-1, kw)).unflatten(1, (-1, kh)).movedim(4, 3)
    return bank


def transform_back(grad: Tensor, kernel_size: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """Groups and the unscaled half spectra of their gradients, given that of the bank; float32 at least."""
    (rows, columns), (kh, kw) = matrix_shape(grad, kernel_size), kernel_size
    exact_dtype = torch.promote_types(grad.dtype, torch.float32)
    by_position = grad.unflatten(1, (-1, kh, kw)).movedim(3, 4)
    for groups in group_chunks(len(grad), rows * columns):
        # Casts and lays out at once: a cast keeps the layout.
        own = by_position[groups]
        matrices = own.new_empty(own.shape, dtype=exact_dtype).copy_(own)
        yield groups, torch.fft.rfft2(matrices.view(-1, rows, columns))


def make_bank(
    coefficients: Tensor,
    gain_map: GainMap,
    num_bands: int,
    columns: int,
    kernel_size: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Weights of each group at a gain of one.

    Args:
        coefficients: Spectrum (R, C//2+1, 2), transformed in float32 at least.
        gain_map: Which gain each coefficient takes.
        num_bands: Groups n.
        columns: Columns C of the weight matrix.
        kernel_size: (kh, kw).
        dtype: That of the result.

    Returns:
        Bank (n, Cout*kh*kw, Cin): unlike in the matrices, neighbours are channels, as the kernels of a GPU read them.
    """
    exact = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
    rows, count = exact.shape[:2]
    # The transform's own scale would be another pass over all groups.
    scale = column_scale(columns, exact.device, exact.dtype) * math.sqrt(rows * columns)
    half = as_complex(exact) / scale
    groups = group_of_coefficients(gain_map, num_bands, count)
    numbers = torch.arange(num_bands, dtype=torch.int32, device=groups.device)[:, None, None]
    spectra = (
        (chunk, make_hermitian(torch.where(groups == numbers[chunk], half, 0), columns))
        for chunk in group_chunks(num_bands, rows * columns)
    )
    return transform(spectra, bank_fake(exact, *gain_map, num_bands, columns, kernel_size, dtype), kernel_size)


def bank_adjoint(grad: Tensor, gain_map: GainMap, kernel_size: tuple[int, int]) -> Tensor:
    """Gradient (R, C//2+1, 2) of the coefficients, given that of :func:`make_bank`; float32 at least."""
    rows, columns = matrix_shape(grad, kernel_size)
    exact_dtype = torch.promote_types(grad.dtype, torch.float32)
    groups = group_of_coefficients(gain_map, len(grad), columns // 2 + 1)
    found = grad.new_zeros(groups.shape, dtype=exact_dtype.to_complex())
    for chunk, half in transform_back(grad, kernel_size):
        number = groups - chunk.start
        own = half.gather(0, number.clamp(0, len(half) - 1).long()[None])[0]
        found = torch.where((number >= 0) & (number < len(half)), own, found)
    scale = column_scale(columns, grad.device, exact_dtype) / math.sqrt(rows * columns)
    return torch.view_as_real(found * scale)


# As an operator


def bank_kernel(
    coefficients: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, kernel_size: list[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """:func:`make_bank`."""
    return make_bank(coefficients, GainMap(gain_index, gain_tiles), num_bands, columns, tuple(kernel_size), dtype)


def bank_on_gpu(
    coefficients: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, kernel_size: list[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """:func:`make_bank`, with Triton's kernels where they are there for it."""
    exact_dtype = torch.promote_types(coefficients.dtype, torch.float32)
    if not triton.computes(coefficients.device, dtype, exact_dtype):
        return bank_kernel(coefficients, gain_index, gain_tiles, num_bands, columns, kernel_size, dtype)
    from .triton import bank as triton_bank

    spectra = triton_bank.group_spectra(coefficients, GainMap(gain_index, gain_tiles), num_bands, columns)
    bank = bank_fake(coefficients, gain_index, gain_tiles, num_bands, columns, kernel_size, dtype)
    return transform(spectra, bank, tuple(kernel_size))


def bank_fake(
    coefficients: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, kernel_size: list[int],
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Empty tensor in the shape of the bank."""
    width = kernel_size[1]
    return coefficients.new_empty(num_bands, len(coefficients) * width, columns // width, dtype=dtype)


def bank_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the gain map: the bank is linear in the coefficients."""
    coefficients, *gain_map = inputs[:3]
    ctx.save_for_backward(*gain_map)
    ctx.dtype, ctx.kernel_size = coefficients.dtype, inputs[5]


def bank_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    operator = torch.ops.fdconv_zoo.bank_backward.default
    find = bank_backward_kernel if transforms.needs_plain_gradients(grad) else operator
    return find(grad, *ctx.saved_tensors, ctx.kernel_size, ctx.dtype), None, None, None, None, None, None


def bank_backward_kernel(
    grad: Tensor, gain_index: Tensor, gain_tiles: Tensor, kernel_size: list[int], dtype: torch.dtype
) -> Tensor:
    """:func:`bank_adjoint`, in the dtype of the coefficients."""
    return bank_adjoint(grad, GainMap(gain_index, gain_tiles), tuple(kernel_size)).to(dtype)


def bank_backward_on_gpu(
    grad: Tensor, gain_index: Tensor, gain_tiles: Tensor, kernel_size: list[int], dtype: torch.dtype
) -> Tensor:
    """:func:`bank_adjoint`, with Triton's kernels where they are there for it."""
    if not triton.computes(grad.device, grad.dtype, torch.promote_types(dtype, torch.float32)):
        return bank_backward_kernel(grad, gain_index, gain_tiles, kernel_size, dtype)
    from .triton import bank as triton_bank

    return triton_bank.bank_adjoint(grad, GainMap(gain_index, gain_tiles), tuple(kernel_size)).to(dtype)


def bank_backward_fake(
    grad: Tensor, gain_index: Tensor, gain_tiles: Tensor, kernel_size: list[int], dtype: torch.dtype
) -> Tensor:
    """Empty tensor in the shape of the coefficients' gradient."""
    width = kernel_size[1]
    return grad.new_empty(grad.shape[1] // width, grad.shape[2] * width // 2 + 1, 2, dtype=dtype)
