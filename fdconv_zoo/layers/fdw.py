"""Fourier Disjoint Weight (FDW): one weight budget in the Fourier domain, split into disjoint frequency groups.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.1)

The weight of a convolution is laid out as a matrix of R = Cout*kh rows and C = Cin*kw columns. The coefficients of its
half spectrum are sorted by radius and cut into `num_bands` groups; each sample scales every group by a gain of its own.

What differs from the official code:
- The spectrum is stored so that Parseval's theorem holds (norm of the parameter = norm of the weight). A step of SGD on
  it moves the weight exactly as a step on the weight would, so learning rates and weight decay carry over.
- Any number of groups is allowed, also one that does not divide the number of coefficients.
- Gains are gathered by a map of the grid, eight neighbours at once, instead of scattering coefficients group by group.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .matmul_fft import inverse_rfft2

# Neighbours of a row that are gathered at once: 2 to this power.
TILE_LEVELS = 3


class GainMap(NamedTuple):
    """The gain of each coefficient. Neighbours mostly share a group, so a map has few distinct tiles of eight.

    A look-up costs little more for a tile than for one number, and the map is an eighth as large.

    Attributes:
        index: Tile of each eight neighbours of a row, int32 (R, ceil((C//2+1) / 8)).
        tiles: Where in the 2n columns of :func:`gain_table` the gains of each distinct tile are, int32 (P, 8).
    """

    index: Tensor
    tiles: Tensor


def band_index(rows: int, columns: int, num_bands: int, official_order: bool = False) -> Tensor:
    """Frequency group of every coefficient of a half spectrum (Sec. 3.1, "Fourier Disjoint Weight").

    Args:
        rows: Rows R of the weight matrix.
        columns: Columns C of the weight matrix.
        num_bands: Groups n. Where the coefficients do not divide evenly, the first groups take one more.
        official_order: Order coefficients of equal radius as the official code does, whose sort is not stable. By
            default they keep the order of the flattened grid, the same on every machine.

    Returns:
        int32 tensor (R, C//2+1) on the CPU, values 0 (lowest frequencies) to n-1.

    Raises:
        ValueError: If `num_bands` is below 1 or above the number of coefficients.
    """
    count = rows * (columns // 2 + 1)
    if not 1 <= num_bands <= count:
        raise ValueError(f"num_bands={num_bands}, but a {rows}x{columns} weight matrix has 1 to {count} bands")
    # The device is named so that a surrounding `torch.device("meta")` context does not apply.
    vertical = torch.fft.fftfreq(rows, device="cpu", dtype=torch.float32)
    horizontal = torch.fft.rfftfreq(columns, device="cpu", dtype=torch.float32)
    if official_order:
        grid = torch.stack(torch.meshgrid(vertical, horizontal, indexing="ij"), dim=-1)
        order = grid.norm(dim=-1).flatten().sort().indices
    else:
        order = (vertical[:, None] ** 2 + horizontal[None, :] ** 2).sqrt().flatten().sort(stable=True).indices
    bands = torch.empty(count, dtype=torch.int32, device="cpu")
    for band, members in enumerate(order.tensor_split(num_bands)):
        bands[members] = band
    return bands.view(rows, -1)


def column_scale(columns: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Parseval factor of each column of a half spectrum: 1 where a column is its own mirror image, else sqrt(2).

    Returns:
        Tensor (C//2+1,).
    """
    scale = torch.full((columns // 2 + 1,), math.sqrt(2), device=device, dtype=dtype)
    scale[0] = 1
    if columns % 2 == 0:
        scale[-1] = 1
    return scale


def weight_to_matrix(weight: Tensor) -> Tensor:
    """Lays out a weight (Cout, Cin, kh, kw) as the matrix (Cout*kh, Cin*kw) of Sec. 3.1."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)


def matrix_to_weight(matrix: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`weight_to_matrix`: (Cout*kh, Cin*kw) to (Cout, Cin, kh, kw)."""
    kh, kw = kernel_size
    return matrix.view(matrix.shape[0] // kh, kh, matrix.shape[1] // kw, kw).transpose(1, 2).contiguous()


def to_spectrum(matrix: Tensor) -> Tensor:
    """Half spectrum of a weight matrix, scaled so that its norm is that of the matrix (Parseval).

    Args:
        matrix: Real tensor (R, C). Half precision is transformed in float32.

    Returns:
        Tensor (R, C//2+1, 2) of real and imaginary parts, dtype of `matrix`.
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    scale = column_scale(matrix.shape[1], exact.device, exact.dtype)
    spectrum = torch.view_as_real(torch.fft.rfft2(exact, norm="ortho") * scale)
    return spectrum.to(matrix.dtype)


def from_spectrum(spectrum: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`to_spectrum`: (R, C//2+1, 2) to the weight matrix (R, C)."""
    exact = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
    half = torch.view_as_complex(exact.contiguous()) / column_scale(columns, exact.device, exact.dtype)
    return torch.fft.irfft2(half, s=(spectrum.shape[0], columns), norm="ortho").to(spectrum.dtype)


def make_gain_map(bands: Tensor, num_bands: int, columns: int) -> GainMap:
    """Map from the groups of all coefficients, int32 (R, C//2+1), of a matrix of `columns` columns.

    The distinct pairs of neighbours are numbered, then the distinct pairs of those, and again. The last coefficient
    of a row is repeated to fill its tile.
    """
    index = bands.long()
    index[:, 1 : (columns + 1) // 2] += num_bands
    missing = -index.shape[1] % 2**TILE_LEVELS
    index = torch.cat([index, index[:, -1:].expand(-1, missing)], dim=1)
    tiles = torch.arange(2 * num_bands, device=index.device)[:, None]
    for _ in range(TILE_LEVELS):
        pairs, index = torch.unique(index[:, ::2] * len(tiles) + index[:, 1::2], return_inverse=True)
        tiles = torch.cat([tiles[pairs // len(tiles)], tiles[pairs % len(tiles)]], dim=1)
    return GainMap(index.int(), tiles.int())


def gain_table(gains: Tensor, inner_factor: float) -> Tensor:
    """Gains (B, n) and their products with the factor of the columns that are not their own mirror image (B, 2n)."""
    return torch.cat([gains, gains * inner_factor], dim=1)


def gather_gains(table: Tensor, gain_map: GainMap, count: int) -> Tensor:
    """Gain of each of a row's `count` coefficients: tables (B, 2n) to gains (B, R, count), a view."""
    index, tiles = gain_map.index, gain_map.tiles
    by_tile = table.index_select(1, tiles.flatten()).view(-1, tiles.shape[0], tiles.shape[1])
    rows = by_tile.index_select(1, index.flatten()).view(-1, index.shape[0], index.shape[1] * tiles.shape[1])
    return rows[:, :, :count]


def synthesize(spectrum: Tensor, gains: Tensor, gain_map: GainMap, columns: int) -> Tensor:
    """Weight matrices from one spectrum and the gains of its groups (Eq. 4-5).

    Args:
        spectrum: Parseval-scaled half spectrum (R, C//2+1, 2), float32 or float64.
        gains: Gain of each group for each sample (B, n), dtype of `spectrum`.
        gain_map: Which gain each coefficient takes.
        columns: Columns C of the weight matrix.

    Returns:
        Weight matrices (B, R, C).
    """
    # The second half of the table undoes the sqrt(2) of the Parseval scaling in the same gather.
    half = spectrum * gather_gains(gain_table(gains, math.sqrt(0.5)), gain_map, columns // 2 + 1).unsqueeze(-1)
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return inverse_rfft2(half, columns)
    lines = torch.fft.ifft(torch.view_as_complex(half), dim=1, norm="ortho").contiguous()
    return torch.fft.irfft(lines, n=columns, dim=2, norm="ortho")


class FDW(nn.Module):
    """Fourier Disjoint Weight: the spectrum of a weight matrix and the groups of its coefficients.

    Args:
        rows: Rows R = Cout*kh of the weight matrix.
        columns: Columns C = Cin*kw of the weight matrix.
        num_bands: Frequency groups n.
        official_order: See :func:`band_index`.
        fan_in: Inputs of one output, Cin*kh*kw, for the initialisation; C if it is not given.
        device: Device of the parameter.
        dtype: Dtype of the parameter; the transforms run in float32 at least.

    Raises:
        ValueError: If `num_bands` is below 1 or above the number of coefficients.
    """

    gain_index: Tensor
    gain_tiles: Tensor

    def __init__(
        self,
        rows: int,
        columns: int,
        num_bands: int = 64,
        official_order: bool = False,
        fan_in: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.num_bands = num_bands
        self.official_order = official_order
        self.fan_in = fan_in or columns
        self.spectrum = nn.Parameter(torch.empty(rows, columns // 2 + 1, 2, device=device, dtype=dtype))
        self.register_buffer("gain_index", None, persistent=False)
        self.register_buffer("gain_tiles", None, persistent=False)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Recomputes the gain map and initialises the weight matrix as nn.Conv2d and nn.Linear do."""
        self.init_non_persistent_buffers()
        bound = self.fan_in**-0.5
        self.set_matrix(torch.empty(self.rows, self.columns, device=self.spectrum.device).uniform_(-bound, bound))

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Recomputes the gain map after construction on the meta device (timm's and Hugging Face's protocol)."""
        bands = band_index(self.rows, self.columns, self.num_bands, self.official_order)
        index, tiles = make_gain_map(bands, self.num_bands, self.columns)
        self.gain_index, self.gain_tiles = index.to(self.spectrum.device), tiles.to(self.spectrum.device)

    def gain_map(self) -> GainMap:
        """Which gain each coefficient takes."""
        return GainMap(self.gain_index, self.gain_tiles)

    @torch.jit.ignore
    def band_index(self) -> Tensor:
        """Group of every coefficient, int32 (R, C//2+1)."""
        tiles = self.gain_tiles[self.gain_index] % self.num_bands
        return tiles.flatten(1)[:, : self.columns // 2 + 1].contiguous()

    @torch.jit.ignore
    def matrix(self) -> Tensor:
        """The weight matrix (R, C) at gains of one: the static weight."""
        return from_spectrum(self.spectrum, self.columns)

    @torch.jit.ignore
    @torch.no_grad()
    def set_matrix(self, matrix: Tensor) -> None:
        """Makes the static weight equal to `matrix` (R, C)."""
        self.spectrum.copy_(to_spectrum(matrix))

    @torch.jit.ignore
    def group_matrix(self, band: int) -> Tensor:
        """The part of the weight matrix (R, C) that group `band` contributes at a gain of one."""
        return from_spectrum(self.spectrum * (self.band_index() == band).unsqueeze(-1), self.columns)

    def exact_spectrum(self) -> Tensor:
        """The parameter in the precision of the transforms: float32, or float64 if it is float64."""
        return self.spectrum.to(torch.promote_types(self.spectrum.dtype, torch.float32))

    def forward(self, gains: Tensor) -> Tensor:
        """Weight matrices (B, R, C) for the gains (B, n) of B samples."""
        spectrum = self.exact_spectrum()
        return synthesize(spectrum, gains.to(spectrum.dtype), self.gain_map(), self.columns)

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, num_bands={self.num_bands}"
