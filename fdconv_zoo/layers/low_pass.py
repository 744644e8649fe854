"""Low-pass filters of FBM, and what each is multiplied by for the bands between them.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)

A box in frequency is separable: low(x) = U U^T x V V^T with U, V the real Fourier basis of the kept frequencies. Small
matrix products and no FFT, in any size; the bases of lower cutoffs are the first columns. The masks of the official
code, stretched from a grid, are applied to the Fourier transform.
"""

import math
from fractions import Fraction

import torch
from torch import Tensor

# Cutoffs are fractions, so that what they keep is counted in integers.
MAX_DENOMINATOR = 1 << 30


def num_kept(size: int, numerator: int, denominator: int) -> int:
    """Cosines and sines with |f| < numerator/denominator on an axis of `size` pixels, in integers only.

    The sine of frequency 0 is one of them, though it is zero: no axis then has size 1, which exporters take for fixed.
    """
    return 2 * ((numerator * size + denominator - 1) // denominator)


def fourier_basis(size: int, count: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """First `count` real Fourier basis functions: cos 0 (constant), sin 0 (zero), cos 1, sin 1, cos 2, sin 2, ...

    Args:
        size: Pixels of the axis.
        count: Even number of functions; those above the Nyquist frequency are aliases.
        device: Device of the result.
        dtype: Dtype of the result.

    Returns:
        Columns (size, count), orthonormal up to the Nyquist frequency but for the second, which is zero.
    """
    column = torch.arange(count, device=device)
    # Angles in quarters of 1/size turn, a sine a quarter turn behind: whole turns are dropped in integers, exactly.
    quarters = 4 * torch.arange(size, device=device)[:, None] * (column // 2) - size * (column % 2)
    # A vector of one number: of none, torch.onnx makes a node that ONNX does not allow.
    angle = torch.remainder(quarters, torch.full([1], 4 * size, device=device)).to(dtype) * (math.pi / (2 * size))
    return torch.cos(angle) * ((2 - (column == 0).to(dtype)) / size).sqrt()


def low_pass(x: Tensor, cutoff: float) -> Tensor:
    """Keeps the frequencies of maps (..., H, W) with max(|fu|, |fv|) < cutoff cycles per pixel."""
    fraction = Fraction(cutoff).limit_denominator(MAX_DENOMINATOR)
    bases = [
        fourier_basis(n, num_kept(n, fraction.numerator, fraction.denominator), x.device, x.dtype) for n in x.shape[-2:]
    ]
    return bases[0] @ (bases[0].mT @ x @ bases[1]) @ bases[1].mT


def map_bases(x: Tensor, cutoff: tuple[int, int], share: bool) -> tuple[Tensor, Tensor]:
    """Fourier bases of the rows and of the columns of maps (B, C, H, W), for the widest cutoff.

    Args:
        x: The maps.
        cutoff: Numerator and denominator.
        share: Make one basis for both where the map is square: a condition on the size, to an exporter.
    """
    height, width = x.shape[2], x.shape[3]
    # One pair more than the widest cutoff keeps: exporters would take a slice of all for a fixed size.
    rows = fourier_basis(height, num_kept(height, cutoff[0], cutoff[1]) + 2, x.device, x.dtype)
    if share and height == width:
        return rows, rows
    return rows, fourier_basis(width, num_kept(width, cutoff[0], cutoff[1]) + 2, x.device, x.dtype)


def box_low_passes(x: Tensor, cutoffs: list[tuple[int, int]], share: bool) -> list[Tensor]:
    """Low-pass filtered copies of x (B, C, H, W), one for each cutoff (numerator, denominator), widest first.

    `share` is that of :func:`map_bases`.
    """
    batch, channels, height, width = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    rows, columns = map_bases(x, cutoffs[0], share)
    # Batched products of 3-D tensors: torch.matmul would copy the basis for every channel.
    maps = x.reshape(batch * channels, height, width)
    analysis = torch.matmul(torch.matmul(maps, columns).transpose(1, 2), rows)
    outputs: list[Tensor] = []
    for numerator, denominator in cutoffs:
        h, w = num_kept(height, numerator, denominator), num_kept(width, numerator, denominator)
        half = torch.matmul(analysis[:, :w, :h], rows[:, :h].t())
        # The columns last: the maps then lie in memory as the input does.
        low = torch.matmul(half.transpose(1, 2), columns[:, :w].t())
        outputs.append(low.view(batch, channels, height, width))
    return outputs


def grid_sides(x: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int) -> list[tuple[Tensor, Tensor]]:
    """Official masks for maps (B, C, H, W), those of a square grid, rounded in float32, stretched: rows (H,), columns
    (W//2+1,) of what each cutoff keeps, which are boxes too."""
    height, half_width = x.shape[2], x.shape[3] // 2 + 1
    # Nearest-neighbour indices with the float32 rounding of F.interpolate.
    u = (torch.arange(height, device=x.device, dtype=torch.float32) * (mask_grid / height)).floor()
    v = (torch.arange(half_width, device=x.device, dtype=torch.float32) * ((mask_grid // 2 + 1) / half_width)).floor()
    vertical = torch.where(u < (mask_grid + 1) // 2, u, mask_grid - u) / mask_grid
    horizontal = v / mask_grid
    sides: list[tuple[Tensor, Tensor]] = []
    for numerator, denominator in cutoffs:
        limit = torch.full((1,), numerator / denominator + 1e-8, dtype=torch.float32, device=x.device)
        sides.append((vertical < limit, horizontal < limit))
    return sides


def grid_masks(x: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int) -> list[Tensor]:
    """Official masks (H, W//2+1) for maps (B, C, H, W)."""
    return [rows[:, None] & columns[None, :] for rows, columns in grid_sides(x, cutoffs, mask_grid)]


def grid_low_passes(x: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int) -> list[Tensor]:
    """As :func:`box_low_passes`, with the official masks."""
    masks = grid_masks(x, cutoffs, mask_grid)
    spectrum, size = torch.fft.rfft2(x), [x.shape[2], x.shape[3]]
    return [torch.fft.irfft2(spectrum * mask, s=size) for mask in masks]


def low_passes(x: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None) -> list[Tensor]:
    """Low-pass filtered copies of x (B, C, H, W), with the paper's masks or those of an official `mask_grid`."""
    return box_low_passes(x, cutoffs, True) if mask_grid is None else grid_low_passes(x, cutoffs, mask_grid)


def sum_low_passes(x: Tensor, factors: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None) -> Tensor:
    """Sum of the low-passes of x (B, C, H, W) times the factor (B, n, H, W) of each: the adjoint of :func:`low_passes`.

    Low-passes are symmetric, so they come after the factors here, and are joined before the way back from frequencies.
    """
    height, width = x.shape[2:]
    products = (x * factor for factor in factors.split(1, dim=1))
    if mask_grid is not None:
        masks = grid_masks(x, cutoffs, mask_grid)
        parts = (torch.fft.rfft2(product) * mask for product, mask in zip(products, masks, strict=True))
        return torch.fft.irfft2(sum(parts), s=(height, width)).contiguous()
    rows, columns = map_bases(x, cutoffs[0], True)
    kept = [(num_kept(height, *cutoff), num_kept(width, *cutoff)) for cutoff in cutoffs]
    total = x.new_zeros(len(x) * x.shape[1], kept[0][1], kept[0][0])
    for product, (h, w) in zip(products, kept, strict=True):
        maps = product.reshape(-1, height, width)
        total[:, :w, :h] += torch.matmul(torch.matmul(maps, columns[:, :w]).mT, rows[:, :h])
    half = torch.matmul(total, rows[:, : kept[0][0]].t())
    return torch.matmul(half.mT, columns[:, : kept[0][1]].t()).view_as(x)


def low_pass_matrices(x: Tensor, cutoffs: list[tuple[int, int]]) -> Tensor:
    """The low-passes of maps (B, C, H, W) as matrices (n, HW, HW), which are symmetric."""
    height, width = x.shape[2:]
    rows, columns = map_bases(x, cutoffs[0], True)
    sides = []
    for basis, size in ((rows, height), (columns, width)):
        kept = (basis[:, : num_kept(size, *cutoff)] for cutoff in cutoffs)
        sides.append(torch.stack([functions @ functions.t() for functions in kept]))
    products = sides[0].view(-1, height, 1, height, 1) * sides[1].view(-1, 1, width, 1, width)
    return products.view(-1, height * width, height * width)


def band_factors(gates: Tensor) -> Tensor:
    """Factors of the map and of its low-passes (B, n+1, H, W): A_1, A_2 - A_1, ..., 1 - A_n.

    Their sum is that over the bands, A_1 (x - low_1) + A_2 (low_1 - low_2) + ... + low_n (Eq. 9), with one product for
    each low-pass instead of two.
    """
    ones = torch.ones_like(gates[:, :1])
    return torch.cat([gates, ones], dim=1) - torch.cat([torch.zeros_like(ones), gates], dim=1)


def band_matrix(factors: Tensor, lows: Tensor) -> Tensor:
    """Matrix (B, HW, HW) that gates the bands of a map: the sum of the low-passes (n, HW, HW) times their factors."""
    first, *others = factors.flatten(2).unsqueeze(2).unbind(1)
    matrix = others[0] * lows[0]
    for factor, low in zip(others[1:], lows[1:], strict=True):
        matrix.addcmul_(factor, low)
    matrix.diagonal(dim1=1, dim2=2).add_(first.squeeze(1))
    return matrix
