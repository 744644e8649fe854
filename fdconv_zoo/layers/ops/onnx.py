"""What ONNX needs in place of torch.fft: weights by matrix products, low-passes by two-sided transforms.

ONNX Runtime's DFT loses digits where a size is no power of two (relative error 3e-4 at 3072 x 768, against 5e-7 here)
and is slow there. These products use the factors of the size (Cooley and Tukey 1965), and real numbers only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _waves(rows: Tensor, columns: Tensor, period: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2*pi*row*column/period, rounded once."""
    # Whole turns are dropped in integers, where they cost no precision.
    angle = (rows[:, None] * columns % period).to(torch.float64) * (2 * math.pi / period)
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
    long, used = size // short, -(-count // short)
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
def whole_low_passes(x: Tensor, masks: list[Tensor]) -> list[Tensor]:
    """Low-passes of x (B, C, H, W) by half masks (H, W//2+1) without torch.fft.irfft2, for ONNX.

    ONNX infers a wrong shape for the one-sided inverse DFT, for which ONNX Runtime then may reserve too little memory.
    """
    height, width = x.shape[2], x.shape[3]
    row, column = torch.arange(height, device=x.device)[:, None], torch.arange(width, device=x.device)
    # The right half is the mirror image of the left one, at negative frequencies in both directions.
    is_left = column <= width // 2
    place = torch.where(is_left, row, (height - row) * (row > 0)) * (width // 2 + 1)
    place = place + torch.where(is_left, column, width - column)
    spectrum = torch.fft.fftn(x, dim=(2, 3))
    products = (spectrum * mask.flatten()[place] for mask in masks)
    return [torch.view_as_real(torch.fft.ifftn(product, dim=(2, 3)))[..., 0] for product in products]
