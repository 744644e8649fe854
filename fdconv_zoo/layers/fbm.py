"""Frequency Band Modulation (FBM): each frequency band of the input gets a gate of its own at every place.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)

What differs from the official code:
- The band masks are those of the paper at any map size. The official ones are made once on a 64x64 grid, lose 1/4 to
  rounding and are stretched to the map; `mask_grid=64` asks for exactly that.
- A band limit is a box in frequency, so it is separable: small matrix products and no FFT (band_filters.py).
- One 3x3 convolution makes the gates of all bands.
"""

from fractions import Fraction
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .band_filters import MAX_DENOMINATOR, low_passes
from .eager_fbm import eager_modulate_bands
from .functional import is_exporting


def check_cutoffs(cutoffs: tuple[float, ...]) -> None:
    """Raises a ValueError unless the cutoffs fall from at most 0.5 to above 0 cycles per pixel."""
    descending = all(a > b for a, b in pairwise(cutoffs))
    if not cutoffs or not descending or cutoffs[0] > 0.5 or cutoffs[-1] <= 0:
        raise ValueError(
            f"cutoffs={tuple(cutoffs)}, but they must fall strictly, within 0.5 >= cutoff > 0 cycles per pixel"
        )


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
    gates = 2 * torch.sigmoid(F.conv2d(exact, weight, bias, padding=1))
    # sum_i A_i (low_{i-1} - low_i) + low_last, with one product for each low-pass instead of two.
    steps = torch.cat([gates[:, 1:], torch.ones_like(gates[:, :1])], dim=1) - gates
    modulated = gates[:, :1] * exact
    for i, low in enumerate(low_passes(exact, cutoffs, mask_grid)):
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

    def forward(self, x: Tensor) -> Tensor:
        """Modulates a feature map (B, C, H, W), whose shape and dtype the result has."""
        if torch.jit.is_scripting() or torch.jit.is_tracing() or is_exporting():
            return modulate_bands(x, self.weight, self.bias, self.cutoffs, self.mask_grid)
        else:
            return eager_modulate_bands(x, self.weight, self.bias, self.cutoffs, self.mask_grid)

    def extra_repr(self) -> str:
        limits = ", ".join(f"{n}/{d}" for n, d in self.cutoffs)
        return f"channels={self.weight.shape[1]}, cutoffs=({limits}), mask_grid={self.mask_grid}"
