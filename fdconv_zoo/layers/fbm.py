"""Frequency Band Modulation (FBM): each frequency band of the input gets a gate of its own at every place.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)

What differs from the official code:
- The band masks are those of the paper at any map size. The official ones are made once on a 64x64 grid, lose 1/4 to
  rounding and are stretched to the map; `mask_grid=64` asks for exactly that.
- A band limit is a box in frequency, so it is separable: small matrix products and no FFT (low_pass.py).
- One 3x3 convolution makes the gates of all bands.
"""

from fractions import Fraction
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from .low_pass import MAX_DENOMINATOR, low_passes
from .ops import modulate_bands, volume
from .ops.traced import band_gates


def check_cutoffs(cutoffs: tuple[float, ...]) -> None:
    """Raises a ValueError unless the cutoffs fall from at most 0.5 to above 0 cycles per pixel."""
    descending = all(a > b for a, b in pairwise(cutoffs))
    if not cutoffs or not descending or cutoffs[0] > 0.5 or cutoffs[-1] <= 0:
        raise ValueError(
            f"cutoffs={tuple(cutoffs)}, but they must fall strictly, within 0.5 >= cutoff > 0 cycles per pixel"
        )


class FBM(nn.Module):
    """Frequency Band Modulation of maps.

    Attributes:
        kernel: Size of the convolution that makes the gates.

    Args:
        channels: Channels C of the feature map.
        cutoffs: Band limits in cycles per pixel, falling.
        mask_grid: None for the paper's masks, 64 for those of checkpoints trained with the official code.
        fused: False computes on a GPU as elsewhere, with PyTorch's operations instead of Triton's kernels.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If the cutoffs do not fall strictly within (0, 0.5], or `mask_grid` is below 2.
    """

    kernel: ClassVar[tuple[int, ...]] = (3, 3)
    fused: bool = True  # of pickles from before it was there

    def __init__(
        self,
        channels: int,
        cutoffs: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16),
        mask_grid: int | None = None,
        fused: bool = True,
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
        self.fused = fused
        self.weight = nn.Parameter(torch.empty(len(cutoffs), channels, *self.kernel, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(len(cutoffs), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros: every gate starts at exactly 1."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Modulates a feature map (B, C, H, W), whose shape and dtype the result has."""
        return modulate_bands(x, self.weight, self.bias, self.cutoffs, self.mask_grid, self.fused)

    @torch.jit.ignore
    def gates(self, x: Tensor) -> Tensor:
        """Modulation maps A_i (B, bands - 1, H, W) of a feature map (B, C, H, W), highest band first (Eq. 10)."""
        return band_gates(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    @torch.jit.ignore
    def bands(self, x: Tensor) -> Tensor:
        """Frequency bands (bands, B, C, H, W) of a feature map (B, C, H, W), highest first; their sum is the map."""
        edges = [x, *low_passes(x, self.cutoffs, self.mask_grid), torch.zeros_like(x)]
        return torch.stack([above - below for above, below in pairwise(edges)])

    def extra_repr(self) -> str:
        limits = ", ".join(f"{n}/{d}" for n, d in self.cutoffs)
        return f"channels={self.weight.shape[1]}, cutoffs=({limits}), mask_grid={self.mask_grid}"


class FBM1d(FBM):
    """Frequency Band Modulation of sequences, as maps (B, C, L, 1): a box of one side, gates by a convolution of 3."""

    kernel = (3,)

    def _filters(self) -> Tensor:
        """The gates' convolution in the middle column of one of 3x3, whose other columns would see zeros."""
        middle = self.weight.unsqueeze(-1)
        zeros = torch.zeros_like(middle)
        return torch.cat([zeros, middle, zeros], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Modulates a map (B, C, L, 1)."""
        return modulate_bands(x, self._filters(), self.bias, self.cutoffs, None, self.fused)

    @torch.jit.ignore
    def gates(self, x: Tensor) -> Tensor:
        """Modulation maps A_i (B, bands - 1, L, 1) of a map (B, C, L, 1), highest band first (Eq. 10)."""
        return band_gates(x, self._filters().to(x.dtype), self.bias.to(x.dtype))


class FBM3d(FBM):
    """Frequency Band Modulation of volumes (B, C, D, H, W): a box of three sides, gates by a convolution of 3x3x3."""

    kernel = (3, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Modulates a volume (B, C, D, H, W), whose shape and dtype the result has."""
        return volume.modulate_bands(x, self.weight, self.bias, self.cutoffs)

    @torch.jit.ignore
    def gates(self, x: Tensor) -> Tensor:
        """Modulation maps A_i (B, bands - 1, D, H, W) of a volume (B, C, D, H, W), highest band first (Eq. 10)."""
        return volume.band_gates(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    @torch.jit.ignore
    def bands(self, x: Tensor) -> Tensor:
        """Frequency bands (bands, B, C, D, H, W) of a volume (B, C, D, H, W), highest first."""
        edges = [x, *volume.low_passes(x, self.cutoffs), torch.zeros_like(x)]
        return torch.stack([above - below for above, below in pairwise(edges)])
