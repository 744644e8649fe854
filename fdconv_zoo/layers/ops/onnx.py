"""What ONNX needs in place of torch.fft: matrix products.

ONNX Runtime's DFT loses digits where a size is no power of two (relative error 3e-4 at 3072 x 768, against 5e-7 here)
and is slow there. These products use the factors of the size (Cooley and Tukey 1965), and real numbers only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _waves(rows: Tensor, columns: Tensor, period: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2*pi*row*column/period, rounded once."""
    # Whole turns are dropped in integers, where they cost no precision. By a tensor: `%` takes no free size.
    turns = torch.remainder(rows[:, None] * columns, torch.full([], period, device=rows.device))
    angle = turns.to(torch.float64) * (2 * math.pi / period)
    return torch.cos(angle).to(like), torch.sin(angle).to(like)


def inverse_dft(real: Tensor, imaginary: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Inverse DFT along the second-to-last dimension, without a factor 1/size.

    Args:
        real: Real parts of the coefficients (..., K, M); those from K to `size` are zero.
        imaginary: Imaginary parts.
        size: Length of the transform.

    Returns:
        Real and imaginary parts (..., size, M).
    """
    count, others = real.shape[-2], real.shape[-1]
    short = max(n for n in range(1, math.isqrt(size) + 1) if size % n == 0)
    # Not -(-count // short): the tracing exporter divides integers towards zero.
    long, used = size // short, (count + short - 1) // short
    fine, coarse = torch.arange(short, device=real.device), torch.arange(long, device=real.device)
    outer_cos, outer_sin = _waves(coarse, torch.arange(used, device=real.device), long, real)
    twiddle_cos, twiddle_sin = _waves(coarse, fine, size, real)
    inner_cos, inner_sin = _waves(fine, fine, short, real)

    # Coefficient k = short*k2 + k1 and sample n = long*n1 + n2: a transform over k2, turns by k1*n2, another over k1.
    batch = list(real.shape[:-2])
    padding = [0, 0, 0, used * short - count]
    real = F.pad(real, padding).reshape(batch + [used, short * others])
    imaginary = F.pad(imaginary, padding).reshape(batch + [used, short * others])
    real, imaginary = outer_cos @ real - outer_sin @ imaginary, outer_sin @ real + outer_cos @ imaginary
    real, imaginary = (part.reshape(batch + [long, short, others]) for part in (real, imaginary))
    turn_cos, turn_sin = twiddle_cos[..., None], twiddle_sin[..., None]
    real, imaginary = real * turn_cos - imaginary * turn_sin, real * turn_sin + imaginary * turn_cos
    real, imaginary = (part.transpose(-3, -2).reshape(batch + [short, long * others]) for part in (real, imaginary))
    real, imaginary = inner_cos @ real - inner_sin @ imaginary, inner_sin @ real + inner_cos @ imaginary
    return real.reshape(batch + [size, others]), imaginary.reshape(batch + [size, others])


@torch.jit.unused  # scripts never come here
def inverse_rfft2(spectrum: Tensor, columns: int) -> Tensor:
    """`torch.fft.irfft2(..., norm="ortho")` of half spectra.

    Args:
        spectrum: Real and imaginary parts (B, R, C//2+1, 2).
        columns: C.

    Returns:
        Real matrices (B, R, C).
    """
    rows = spectrum.shape[1]
    # Every column but those which are their own mirror image stands for two.
    mirror = torch.arange(columns // 2 + 1, device=spectrum.device) * 2 % columns == 0
    weight = (2 - mirror.to(spectrum.dtype)) / math.sqrt(rows * columns)
    real, imaginary = inverse_dft(spectrum[..., 0] * weight, spectrum[..., 1] * weight, rows)
    real, _ = inverse_dft(real.transpose(1, 2), imaginary.transpose(1, 2), columns)
    return real.transpose(1, 2).contiguous()


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
