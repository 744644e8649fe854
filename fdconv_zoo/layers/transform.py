"""FDW's transform from spectrum to weights and its adjoint, in eager mode: fast on a CPU, without autograd.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.1)
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .fdw import GainMap, gain_table, gather_gains

# Elements of a block of work that stays in a CPU core's cache.
CACHE_ELEMENTS = 1 << 20
# Weight elements from which packing pays for its small operations.
PACKED_ELEMENTS = 1 << 15


def row_blocks(matrices: Tensor, multiple: int = 1) -> Iterator[slice]:
    """Slices of the rows of matrices (B, R, C), of a multiple of rows, that fit a CPU's cache; all rows on a GPU."""
    batch, rows, columns = matrices.shape
    size = rows if matrices.is_cuda else max(1, CACHE_ELEMENTS // (batch * columns * multiple)) * multiple
    return (slice(start, start + size) for start in range(0, rows, size))


def complex_table(gains: Tensor, inner_factor: float) -> Tensor:
    """:func:`~fdconv_zoo.layers.fdw.gain_table` in complex numbers.

    A product of mixed types would copy the gathered gains to complex numbers first.
    """
    return gain_table(gains, inner_factor).to(gains.dtype.to_complex())


def transform(spectrum: Tensor, gains: Tensor, gain_map: GainMap, columns: int) -> Tensor:
    """:func:`~fdconv_zoo.layers.fdw.synthesize` without autograd: see there.

    torch.fft.irfft2 makes two transforms with copies between them; the complex transform of a packed spectrum is one.
    """
    rows = len(spectrum)
    if columns % 2 == 0 and rows * columns >= PACKED_ELEMENTS and not spectrum.is_cuda:
        return transform_packed(spectrum, gains, gain_map)
    half = gather_gains(complex_table(gains, math.sqrt(0.5)), gain_map, columns // 2 + 1)
    half *= torch.view_as_complex(spectrum)
    return torch.fft.irfft(torch.fft.ifft(half, dim=1, norm="ortho"), n=columns, dim=2, norm="ortho")


def transform_packed(spectrum: Tensor, gains: Tensor, gain_map: GainMap) -> Tensor:
    """:func:`transform` for an even number of columns, by a complex transform of half the columns.

    Of a weight matrix w, z[n, j] = w[n, 2j] + i w[n, 2j+1] is the weight matrix as it lies in memory. With the half
    spectrum Y, M = C/2 and t[k] = i exp(2 pi i k/C), its spectrum is
    Z[u, k] = ((1 + t[k]) Y[u, k] + (1 - t[k]) conj(Y[-u, M-k])) / sqrt(2), orthonormal.
    """
    rows, half_columns = len(spectrum), spectrum.shape[1] - 1
    index, tiles = gain_map
    table = complex_table(gains, math.sqrt(0.5)).index_select(1, tiles.flatten()).view(-1, *tiles.shape)
    angle = torch.arange(half_columns, device=gains.device, dtype=gains.dtype) * (math.pi / half_columns)
    # The factors hold the 1/sqrt(2) of Z; that of the table is Parseval's.
    turn = torch.polar(torch.full_like(angle, math.sqrt(0.5)), angle)
    near, far = 1j * turn + math.sqrt(0.5), -1j * math.sqrt(0.5) - turn
    padded = table.new_empty(rows + 1, index.shape[1] * tiles.shape[1])
    half, places, weights = padded[:, : half_columns + 1], index.flatten(), []
    body, gathered = half[:rows], padded[:rows].view(-1, tiles.shape[1])
    for sample_table in table:
        torch.index_select(sample_table, 0, places, out=gathered)
        body.mul_(torch.view_as_complex(spectrum))
        half[rows] = half[0]  # row -u is then row R-u for all u
        # Columns 0 and M are their own mirror images; as everywhere, what is not Hermitian in them has no effect.
        mirrored = half[:, ::half_columns]
        # A lazy conj() is lost in operators that torch.compile calls.
        mirrored.add_(mirrored.flip(0).conj_physical_()).div_(2)
        # Turned round with real and imaginary parts exchanged, which is i times the conjugate.
        turned = torch.view_as_real(half[1:, 1:]).flatten(1).flip(0, 1).view(rows, half_columns, 2)
        packed = torch.view_as_complex(turned).mul_(far).addcmul_(body[:, :half_columns], near)
        weights.append(torch.fft.ifft2(packed, norm="ortho"))
    complex_weights = weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)
    return torch.view_as_real(complex_weights).flatten(2)


def adjoint(grad: Tensor, spectrum: Tensor, gains: Tensor, gain_map: GainMap, grad_spectrum: Tensor | None) -> Tensor:
    """Gradients of :func:`transform`: one transform, and sums by group.

    Args:
        grad: Gradient of the weight matrices (B, R, C).
        spectrum: As for :func:`transform`.
        gains: As for :func:`transform`.
        gain_map: As for :func:`transform`.
        grad_spectrum: The spectrum's gradient (R, C//2+1, 2), to which that of these samples is added, or None.

    Returns:
        Gradient of the gains (B, n).
    """
    batch, bins = len(gains), 2 * gains.shape[1]
    sums = torch.zeros(batch * bins, device=gains.device, dtype=gains.dtype)
    # One flat index_add_ with an offset for each sample: along dim 1 it is ten times slower on a CPU.
    offset = torch.arange(batch, device=gains.device, dtype=torch.int32)[:, None] * bins
    table = complex_table(gains, math.sqrt(2))
    # The Parseval-scaled transform is orthonormal, so its adjoint is its inverse: analyse the gradient.
    half = torch.fft.rfft2(grad, norm="ortho")
    for block in row_blocks(half):
        part, block_map = half[:, block], gain_map._replace(index=gain_map.index[block])
        products = torch.view_as_real(part) * spectrum[block]
        bin_index = gain_map.tiles.index_select(0, block_map.index.flatten())
        bin_index = bin_index.view(part.shape[1], -1)[:, : part.shape[2]].flatten()
        sums.index_add_(0, (offset + bin_index).flatten(), (products[..., 0] + products[..., 1]).flatten())
        if grad_spectrum is not None:
            part *= gather_gains(table, block_map, part.shape[2])
            grad_spectrum[block] += torch.view_as_real(part[0] if batch == 1 else part.sum(0))
    outer, inner = sums.view(batch, bins).chunk(2, dim=1)
    return outer + inner * math.sqrt(2)
