"""Frequency Band Modulation (FBM): each frequency band of the input gets a gate of its own at every place.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)

What differs from the official code:
- The band masks are those of the paper at any map size. The official ones are made once on a 64x64 grid, lose 1/4 to
  rounding and are stretched to the map; `mask_grid=64` asks for exactly that.
- A band limit is a box in frequency, so it is separable: low(x) = U U^T x V V^T with U, V the real Fourier basis of the
  kept frequencies. Small matrix products and no FFT, in any size; the bases of lower cutoffs are the first columns.
- One 3x3 convolution makes the gates of all bands.
"""

import math
from fractions import Fraction
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .functional import is_exporting

# Cutoffs are fractions, so that what they keep is counted in integers.
MAX_DENOMINATOR = 1 << 30
# Up to this many places a map's bands are gated by one matrix; low-passes of small maps are many tiny products.
MATRIX_PLACES = 256


def check_cutoffs(cutoffs: tuple[float, ...]) -> None:
    """Raises a ValueError unless the cutoffs fall from at most 0.5 to above 0 cycles per pixel."""
    descending = all(a > b for a, b in pairwise(cutoffs))
    if not cutoffs or not descending or cutoffs[0] > 0.5 or cutoffs[-1] <= 0:
        raise ValueError(
            f"cutoffs={tuple(cutoffs)}, but they must fall strictly, within 0.5 >= cutoff > 0 cycles per pixel"
        )


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
    angle = torch.remainder(quarters, torch.full([], 4 * size, device=device)).to(dtype) * (math.pi / (2 * size))
    return torch.cos(angle) * ((2 - (column == 0).to(dtype)) / size).sqrt()


def low_pass(x: Tensor, cutoff: float) -> Tensor:
    """Keeps the frequencies of maps (..., H, W) with max(|fu|, |fv|) < cutoff cycles per pixel."""
    fraction = Fraction(cutoff).limit_denominator(MAX_DENOMINATOR)
    bases = [
        fourier_basis(n, num_kept(n, fraction.numerator, fraction.denominator), x.device, x.dtype) for n in x.shape[-2:]
    ]
    return bases[0] @ (bases[0].mT @ x @ bases[1]) @ bases[1].mT


def map_bases(x: Tensor, cutoff: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Fourier bases of the rows and of the columns of maps (B, C, H, W), for the widest cutoff."""
    height, width = x.shape[2], x.shape[3]
    # One pair more than the widest cutoff keeps: exporters would take a slice of all for a fixed size.
    rows = fourier_basis(height, num_kept(height, cutoff[0], cutoff[1]) + 2, x.device, x.dtype)
    # In this order: a comparison of sizes would be a condition on every exported program.
    if not torch.jit.is_tracing() and not is_exporting() and height == width:
        return rows, rows
    return rows, fourier_basis(width, num_kept(width, cutoff[0], cutoff[1]) + 2, x.device, x.dtype)


def low_passes(x: Tensor, cutoffs: list[tuple[int, int]]) -> list[Tensor]:
    """Low-pass filtered copies of x (B, C, H, W), one for each cutoff (numerator, denominator), widest first."""
    batch, channels, height, width = x.shape[0], x.shape[1], x.shape[2], x.shape[3]
    rows, columns = map_bases(x, cutoffs[0])
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


def grid_low_passes(x: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int) -> list[Tensor]:
    """As :func:`low_passes`, with the official masks: a square grid, rounded in float32, stretched to the map."""
    height, width = x.shape[2], x.shape[3]
    spectrum = torch.fft.rfft2(x)
    half_width = width // 2 + 1
    # Nearest-neighbour indices with the float32 rounding of F.interpolate.
    u = (torch.arange(height, device=x.device, dtype=torch.float32) * (mask_grid / height)).floor()
    v = (torch.arange(half_width, device=x.device, dtype=torch.float32) * ((mask_grid // 2 + 1) / half_width)).floor()
    vertical = torch.where(u < (mask_grid + 1) // 2, u, mask_grid - u) / mask_grid
    horizontal = v / mask_grid
    radius = torch.maximum(vertical[:, None], horizontal[None, :])
    outputs: list[Tensor] = []
    for numerator, denominator in cutoffs:
        limit = torch.full((), numerator / denominator + 1e-8, dtype=torch.float32, device=x.device)
        outputs.append(torch.fft.irfft2(spectrum * (radius < limit), s=[height, width]))
    return outputs


def gate_logits(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution of x (B, C, H, W) with few filters (n, C, 3, 3): one matrix product, then sums of shifted maps.

    A convolution kernel works on blocks of filters, most of which would be empty.

    Returns:
        Logits (B, n, H, W).
    """
    size = [x.shape[2], x.shape[3]]
    # fold is the adjoint of a convolution's patches, so the kernel is turned round.
    maps = torch.matmul(weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2), x.flatten(2))
    return F.fold(maps, size, [3, 3], padding=[1, 1]) + bias[:, None, None]


