"""The half spectra of frequency groups on a GPU: coefficients are put into them, and their gradients taken from there.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.1)

One launch each, in place of some twenty operations on the gain map, the coefficients and the groups. The transforms
between are cuFFT's.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...fourier import GainMap
from ..bank import group_chunks, matrix_shape, transform_back
from .launch import blocks_of, kernel

# Coefficients of a program.
BLOCK = 256


@triton.jit
def group_of(gain_index, gain_tiles, row, column, tiles_of_row, num_bands, inside, TILE: tl.constexpr):
    """Group of each coefficient."""
    tile = tl.load(gain_index + row * tiles_of_row + column // TILE, mask=inside, other=0)
    return tl.load(gain_tiles + tile * TILE + column % TILE, mask=inside, other=0) % num_bands


@triton.jit
def spread_kernel(
    out, coefficients, gain_index, gain_tiles, num_rows, num_columns, columns, tiles_of_row, num_bands, first, stop,
    edge_scale, inner_scale, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of coefficients in the half spectra of groups `first` to `stop`, zeros elsewhere."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = num_rows * num_columns
    inside = places < count
    row, column = places // num_columns, places % num_columns
    # A column that is its own mirror image is made that of a real matrix: the mean with its mirror image, whose
    # coefficient may be another group's.
    is_edge = (column == 0) | (2 * column == columns)
    mirror_row = (num_rows - row) % num_rows
    own = group_of(gain_index, gain_tiles, row, column, tiles_of_row, num_bands, inside, TILE)
    other = group_of(gain_index, gain_tiles, mirror_row, column, tiles_of_row, num_bands, inside & is_edge, TILE)
    other = tl.where(is_edge, other, -1)
    part = tl.arange(0, 2)[None, :]
    value = tl.load(coefficients + 2 * places[:, None] + part, mask=inside[:, None], other=0.0).to(tl.float32)
    value *= tl.where(is_edge, 0.5 * edge_scale, inner_scale)[:, None]
    mirrored = tl.load(
        coefficients + 2 * (mirror_row * num_columns + column)[:, None] + part, mask=(inside & is_edge)[:, None],
        other=0.0,
    ).to(tl.float32)  # fmt: skip
    mirrored *= tl.where(part == 0, 0.5 * edge_scale, -0.5 * edge_scale)
    for number in range(first, stop):
        total = tl.where((own == number)[:, None], value, 0.0) + tl.where((other == number)[:, None], mirrored, 0.0)
        target = out + (number - first).to(tl.int64) * (2 * count)
        tl.store(target + 2 * places[:, None] + part, total, mask=inside[:, None])


@triton.jit
def collect_kernel(
    out, spectra, gain_index, gain_tiles, num_rows, num_columns, columns, tiles_of_row, num_bands, first, stop,
    edge_scale, inner_scale, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a block of coefficients, those of groups `first` to `stop`, from their group's half spectrum."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = num_rows * num_columns
    row, column = places // num_columns, places % num_columns
    own = group_of(gain_index, gain_tiles, row, column, tiles_of_row, num_bands, places < count, TILE)
    inside = ((places < count) & (own >= first) & (own < stop))[:, None]
    part = tl.arange(0, 2)[None, :]
    source = spectra + (own - first).to(tl.int64)[:, None] * (2 * count)
    value = tl.load(source + 2 * places[:, None] + part, mask=inside, other=0.0)
    is_edge = (column == 0) | (2 * column == columns)
    value *= tl.where(is_edge, edge_scale, inner_scale)[:, None]
    tl.store(out + 2 * places[:, None] + part, value, mask=inside)


def arguments(
    gain_index: Tensor, gain_tiles: Tensor, num_bands: int, num_columns: int, columns: int
) -> dict[str, Tensor | int]:
    """What both kernels take of a gain map and of the columns, C//2+1 of a half spectrum and C of its matrix."""
    return {
        "gain_index": gain_index.contiguous(), "gain_tiles": gain_tiles.contiguous(), "num_rows": len(gain_index),
        "num_columns": num_columns, "columns": columns, "tiles_of_row": gain_index.shape[1], "num_bands": num_bands,
        "TILE": gain_tiles.shape[1], "BLOCK": BLOCK,
    }  # fmt: skip


