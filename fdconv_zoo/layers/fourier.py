"""Weight matrices and their half spectra, the frequency groups of the coefficients, and which gain each one takes.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.1)

The weight of a convolution is laid out as a matrix of R = Cout*kh rows and C = Cin*kw columns. The coefficients of its
half spectrum are sorted by radius and cut into groups; each sample scales every group by a gain of its own.

What differs from the official code:
- Spectra are scaled so that Parseval's theorem holds (norm of the spectrum = norm of the weight).
- Any number of groups is allowed, also one that does not divide the number of coefficients.
- Gains are gathered by a map of the grid, eight neighbours at once, instead of scattering coefficients group by group.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Neighbours of a row that are gathered at once: 2 to this power.
TILE_LEVELS = 3
# Bins of the radius: a few hundredths of the coefficients lie in one that a border cuts.
RADIUS_BINS = 1 << 13


class GainMap(NamedTuple):
    """The gain of each coefficient. Neighbours mostly share a group, so a map has few distinct tiles of eight.

    A look-up costs little more for a tile than for one number, and the map is an eighth as large.

    Attributes:
        index: Tile of each eight neighbours of a row, int32 (R, ceil((C//2+1) / 8)).
        tiles: Where in the 2n columns of :func:`gain_table` the gains of each distinct tile are, int32 (P, 8).
    """

    index: Tensor
    tiles: Tensor


def check_num_bands(rows: int, columns: int, num_bands: int) -> None:
    """Raises a ValueError unless the coefficients of a matrix (R, C) are enough for the groups, and there is one."""
    count = rows * (columns // 2 + 1)
    if not 1 <= num_bands <= count:
        raise ValueError(f"num_bands={num_bands}, but a {rows}x{columns} weight matrix has 1 to {count} bands")


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
    check_num_bands(rows, columns, num_bands)
    count = rows * (columns // 2 + 1)
    # The device is named so that a surrounding `torch.device("meta")` context does not apply.
    vertical = torch.fft.fftfreq(rows, device="cpu", dtype=torch.float32)
    horizontal = torch.fft.rfftfreq(columns, device="cpu", dtype=torch.float32)
    if official_order:
        grid = torch.stack(torch.meshgrid(vertical, horizontal, indexing="ij"), dim=-1)
        order = grid.norm(dim=-1).flatten().sort().indices
        bands = torch.empty(count, dtype=torch.int32, device="cpu")
        bands[order] = _band_of_rank(torch.arange(count, device="cpu"), count, num_bands)
    else:
        bands = _cut_into_bands((vertical[:, None] ** 2 + horizontal[None, :] ** 2).sqrt().flatten(), num_bands)
    return bands.view(rows, -1)


def _band_of_rank(ranks: Tensor, count: int, num_bands: int) -> Tensor:
    """Groups, int32, of coefficients by their rank among `count`: the first groups take one more where it is needed."""
    size, left_over = divmod(count, num_bands)
    in_larger = left_over * (size + 1)
    larger, others = ranks // (size + 1), left_over + (ranks - in_larger) // size
    return torch.where(ranks < in_larger, larger, others).int()


def _cut_into_bands(radii: Tensor, num_bands: int) -> Tensor:
    """Groups, int32, of coefficients by their radius (N,), those of equal radius in order.

    As a stable sort would, but only what lies close to a border is sorted: the rest is counted.
    """
    bins = (radii * (RADIUS_BINS / max(radii.max().item(), 1e-6))).int()
    counts = torch.bincount(bins)
    starts = counts.cumsum(0) - counts
    first, last = (_band_of_rank(ranks, len(radii), num_bands) for ranks in (starts, starts + counts - 1))
    is_cut = (first != last) & (counts > 0)
    # index_select takes int32 as it is, for which indexing makes a copy.
    bands = first.masked_fill(is_cut, -1).index_select(0, bins)
    near = (bands < 0).nonzero().squeeze(1)
    order = radii[near].sort(stable=True).indices
    places = near[order]
    # Bins follow each other in this order, each from its own start.
    cut_counts = counts * is_cut
    shift = starts - (cut_counts.cumsum(0) - cut_counts)
    ranks = torch.arange(len(places), device="cpu") + shift[bins[places]]
    bands[places] = _band_of_rank(ranks, len(radii), num_bands)
    return bands


def column_scale(columns: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Parseval factor of each column of a half spectrum: 1 where a column is its own mirror image, else sqrt(2).

    Returns:
        Tensor (C//2+1,).
    """
    scale = torch.full((columns // 2 + 1,), math.sqrt(2), device=device, dtype=dtype)
    # No assignment of a number to an element: it is copied from the host, which a captured CUDA graph can't do.
    scale[:1].fill_(1)
    if columns % 2 == 0:
        scale[-1:].fill_(1)
    return scale


def weight_to_matrix(weight: Tensor) -> Tensor:
    """Lays out a weight (Cout, Cin, kh, kw) as the matrix (Cout*kh, Cin*kw) of Sec. 3.1."""
    return weight.transpose(1, 2).flatten(2).flatten(0, 1)


def matrix_to_weight(matrix: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Inverse of :func:`weight_to_matrix`: (Cout*kh, Cin*kw) to (Cout, Cin, kh, kw)."""
    kh, kw = kernel_size
    return matrix.view(matrix.shape[0] // kh, kh, matrix.shape[1] // kw, kw).transpose(1, 2).contiguous()


def drop_unpaired(lines: Tensor, columns: int) -> Tensor:
    """Takes from half spectra of rows (..., C//2+1), in place, what a real row can't have.

    It is the imaginary parts of the columns that are their own mirror image: group borders cut pairs of equal radius
    there. CPUs drop them; cuFFT and rocFFT take some of them into the result, depending on the size.
    """
    parts = torch.view_as_real(lines)
    parts[..., 0, 1].zero_()
    if columns % 2 == 0:
        parts[..., -1, 1].zero_()
    return lines


def lines_to_rows(lines: Tensor, columns: int) -> Tensor:
    """Orthonormal inverse transform of half spectra (..., C//2+1), which may be used up, to real rows (..., C)."""
    return torch.fft.irfft(drop_unpaired(lines, columns), n=columns, dim=-1, norm="ortho")


def as_complex(parts: Tensor) -> Tensor:
    """Complex numbers of real and imaginary parts (..., 2): a view where memory allows it.

    A parameter or its gradient may be a piece of a flat vector, at an odd place (FSDP, DDP's buckets).
    """
    *others, last = parts.stride()
    if last != 1 or any(stride % 2 for stride in (parts.storage_offset(), *others)):
        parts = parts.clone(memory_format=torch.contiguous_format)
    return torch.view_as_complex(parts)


def to_spectrum(matrix: Tensor) -> Tensor:
    """Half spectrum of a weight matrix, scaled so that its norm is that of the matrix (Parseval).

    Args:
        matrix: Real tensor (R, C). Half precision is transformed in float32.

    Returns:
        Tensor (R, C//2+1, 2) of real and imaginary parts, dtype of `matrix`.
    """
    exact = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    scale = column_scale(matrix.shape[1], exact.device, exact.dtype)
    spectrum = torch.view_as_real(torch.fft.rfft2(exact, norm="ortho").mul_(scale))
    return spectrum.to(matrix.dtype)


def from_spectrum(spectrum: Tensor, columns: int) -> Tensor:
    """Inverse of :func:`to_spectrum`: (R, C//2+1, 2) to the weight matrix (R, C)."""
    exact = spectrum.to(torch.promote_types(spectrum.dtype, torch.float32))
    half = as_complex(exact) / column_scale(columns, exact.device, exact.dtype)
    return lines_to_rows(torch.fft.ifft(half, dim=0, norm="ortho"), columns).to(spectrum.dtype)


def _number_distinct(first: Tensor, second: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Distinct pairs of numbers below `count`, each int32 (R, C), in order, and which of them each pair is.

    Returns:
        int64 (P,), count times the first number plus the second; int32 (R, C).
    """
    if count**2 > 4 * first.numel():
        distinct, index = torch.unique(torch.add(second.long(), first, alpha=count), return_inverse=True)
        return distinct, index.int()
    # So few are possible that counting them takes less time than sorting, and that 32 bits are enough.
    pairs = torch.add(second, first, alpha=count).flatten()
    is_there = torch.bincount(pairs, minlength=count**2) > 0
    numbers = is_there.cumsum(0, dtype=torch.int32) - 1
    return is_there.nonzero().squeeze(1), numbers.index_select(0, pairs).view(first.shape)


def make_gain_map(bands: Tensor, num_bands: int, columns: int) -> GainMap:
    """Map from the groups of all coefficients, int32 (R, C//2+1), of a matrix of `columns` columns.

    The distinct pairs of neighbours are numbered, then the distinct pairs of those, and again. The last coefficient
    of a row is repeated to fill its tile.
    """
    index = bands.clone()
    index[:, 1 : (columns + 1) // 2] += num_bands
    missing = -index.shape[1] % 2**TILE_LEVELS
    index = torch.cat([index, index[:, -1:].expand(-1, missing)], dim=1)
    tiles = torch.arange(2 * num_bands, device=index.device)[:, None]
    for _ in range(TILE_LEVELS):
        pairs, index = _number_distinct(index[:, ::2], index[:, 1::2], len(tiles))
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
