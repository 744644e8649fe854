"""What ONNX needs in place of torch.fft: matrix products, of real numbers only.

ONNX Runtime's DFT loses digits where a size is no power of two (relative error 2e-4 at 1536 x 1536, against 5e-7 here)
and takes some thirty times as long. These products use the factors of a size (Cooley and Tukey 1965): along an axis of
N = N1*N2*... each number costs N1 + N2 + ... instead of N.
The turns between two factors are part of the matrices, and the order that factors want is that of constants: between
two products nothing is computed or moved.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fourier import gain_table
from .types import Spectrum

if TYPE_CHECKING:
    from numpy import ndarray

# What one product more costs beside its multiply-accumulates, in points of its size; measured on ONNX Runtime 1.32.
STAGE = 12
# From so many numbers on a matrix is transposed in blocks of so many rows; measured on OpenVINO 2026.4.
LARGE = 1 << 19
BLOCK = 16


class InverseDFT(NamedTuple):
    """An inverse DFT along one axis as a chain of products, without a factor 1/N.

    Attributes:
        order: Which of the K coefficients come in which order into the first product.
        matrices: Batches of matrices (L, rows, columns), float64. Columns are those of a batch's coefficients, real
            and imaginary part of each side by side. Rows are first real and then imaginary parts, or real parts alone.
    """

    order: "ndarray"
    matrices: "list[ndarray]"


def factors(size: int) -> list[int]:
    """The factors of a size, rising, that cost least: a product for each."""

    def cost(parts: list[int]) -> int:
        return sum(parts) + STAGE * len(parts)

    divisors = (n for n in range(2, math.isqrt(size) + 1) if size % n == 0)
    splits = [sorted([n, *factors(size // n)]) for n in divisors]
    return min([[size], *splits], key=cost)


def inverse_dft(radices: list[int], half: bool) -> InverseDFT:
    """Inverse DFT of N points, N being the product of `radices`.

    With N = radix * inner, coefficient k = inner*t + w and sample n = radix*m + j, a factor turns the coefficients
    of each w into a coefficient w of a shorter transform for each j: sum over t of X[k] * exp(2 pi i j k / N). It is
    over m that the shorter one runs.

    Args:
        radices: In the order of the products.
        half: Coefficients 0 to N//2 of a real signal are given, and its N samples made. Otherwise all, and complex
            samples.
    """
    import numpy as np  # onnx and the exporters need it too

    def waves(samples: "ndarray", coefficients: "ndarray", size: int) -> "ndarray":
        """exp(2 pi i n k / size) (..., n, k). Whole turns are dropped in integers, exactly."""
        return np.exp(2j * np.pi / size * (samples[:, None] * coefficients[..., None, :] % size))

    inner = radices[-1]
    kept = np.arange(inner // 2 + 1 if half else inner)
    wave = waves(np.arange(inner), kept, inner)
    if half:
        # Every coefficient but those which are their own mirror image stands for two, and the real part is wanted.
        wave = wave * np.where(kept * 2 % inner == 0, 1, 2)
        matrices = [np.stack([wave.real, -wave.imag], axis=-1).reshape(1, inner, -1)]
    else:
        matrices = [_real_products(wave, np.ones(inner)).reshape(1, 2 * inner, 2 * inner)]
    for radix in reversed(radices[:-1]):
        size = radix * inner
        coefficients = kept[:, None] + inner * np.arange(radix)
        # A coefficient of the upper half is the conjugate of its mirror image.
        mirrored = half & (coefficients > size // 2)
        wave = waves(np.arange(radix), coefficients, size)
        signs = np.where(mirrored, -1, 1)[:, None]
        matrices.insert(0, _real_products(wave, signs).reshape(len(kept), 2 * radix, 2 * radix))
        kept, inner = np.where(mirrored, size - coefficients, coefficients).flatten(), size
    return InverseDFT(kept, matrices)


def _real_products(wave: "ndarray", signs: "ndarray") -> "ndarray":
    """Complex matrices (..., n, k), of which `signs` says whose coefficient is conjugated, as real ones
    (..., 2, n, k, 2)."""
    import numpy as np

    real = np.stack([wave.real, -wave.imag * signs], axis=-1)
    imaginary = np.stack([wave.imag, wave.real * signs], axis=-1)
    return np.stack([real, imaginary], axis=-4)


def chain(x: Tensor, matrices: "list[ndarray]", others: int) -> Tensor:
    """Applies a chain of products to ordered coefficients (B, ..., M) with M `others`, real beside imaginary parts.

    Returns:
        Samples (B, N or 2N, M).
    """
    count, dtype = math.prod(int(n) for n in x.shape[1:]), str(x.dtype).removeprefix("torch.")
    for matrix in matrices:
        batches, rows, columns = matrix.shape
        x = x.reshape(-1, batches, columns, count // (batches * columns))
        x = torch.matmul(torch.from_numpy(matrix.astype(dtype)).to(x.device), x)
        count = count // columns * rows
    return x.reshape(-1, count // others, others)


def turned(x: Tensor, rows: int, columns: int) -> Tensor:
    """Transposes matrices (B, rows, columns).

    OpenVINO gives a large one in blocks of rows to another of its kernels, which mostly takes about half the time. ONNX
    Runtime takes as long either way.
    """
    if rows * columns < LARGE:
        return x.transpose(1, 2)
    block = math.gcd(rows, BLOCK)
    return x.reshape(-1, rows // block, block, columns).permute(0, 3, 1, 2).reshape(-1, columns, rows)


@torch.jit.unused  # scripts never come here
def weight_matrices(spectrum: Spectrum, gains: Tensor, columns: int) -> Tensor:
    """:func:`.traced.weight_matrices` for an exporter to ONNX."""
    return turned(transposed_weights(spectrum, gains, columns), columns, int(spectrum.coefficients.shape[0]))


@torch.jit.unused
def transposed_weights(spectrum: Spectrum, gains: Tensor, columns: int) -> Tensor:
    """Weight matrices as the transform leaves them, (B, C, R).

    What does not depend on the gains is computed from the parameters alone: a runtime does it once, when it loads.
    """
    index, tiles = spectrum.gain_map.index, spectrum.gain_map.tiles
    # Numbers, which the tracing exporter's sizes are not.
    rows, columns, count = int(index.shape[0]), int(columns), int(spectrum.coefficients.shape[1])
    width = int(index.shape[1] * tiles.shape[1])
    vertical, horizontal = inverse_dft(factors(rows)[::-1], False), inverse_dft(factors(columns), True)
    horizontal.matrices[-1] /= math.sqrt(rows * columns)
    order = torch.tensor(vertical.order, device=gains.device)

    table = gain_table(gains, math.sqrt(0.5))
    by_tile = table.index_select(1, tiles.flatten()).reshape(-1, int(tiles.shape[0]), int(tiles.shape[1]))
    # A whole number of tiles in each row: coefficients that are not there are zero, and are not taken below.
    factor = by_tile.index_select(1, index.index_select(0, order).flatten()).reshape(-1, rows, 1, width)
    parts = spectrum.coefficients.to(gains.dtype).index_select(0, order).transpose(1, 2)
    half = F.pad(parts, [0, width - count]) * factor
    lines = chain(half, vertical.matrices, width)
    lines = turned(lines, 2 * rows, width).index_select(1, torch.tensor(horizontal.order, device=gains.device))
    return chain(lines, horizontal.matrices, rows)


def _waves(rows: Tensor, columns: Tensor, period: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2*pi*row*column/period, rounded once."""
    # Whole turns are dropped in integers, where they cost no precision. By a tensor: `%` takes no free size.
    turns = torch.remainder(rows.unsqueeze(1) * columns, torch.full([1], period, device=rows.device))
    angle = turns.to(torch.float64) * (2 * math.pi / period)
    return torch.cos(angle).to(like), torch.sin(angle).to(like)


