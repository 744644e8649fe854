"""What each kernel computes, in plain operations of float64: weights, convolutions and bands of samples.

Shapes are those of the kernels, see fdconv_zoo/layers/ops/triton/.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fdconv_zoo.layers.low_pass import low_pass


class WeightArguments(NamedTuple):
    """Arguments of `gated_weights` up to `kernel_size`, by its names for them; all but the first two may be None."""

    source: Tensor
    bands: Tensor
    channels: Tensor | None
    filters: Tensor | None
    positions: Tensor | None
    local_input: Tensor | None
    local_weight: Tensor | None

    def double(self) -> "WeightArguments":
        return WeightArguments(*(None if value is None else value.double() for value in self))


def plain_weights(arguments: WeightArguments, kernel_size: tuple[int, int], from_bank: bool) -> Tensor:
    """FDW's weights (B, Cout, kh*kw, Cin)."""
    kh, kw = kernel_size
    if from_bank:
        return torch.einsum("bn,nqc->bqc", arguments.bands, arguments.source).unflatten(1, (-1, kh * kw))
    matrices = arguments.source
    batch, rows, columns = matrices.shape
    by_position = matrices.view(batch, rows // kh, kh, columns // kw, kw).permute(0, 1, 2, 4, 3)
    return by_position.reshape(batch, rows // kh, kh * kw, columns // kw)


def dense_logits(arguments: WeightArguments, kernel_size: tuple[int, int]) -> Tensor:
    """Logits of the dense gate (B, Cout, kh*kw, Cin)."""
    taps = arguments.local_weight.shape[2]
    logits = F.conv1d(arguments.local_input[:, None], arguments.local_weight, padding=taps // 2)
    return logits.unflatten(1, (-1, kernel_size[0] * kernel_size[1]))


def gated_weights(arguments: WeightArguments, kernel_size: tuple[int, int], from_bank: bool) -> Tensor:
    """Weights (B, Cout, kh*kw, Cin) times all gates."""
    weights = plain_weights(arguments, kernel_size, from_bank)
    if arguments.channels is None:
        return weights
    weights = weights * 2 * torch.sigmoid(dense_logits(arguments, kernel_size))
    weights = weights * arguments.channels[:, None, None] * arguments.filters[:, :, None, None]
    return weights if arguments.positions is None else weights * arguments.positions[:, None, :, None]


def ungate(
    grad: Tensor, arguments: WeightArguments, kernel_size: tuple[int, int], from_bank: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The results of the kernel of this name, with their parts summed."""
    kh, kw = kernel_size
    batch, num_filters, positions, channels = grad.shape
    half = torch.sigmoid(dense_logits(arguments, kernel_size))
    product = grad * plain_weights(arguments, kernel_size, from_bank) * 2 * half
    by_row = arguments.filters[:, :, None, None].expand(-1, -1, positions, 1)
    if arguments.positions is not None:
        by_row = by_row * arguments.positions[:, None, :, None]
    by_channel = arguments.channels[:, None, None]
    grad_weights = grad * 2 * half * by_row * by_channel
    if from_bank:
        grad_weights = grad_weights.flatten(1, 2)
    else:
        by_position = grad_weights.view(batch, num_filters, kh, kw, channels)
        grad_weights = by_position.transpose(3, 4).reshape(batch, num_filters * kh, channels * kw)
    return (
        grad_weights,
        (product * by_row * by_channel * (1 - half)).flatten(1, 2),
        (product * by_channel).sum(3).flatten(1),
        (product * by_row).sum((1, 2)),
    )


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: tuple[int, int], stride: tuple[int, int],
    padding: tuple[int, int], dilation: tuple[int, int],
) -> Tensor:  # fmt: skip
    """Maps (B, Cin, H, W), each convolved with its weight (B, Cout, kh*kw, Cin); padding is (vertical, horizontal)."""
    by_layout = weight.unflatten(2, kernel_size).permute(0, 1, 4, 2, 3)
    samples = [F.conv2d(a[None], w, bias, stride, padding, dilation) for a, w in zip(x, by_layout, strict=True)]
    return torch.cat(samples)


def low_passes(x: Tensor, cutoffs: tuple[float, ...]) -> list[Tensor]:
    """The map and its low-passes, widest first."""
    return [x, *(low_pass(x, cutoff) for cutoff in cutoffs)]


def gate_bands(x: Tensor, logits: Tensor, bias: Tensor, cutoffs: tuple[float, ...]) -> Tensor:
    """A map (B, C, H, W) whose bands are gated, the lowest left as it is."""
    edges = low_passes(x, cutoffs)
    gates = 2 * torch.sigmoid(logits + bias[:, None, None])
    bands = (gates[:, i : i + 1] * (edges[i] - edges[i + 1]) for i in range(len(cutoffs)))
    return edges[-1] + sum(bands)


def grad_factors(grad: Tensor, x: Tensor, cutoffs: tuple[float, ...]) -> Tensor:
    """Sums (B, n + 1, H, W) over channels of the gradient times the map and its low-passes."""
    return torch.stack([(grad * edge).sum(1) for edge in low_passes(x, cutoffs)], 1)
