"""FDW's transform from spectrum to weights and its adjoint, fast on a CPU, without autograd.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.1)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...fourier import as_complex, gather_gains, lines_to_rows
from ..types import Plan, Spectrum


def row_blocks(matrices: Tensor, size: int | None, multiple: int = 1) -> Iterator[slice]:
    """Slices of a multiple of rows of matrices (B, R, C), of about `size` elements each; all rows for None."""
    batch, rows, columns = matrices.shape
    step = rows if size is None else max(1, size // (batch * columns * multiple)) * multiple
    return (slice(start, start + step) for start in range(0, rows, step))


def complex_table(gains: Tensor, inner_factor: float) -> Tensor:
    """:func:`~fdconv_zoo.layers.fourier.gain_table` in complex numbers.

    A product of mixed types would copy the gathered gains to complex numbers first.
    """
    return torch.cat([gains, gains * inner_factor], dim=1).to(gains.dtype.to_complex())


def packing_factors(spectrum: Tensor) -> tuple[Tensor, Tensor]:
    """Factors (M,) of a coefficient and of its mirror image in a packed spectrum: see :meth:`Transform._unpack`.

    They hold the 1/sqrt(2) of Z, and that of the mirror image is divided by i, for the exchange of its parts.
    """
    half_columns = spectrum.shape[1] - 1
    angle = torch.arange(half_columns, device=spectrum.device, dtype=spectrum.dtype) * (math.pi / half_columns)
    turn = torch.polar(torch.full_like(angle, math.sqrt(0.5)), angle)
    return 1j * turn + math.sqrt(0.5), -1j * math.sqrt(0.5) - turn


@dataclass
class Transform:
    """A layer's transform from spectrum to weights, and its adjoint; what all samples share is made once.

    Attributes:
        spectrum: Spectrum of the weight.
        columns: Columns C of the weight matrix.
        plan: Plan of the call.
    """

    spectrum: Spectrum
    columns: int
    plan: Plan

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor]:
        """:func:`packing_factors`."""
        return packing_factors(self.spectrum.coefficients)

    def __call__(self, gains: Tensor) -> Tensor:
        """:func:`~fdconv_zoo.layers.ops.weight_matrices` without autograd: gains (B, n) to weight matrices (B, R, C).

        torch.fft.irfft2 makes two transforms with copies between them; the complex transform of a packed spectrum is
        one.
        """
        if self.plan.packed:
            return self._unpack(gains, *self.factors)
        coefficients, gain_map = self.spectrum.coefficients, self.spectrum.gain_map
        half = gather_gains(complex_table(gains, math.sqrt(0.5)), gain_map, self.columns // 2 + 1)
        half *= as_complex(coefficients)
        return lines_to_rows(torch.fft.ifft(half, dim=1, norm="ortho"), self.columns)

    def _unpack(self, gains: Tensor, near: Tensor, far: Tensor) -> Tensor:
        """Weight matrices for an even number of columns, by a complex transform of half the columns.

        Of a weight matrix w, z[n, j] = w[n, 2j] + i w[n, 2j+1] is the weight matrix as it lies in memory. With the half
        spectrum Y, M = C/2 and t[k] = i exp(2 pi i k/C), its spectrum is
        Z[u, k] = ((1 + t[k]) Y[u, k] + (1 - t[k]) conj(Y[-u, M-k])) / sqrt(2), orthonormal.
        """
        rows, half_columns = len(self.spectrum.coefficients), self.columns // 2
        index, tiles = self.spectrum.gain_map
        spectrum, places = as_complex(self.spectrum.coefficients), index.flatten()
        # Columns 0 and M are their own mirror images, and the mean with it is taken of them: they come at half size.
        table = complex_table(gains * 0.5, math.sqrt(2)).index_select(1, tiles.flatten()).view(-1, *tiles.shape)
        padded = table.new_empty(rows + 1, index.shape[1] * tiles.shape[1])
        half, weights = padded[:, : half_columns + 1], []
        body, gathered = half[:rows], padded[:rows].view(-1, tiles.shape[1])
        mirrored, inner = half[:, ::half_columns], body[:, :half_columns]
        # Turned round with real and imaginary parts exchanged, which is i times the conjugate.
        to_turn = torch.view_as_real(half[1:, 1:])
        for sample_table in table:
            torch.index_select(sample_table, 0, places, out=gathered)
            body.mul_(spectrum)
            half[rows] = half[0]  # row -u is then row R-u for all u
            # What is not Hermitian has no effect, here as everywhere. A lazy conj() is lost in operators that
            # torch.compile calls.
            mirrored.add_(mirrored.flip(0).conj_physical_())
            turned = to_turn.flatten(1).flip(0, 1).view(rows, half_columns, 2)
            packed = torch.view_as_complex(turned).mul_(far).addcmul_(inner, near)
            weights.append(torch.fft.ifft2(packed, norm="ortho"))
        complex_weights = weights[0].unsqueeze(0) if len(weights) == 1 else torch.stack(weights)
        return torch.view_as_real(complex_weights).flatten(2)

    def adjoint(self, grad: Tensor, gains: Tensor, grad_spectrum: Tensor | None) -> Tensor:
        """Gradients of the weight matrices: one transform, and sums by group.

        Args:
            grad: Gradient of the weight matrices (B, R, C).
            gains: Gains (B, n).
            grad_spectrum: The spectrum's gradient (R, C//2+1, 2), to which that of these samples is added, or None.

        Returns:
            Gradient of the gains (B, n).
        """
        coefficients, gain_map = self.spectrum.coefficients, self.spectrum.gain_map
        batch, bins = len(gains), 2 * gains.shape[1]
        sums = torch.zeros(batch * bins, device=gains.device, dtype=gains.dtype)
        # One flat index_add_ with an offset for each sample: along dim 1 it is ten times slower on a CPU.
        offset = torch.arange(batch, device=gains.device, dtype=torch.int32)[:, None] * bins
        table = complex_table(gains, math.sqrt(2))
        # The Parseval-scaled transform is orthonormal, so its adjoint is its inverse: analyse the gradient.
        half = torch.fft.rfft2(grad, norm="ortho")
        for block in row_blocks(half, self.plan.block):
            part, block_map = half[:, block], gain_map._replace(index=gain_map.index[block])
            products = torch.view_as_real(part) * coefficients[block]
            bin_index = gain_map.tiles.index_select(0, block_map.index.flatten())
            bin_index = bin_index.view(part.shape[1], -1)[:, : part.shape[2]].flatten()
            sums.index_add_(0, (offset + bin_index).flatten(), (products[..., 0] + products[..., 1]).flatten())
            if grad_spectrum is not None:
                part *= gather_gains(table, block_map, part.shape[2])
                grad_spectrum[block] += torch.view_as_real(part[0] if batch == 1 else part.sum(0))
        outer, inner = sums.view(batch, bins).chunk(2, dim=1)
        return outer + inner * math.sqrt(2)