def spread_fake(
    coefficients: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, first: int, stop: int
) -> Tensor:
    """Empty tensor in the shape of the result of :func:`spread_groups`."""
    return coefficients.new_empty(stop - first, *coefficients.shape, dtype=torch.float32)


@kernel(
    "(Tensor coefficients, Tensor gain_index, Tensor gain_tiles, int num_bands, int columns, int first, int stop) "
    "-> Tensor",
    spread_fake,
)
def spread_groups(
    coefficients: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, first: int, stop: int
) -> Tensor:
    """Half spectra of groups, as the unscaled transform to their matrices takes them.

    Args:
        coefficients: Spectrum (R, C//2+1, 2).
        gain_index: Of the gain map.
        gain_tiles: Of the gain map.
        num_bands: Groups n.
        columns: Columns C of the weight matrix.
        first: First group.
        stop: The one after the last.

    Returns:
        Real and imaginary parts (stop - first, R, C//2+1, 2) in float32.
    """
    out = spread_fake(coefficients, gain_index, gain_tiles, num_bands, columns, first=first, stop=stop)
    rows, count, _ = coefficients.shape
    edge = 1 / math.sqrt(rows * columns)
    spread_kernel[(blocks_of(rows * count, BLOCK),)](
        out, coefficients.contiguous(), first=first, stop=stop, edge_scale=edge, inner_scale=edge / math.sqrt(2),
        **arguments(gain_index, gain_tiles, num_bands, count, columns),
    )  # fmt: skip
    return out


@kernel(
    "(Tensor spectra, Tensor gain_index, Tensor gain_tiles, int num_bands, int columns, int first, Tensor(a!) out) "
    "-> ()",
    lambda *unused: None,
)
def collect_groups(
    spectra: Tensor, gain_index: Tensor, gain_tiles: Tensor, num_bands: int, columns: int, first: int, out: Tensor
) -> None:
    """Writes the gradient of groups' coefficients, given the unscaled transforms of that of their weights.

    Args:
        spectra: Transforms (m, R, C//2+1, 2) of groups `first` and following.
        gain_index: Of the gain map.
        gain_tiles: Of the gain map.
        num_bands: Groups n.
        columns: Columns C of the weight matrix.
        first: First group.
        out: Gradient (R, C//2+1, 2) of the coefficients in float32; those of other groups are left as they are.
    """
    rows, count, _ = out.shape
    edge = 1 / math.sqrt(rows * columns)
    collect_kernel[(blocks_of(rows * count, BLOCK),)](
        out, spectra.contiguous(), first=first, stop=first + len(spectra), edge_scale=edge,
        inner_scale=edge * math.sqrt(2), **arguments(gain_index, gain_tiles, num_bands, count, columns),
    )  # fmt: skip


def group_spectra(
    coefficients: Tensor, gain_map: GainMap, num_bands: int, columns: int
) -> Iterator[tuple[slice, Tensor]]:
    """Groups and their half spectra, as :func:`fdconv_zoo.layers.ops.bank.transform` takes them."""
    for groups in group_chunks(num_bands, len(coefficients) * columns):
        parts = spread_groups(coefficients, *gain_map, num_bands, columns, groups.start, groups.stop)
        yield groups, torch.view_as_complex(parts)


def bank_adjoint(grad: Tensor, gain_map: GainMap, kernel_size: tuple[int, int]) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.bank.bank_adjoint`."""
    rows, columns = matrix_shape(grad, kernel_size)
    out = grad.new_empty(rows, columns // 2 + 1, 2, dtype=torch.float32)
    for groups, spectra in transform_back(grad, kernel_size):
        collect_groups(torch.view_as_real(spectra), *gain_map, len(grad), columns, groups.start, out)
    return out
