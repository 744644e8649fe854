"""FDW's transform from spectrum to weights and its adjoint, in eager mode: fast on a CPU, without autograd.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.1)
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .fdw import gather_gains

# Elements of a block of work that stays in a CPU core's cache.
CACHE_ELEMENTS = 1 << 20


def row_blocks(matrices: Tensor, multiple: int = 1) -> Iterator[slice]:
    """Slices of the rows of matrices (B, R, C), of a multiple of rows, that fit a CPU's cache; all rows on a GPU."""
    batch, rows, columns = matrices.shape
    size = rows if matrices.is_cuda else max(1, CACHE_ELEMENTS // (batch * columns * multiple)) * multiple
    return (slice(start, start + size) for start in range(0, rows, size))


def contiguous_matrices(x: Tensor) -> Tensor:
    """Contiguous copy of matrices (B, R, C); on a CPU, only a lone two-dimensional tensor is transposed fast."""
    return x[0].contiguous().unsqueeze(0) if x.shape[0] == 1 else x.contiguous()


def transform_rows(spectrum: Tensor, gains: Tensor, gain_index: Tensor) -> Tensor:
    """First half of :func:`transform`: gains and the transform along the rows' axis, to lines (B, R, C//2+1)."""
    coefficients, batch = torch.view_as_complex(spectrum), len(gains)
    half = coefficients.new_empty(batch, *coefficients.shape)
    # Complex gains: a product of mixed types would copy them to complex numbers first.
    table = torch.cat([gains, gains * math.sqrt(0.5)], dim=1).to(half.dtype)
    for sample in range(batch):
        for block in row_blocks(half[:1]):
            part = half[sample, block]
            torch.index_select(table[sample], 0, gain_index[block].flatten(), out=part.view(-1))
            part *= coefficients[block]
    return torch.fft.ifft(half, dim=1, norm="ortho")


def transform_columns(lines: Tensor, columns: int) -> Tensor:
    """Second half of :func:`transform`: any rows of the lines (B, rows, C//2+1) to those of the matrix (B, rows, C)."""
    return torch.fft.irfft(lines, n=columns, dim=2, norm="ortho")


def transform(spectrum: Tensor, gains: Tensor, gain_index: Tensor, columns: int) -> Tensor:
    """:func:`~fdconv_zoo.layers.fdw.synthesize` without autograd: see there.

    On a CPU, two one-dimensional transforms on contiguous memory take half the time of irfft2.
    """
    return transform_columns(transform_rows(spectrum, gains, gain_index), columns)


def adjoint_columns(grad: Tensor) -> Tensor:
    """Adjoint of :func:`transform_columns` but for the factors of :func:`adjoint_rows`: (B, rows, C) to lines."""
    return torch.fft.rfft(grad, dim=2, norm="ortho")


def adjoint_rows(
    lines: Tensor, spectrum: Tensor, gains: Tensor, gain_index: Tensor, grad_spectrum: Tensor | None
) -> Tensor:
    """Gradients of :func:`transform` from the lines of :func:`adjoint_columns`: one transform, and sums by group.

    Args:
        lines: Lines (B, R, C//2+1) of the gradient of the weight matrices.
        spectrum: As for :func:`transform`.
        gains: As for :func:`transform`.
        gain_index: As for :func:`transform`.
        grad_spectrum: The spectrum's gradient (R, C//2+1, 2), to which that of these samples is added, or None.

    Returns:
        Gradient of the gains (B, n).
    """
    # The Parseval-scaled transform is orthonormal, so its adjoint is its inverse: analyse the gradient.
    half = torch.fft.fft(lines, dim=1, norm="ortho")
    batch, bins = len(gains), 2 * gains.shape[1]
    sums = torch.zeros(batch * bins, device=gains.device, dtype=gains.dtype)
    # One flat index_add_ with an offset for each sample: along dim 1 it is ten times slower on a CPU.
    offset = torch.arange(batch, device=gains.device, dtype=torch.int32)[:, None] * bins
    # Blocks of columns stay in a CPU's cache, where the transposed result of the transform meets the spectrum.
    width = half.shape[2] if half.is_cuda else max(1, CACHE_ELEMENTS // (2 * batch * half.shape[1]))
    for start in range(0, half.shape[2], width):
        block = slice(start, start + width)
        part, index = contiguous_matrices(half[:, :, block]), gain_index[:, block]
        products = torch.view_as_real(part) * spectrum[:, block]
        flat_index = index.flatten() if batch == 1 else (offset + index.flatten()).flatten()
        sums.index_add_(0, flat_index, (products[..., 0] + products[..., 1]).flatten())
        if grad_spectrum is not None:
            part *= gather_gains(gains, math.sqrt(2), index)
            grad_spectrum[:, block] += torch.view_as_real(part[0] if batch == 1 else part.sum(0))
    outer, inner = sums.view(batch, bins).chunk(2, dim=1)
    return outer + inner * math.sqrt(2)