def gate_by_matrix(x: Tensor, gate: Tensor, steps: Tensor, cutoffs: list[tuple[int, int]]) -> Tensor:
    """Gates the bands of a small map by one matrix (HW, HW), the sum of the low-passes times their gates' steps.

    Args:
        x: Feature map (B, C, H, W).
        gate: Gate of the highest band (B, 1, H, W).
        steps: Gate of the next lower band less that of each band (B, n, H, W).
        cutoffs: As for :func:`low_passes`.
    """
    height, width = x.shape[2], x.shape[3]
    rows, columns = map_bases(x, cutoffs[0])
    matrix = torch.diag_embed(gate.flatten(1))
    for i, (numerator, denominator) in enumerate(cutoffs):
        h, w = num_kept(height, numerator, denominator), num_kept(width, numerator, denominator)
        low = torch.kron(rows[:, :h] @ rows[:, :h].t(), columns[:, :w] @ columns[:, :w].t())
        matrix = torch.addcmul(matrix, steps[:, i].flatten(1).unsqueeze(1), low)
    return torch.matmul(x.flatten(2), matrix).view_as(x)


def modulate_bands(
    x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None
) -> Tensor:
    """Gates the frequency bands of a feature map place by place (Eq. 8-10).

    Args:
        x: Feature map (B, C, H, W), any floating dtype; filtered in float32 at least.
        weight: Gate convolution (bands, C, 3, 3).
        bias: Its bias (bands,).
        cutoffs: Band limits as (numerator, denominator), widest first. The band below the last is left as it is.
        mask_grid: None, or the side of the official mask grid.

    Returns:
        Modulated map (B, C, H, W), dtype of `x`.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    weight, bias = weight.to(exact.dtype), bias.to(exact.dtype)
    if torch.jit.is_scripting() or torch.jit.is_tracing() or is_exporting():
        gates = 2 * torch.sigmoid(F.conv2d(exact, weight, bias, padding=1))
    else:
        gates = 2 * torch.sigmoid(gate_logits(exact, weight, bias))
    # sum_i A_i (low_{i-1} - low_i) + low_last, with one product for each low-pass instead of two.
    steps = torch.cat([gates[:, 1:], torch.ones_like(gates[:, :1])], dim=1) - gates
    if not (torch.jit.is_scripting() or torch.jit.is_tracing() or is_exporting()):
        if mask_grid is None and x.shape[2] * x.shape[3] <= MATRIX_PLACES:
            return gate_by_matrix(exact, gates[:, :1], steps, cutoffs).to(x.dtype)
    lows = low_passes(exact, cutoffs) if mask_grid is None else grid_low_passes(exact, cutoffs, mask_grid)
    modulated = gates[:, :1] * exact
    for i, low in enumerate(lows):
        modulated = torch.addcmul(modulated, steps[:, i : i + 1], low)
    return modulated.to(x.dtype)


class FBM(nn.Module):
    """Frequency Band Modulation.

    Args:
        channels: Channels C of the feature map.
        cutoffs: Band limits in cycles per pixel, falling.
        mask_grid: None for the paper's masks, 64 for those of checkpoints trained with the official code.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If the cutoffs do not fall strictly within (0, 0.5], or `mask_grid` is below 2.
    """

    def __init__(
        self,
        channels: int,
        cutoffs: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16),
        mask_grid: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_cutoffs(cutoffs)
        if mask_grid is not None and mask_grid < 2:
            raise ValueError(f"mask_grid={mask_grid}, but it must be None or at least 2")
        fractions = [Fraction(c).limit_denominator(MAX_DENOMINATOR) for c in cutoffs]
        self.cutoffs = [(f.numerator, f.denominator) for f in fractions]
        self.mask_grid = mask_grid
        self.weight = nn.Parameter(torch.empty(len(cutoffs), channels, 3, 3, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(len(cutoffs), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: every gate starts at exactly 1."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, recompute: bool = True) -> Tensor:
        """Modulates a feature map.

        Args:
            x: Feature map (B, C, H, W).
            recompute: Makes the filtered copies again in the backward pass; kept, they are several times the map.

        Returns:
            Map of the shape and dtype of `x`.
        """
        if torch.jit.is_scripting() or torch.jit.is_tracing() or torch.compiler.is_compiling():
            return modulate_bands(x, self.weight, self.bias, self.cutoffs, self.mask_grid)
        else:
            arguments = (x, self.weight, self.bias, self.cutoffs, self.mask_grid)
            if recompute and torch.is_grad_enabled():
                return checkpoint(modulate_bands, *arguments, use_reentrant=False, preserve_rng_state=False)
            return modulate_bands(*arguments)

    def extra_repr(self) -> str:
        limits = ", ".join(f"{n}/{d}" for n, d in self.cutoffs)
        return f"channels={self.weight.shape[1]}, cutoffs=({limits}), mask_grid={self.mask_grid}"