@torch.jit.unused
def weighted_low_passes(x: Tensor, factors: Tensor, cutoffs: list[tuple[int, int]]) -> Tensor:
    """Sum of the low-passes of maps by boxes, each times its factor, with no size but those of the map.

    Sizes derived from free ones cost an exporter most of its time. A low-pass is a circulant matrix for each axis.

    Args:
        x: Maps (B, C, H, W).
        factors: Of the maps themselves, which are not in the sum, and of the n low-passes (B, n+1, H, W).
        cutoffs: Limits as (numerator, denominator).
    """
    vertical, horizontal = (_low_pass_matrices(size, cutoffs, x) for size in (x.shape[2], x.shape[3]))
    lows = torch.matmul(torch.matmul(vertical, x.unsqueeze(2)), horizontal)
    return (lows * factors.narrow(1, 1, len(cutoffs)).unsqueeze(1)).sum(2)


def _low_pass_matrices(size: int, cutoffs: list[tuple[int, int]], like: Tensor) -> Tensor:
    """Symmetric matrices (n, size, size) that keep the frequencies |k/size| below each cutoff."""
    numerators, denominators = torch.tensor(cutoffs, device=like.device).unbind(1)
    points = torch.arange(size, device=like.device)
    whole = torch.full([1], size, device=like.device)
    frequencies = torch.minimum(points, whole - points).unsqueeze(1)
    kept = (frequencies * denominators < whole * numerators).to(torch.float64) / whole
    response = (_waves(points, points, size, kept)[0] @ kept).to(like.dtype)
    distances = torch.remainder(points.unsqueeze(1) - points, whole)
    return response.index_select(0, distances.flatten()).reshape(size, size, -1).permute(2, 0, 1)


@torch.jit.unused
def box_products(x: Tensor, sides: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Low-passes of x (B, C, H, W) by half masks that are boxes, without torch.fft.

    The tracing exporter has no transforms; the other's one-sided inverse has a wrong shape inferred, for which ONNX
    Runtime may reserve too little memory.

    Args:
        x: The maps.
        sides: Rows (H,) and columns (W//2+1,) that each low-pass keeps. Stretched masks may keep a row and not its
            mirror image: the products then have an imaginary part, of which the real part of the whole is left.
    """
    height, width = x.shape[2], x.shape[3]
    row, column = torch.arange(height, device=x.device), torch.arange(width // 2 + 1, device=x.device)
    # Every column but those which are their own mirror image stands for two.
    mirror = (column == 0) | (column * 2 == width)
    weight = (2 - mirror.to(x.dtype)) / width
    vertical = _waves(row, row, height, x)
    horizontal = _waves(torch.arange(width, device=x.device), column, width, x)
    outputs = []
    for rows, columns in sides:
        left = _circulant(vertical, rows.to(x.dtype) / height)
        right = _circulant(horizontal, columns.to(x.dtype) * weight)
        outputs.append(left[0] @ x @ right[0].t() - left[1] @ x @ right[1].t())
    return outputs


def _circulant(waves: tuple[Tensor, Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the matrix that weights frequencies, exp(2 pi i k (n-m)/N) summed over k."""
    cosine, sine = waves
    real = cosine * weight @ cosine.t() + sine * weight @ sine.t()
    return real, sine * weight @ cosine.t() - cosine * weight @ sine.t()
