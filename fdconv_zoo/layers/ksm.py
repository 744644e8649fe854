"""Kernel Spatial Modulation (KSM): gates for every element of a sample's weight, from its pooled input.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.2)

A global branch gates input channels, filters, kernel positions and frequency groups; a local branch, one convolution
along the channel axis, gates each weight element.

What differs from the official code:
- Every head starts at zero, so every gate starts at exactly 1 (the official code misses the filter head).
- The four heads are one linear layer.
- The local branch is a product of a (Cout*kh, kw*t) and a (kw*t, Cin*kw) matrix, in the layout of the FDW's output.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.models.metaformer import StarReLU
from torch import Tensor, nn


def local_kernel_size(in_channels: int) -> int:
    """Taps t of the local branch, odd: round(log2(Cin)/2 + 0.5) // 2 * 2 + 1."""
    return round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1


def channel_taps(pooled: Tensor, num_taps: int, kernel_width: int) -> Tensor:
    """Neighbours of each channel, as the right-hand side of a matrix product (Sec. 3.2, local channel branch).

    Args:
        pooled: Normalised pooled input (B, Cin).
        num_taps: Taps t of the convolution along the channel axis, odd.
        kernel_width: kw. Each kernel column has filters of its own; a block pattern keeps them apart.

    Returns:
        Taps (B, kw*t, Cin*kw).
    """
    batch, channels = pooled.shape[0], pooled.shape[1]
    padded = F.pad(pooled, (num_taps // 2, num_taps // 2))
    taps = padded.unfold(1, channels, 1).contiguous()
    if kernel_width > 1:
        blocks = torch.eye(kernel_width, device=pooled.device, dtype=pooled.dtype)[:, None, None, :]
        taps = (blocks * taps[:, None, :, :, None]).reshape(batch, kernel_width * num_taps, channels * kernel_width)
    return taps


def channel_taps_adjoint(grad: Tensor, kernel_width: int) -> Tensor:
    """Gradient (B, Cin) of the input of :func:`channel_taps`, given that of its output (B, kw*t, Cin*kw)."""
    batch, rows, columns = grad.shape
    taps, channels = rows // kernel_width, columns // kernel_width
    grad = grad.view(batch, kernel_width, taps, channels, kernel_width).diagonal(dim1=1, dim2=4).sum(-1)
    padded = grad.new_zeros(batch, channels + taps - 1)
    for t in range(taps):
        padded[:, t : t + channels].add_(grad[:, t])
    return padded[:, taps // 2 : taps // 2 + channels].clone(memory_format=torch.contiguous_format)


def local_logits(pooled: Tensor, weight: Tensor, kernel_width: int) -> Tensor:
    """Logits of the dense gate, a convolution along the channel axis (Sec. 3.2, local channel branch).

    Args:
        pooled: Normalised pooled input (B, Cin).
        weight: Convolution weight (Cout*kh*kw, 1, t).
        kernel_width: kw.

    Returns:
        Logits (B, Cout*kh, Cin*kw) in the layout of the weight matrix.
    """
    filters = weight.reshape(1, -1, kernel_width * weight.shape[2])
    return torch.bmm(filters.expand(pooled.shape[0], -1, -1), channel_taps(pooled, weight.shape[2], kernel_width))


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
        self.modulate_weight = modulate_weight
        self.sections = [num_bands]
        if modulate_weight:
            self.sections += [in_channels, out_channels] + ([positions] if positions > 1 else [])
        self.fc = nn.Linear(in_channels, hidden, bias=False, device=device, dtype=dtype)
        self.norm = norm_layer(hidden).to(device=device, dtype=dtype)
        self.act = act_layer().to(device=device, dtype=dtype)
        self.heads = nn.Linear(hidden, sum(self.sections), device=device, dtype=dtype)
        if modulate_weight:
            self.local_norm = nn.LayerNorm(in_channels, device=device, dtype=dtype)
            self.local_conv = nn.Conv1d(
                1,
                out_channels * positions,
                local_kernel_size(in_channels),
                padding="same",
                bias=False,
                device=device,
                dtype=dtype,
            )
        else:
            self.local_norm = self.local_conv = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random hidden layer, everything after it at zero: all gates start at exactly 1."""
        self.fc.reset_parameters()
        for module in (self.norm, self.act, self.local_norm):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        nn.init.zeros_(self.heads.weight)
        nn.init.zeros_(self.heads.bias)
        if self.local_conv is not None:
            nn.init.zeros_(self.local_conv.weight)

    def forward(self, pooled: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Computes the gates of each sample.

        Args:
            pooled: Mean of the input over space (B, Cin).

        Returns:
            Gates of bands (B, n), channels (B, Cin), filters (B, Cout) and positions (B, kh*kw), the last only where
            the kernel is larger than 1 and only the first where `modulate_weight` is off; and the normalised input
            (B, Cin) of the local branch, or None.

        Raises:
            ValueError: If BatchNorm would have to train on a batch of one.
        """
        if not torch.jit.is_scripting():
            self._check_batch(pooled)
        pooled = pooled.to(self.fc.weight.dtype)
        hidden = self.act(self.norm(self.fc(pooled)[:, :, None, None])).flatten(1)
        gates = 2 * torch.sigmoid(self.heads(hidden))
        local_input = self.local_norm(pooled) if self.local_norm is not None else None
        return gates.split(self.sections, dim=1), local_input

    def _check_batch(self, pooled: Tensor) -> None:
        if isinstance(self.norm, nn.BatchNorm2d) and self.norm.training and pooled.shape[0] == 1:
            raise ValueError(
                "KSM's BatchNorm can't train on a batch of 1: it would normalise one value per channel. Use a batch of "
                "2 or more for each process, freeze the BatchNorm layers (module.eval(), or "
                "timm.layers.freeze_batch_norm_2d), or build the layer with another norm_layer, e.g. "
                "norm_layer=functools.partial(nn.GroupNorm, 1)"
            )
