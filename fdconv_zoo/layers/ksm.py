"""Kernel Spatial Modulation (KSM): gates for every element of a sample's weight, from its pooled input.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.2)

A global branch gates input channels, filters, kernel positions and frequency groups; a local branch, one convolution
along the channel axis, gates each weight element.

What differs from the official code:
- Every head starts at zero, so every gate starts at exactly 1 (the official code misses the filter head).
- The four heads are one linear layer.
- The local branch's convolution is left to the operator, which makes the dense gate a sample at a time.
"""

import math
from collections.abc import Callable

import torch
from timm.models.metaformer import StarReLU
from torch import Tensor, nn

from .ksm_parts import ChannelTaps, Projection
from .ops.traced import local_logits
from .ops.types import Gates


def local_kernel_size(in_channels: int) -> int:
    """Taps t of the local branch, odd: round(log2(Cin)/2 + 0.5) // 2 * 2 + 1."""
    return round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1


class KSM(nn.Module):
    """Kernel Spatial Modulation.

    Args:
        in_channels: Input channels Cin.
        out_channels: Filters Cout.
        kernel_size: (kh, kw).
        num_bands: Frequency groups n of the FDW.
        reduction: Ratio of hidden to input channels; at least 16 channels are kept.
        modulate_weight: False leaves only the gains of the frequency groups (the paper's "FDW only").
        norm_layer: Normalisation of the hidden (B, A, 1, 1) map.
        act_layer: Activation of the hidden map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        num_bands: int = 64,
        reduction: float = 1 / 16,
        modulate_weight: bool = True,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: Callable[..., nn.Module] = StarReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = max(int(in_channels * reduction), 16)
        positions = kernel_size[0] * kernel_size[1]
        self.kernel_size = kernel_size
        self.modulate_weight = modulate_weight
        self.sections = [num_bands]
        if modulate_weight:
            self.sections += [in_channels, out_channels] + ([positions] if positions > 1 else [])
        self.fc = Projection(in_channels, hidden, bias=False, device=device, dtype=dtype)
        self.norm = norm_layer(hidden).to(device=device, dtype=dtype)
        self.act = act_layer().to(device=device, dtype=dtype)
        self.heads = Projection(hidden, sum(self.sections), bias=True, device=device, dtype=dtype)
        if modulate_weight:
            self.local_norm = nn.LayerNorm(in_channels, device=device, dtype=dtype)
            num_taps, maps = local_kernel_size(in_channels), out_channels * positions
            self.local_conv = ChannelTaps(maps, num_taps, device=device, dtype=dtype)
        else:
            self.local_norm = self.local_conv = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random hidden layer, everything after it at zero: all gates start at exactly 1."""
        self.fc.draw()
        for module in (self.norm, self.act, self.local_norm):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        self.heads.zero()
        if self.local_conv is not None:
            self.local_conv.zero()

    def forward(self, pooled: Tensor) -> Gates:
        """Computes the gates of each sample, all but the dense one, whose input and weight stand for it.

        Args:
            pooled: Mean of the input over space (B, Cin); the gates have its dtype.

        Raises:
            ValueError: If BatchNorm would have to train on a batch of one.
        """
        if not torch.jit.is_scripting():
            self._check_batch(pooled)
        projected = self.fc(pooled)
        hidden = self.act(self.norm(projected[:, :, None, None])).flatten(1)
        gates = (2 * torch.sigmoid(self.heads(hidden))).to(pooled.dtype)
        if self.local_norm is None or self.local_conv is None:
            return Gates(gates, None, None, None, None, None)
        local_input = self.local_norm(pooled.to(projected.dtype)).to(pooled.dtype)
        local_weight = self.local_conv(pooled)
        positions: Tensor | None = None
        if len(self.sections) == 3:
            bands, channels, filters = gates.split(self.sections, dim=1)
        else:
            bands, channels, filters, positions = gates.split(self.sections, dim=1)
        return Gates(bands, channels, filters, positions, local_input, local_weight)

    @torch.jit.ignore
    def dense_gate(self, gates: Gates) -> Tensor | None:
        """Gate of each weight element (B, Cout*kh, Cin*kw), in the layout of the weight matrix, or None without it."""
        if gates.local_input is None:
            return None
        return 2 * torch.sigmoid(local_logits(gates.local_input, gates.local_weight, self.kernel_size[1]))

    def _check_batch(self, pooled: Tensor) -> None:
        if isinstance(self.norm, nn.BatchNorm2d) and self.norm.training and pooled.shape[0] == 1:
            raise ValueError(
                "KSM's BatchNorm can't train on a batch of 1: it would normalise one value per channel. Use a batch of "
                "2 or more for each process, freeze the BatchNorm layers (module.eval(), or "
                "timm.layers.freeze_batch_norm_2d), or build the layer with another norm_layer, e.g. "
                "norm_layer=functools.partial(nn.GroupNorm, 1)"
            )
