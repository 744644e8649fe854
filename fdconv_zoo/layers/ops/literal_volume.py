"""FDConv of volumes in plain words, after literal.py: one sample, one frequency group and one band at a time.

The paper has maps alone. To it a kernel is two-dimensional, rows and columns of the weight matrix: here the depth of
the kernel goes with the filters, height and width with the channels. A band's box has a third side.
"""

from fractions import Fraction
from functools import lru_cache
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from .literal import fdw_matrix, ksm_gates


@lru_cache(maxsize=8)
def box_mask(depth: int, height: int, width: int, cutoff: float) -> Tensor:
    """The coefficients (D, H, W) with max(|fd|, |fh|, |fw|) below the cutoff, in exact arithmetic."""
    limit = Fraction(str(cutoff))
    mask = torch.zeros(depth, height, width, dtype=torch.bool)
    for t, u, v in product(range(depth), range(height), range(width)):
        sides = ((t, depth), (u, height), (v, width))
        mask[t, u, v] = all(Fraction(min(k, size - k), size) < limit for k, size in sides)
    return mask


def fbm(x: Tensor, weight: Tensor, bias: Tensor, cutoffs: tuple[float, ...]) -> Tensor:
    """One sample's volume (C, D, H, W), each band gated place by place, the lowest left as it is."""
    maps = 2 * torch.sigmoid(F.conv3d(x[None], weight, bias, padding=1)[0])
    remaining, total = x, torch.zeros_like(x)
    for band, cutoff in enumerate(cutoffs):
        low = torch.fft.ifftn(torch.fft.fftn(x, dim=(1, 2, 3)) * box_mask(*x.shape[1:], cutoff), dim=(1, 2, 3)).real
        total = total + maps[band] * (remaining - low)
        remaining = low
    return total + remaining


def weight_of_sample(
    state: dict[str, Tensor], pooled: Tensor, gates: tuple[Tensor, ...], shape: tuple[int, int, int, int, int]
) -> Tensor:
    """One sample's weight (Cout, Cin, kd, kh, kw), element by element, with all gates applied to it."""
    _, in_channels, kd, kh, kw = shape
    bands, *others = gates
    matrix = fdw_matrix(state["fdw.spectrum"], in_channels * kh * kw, bands)
    logits, positions = None, []
    if others:
        channels, filters, *positions = others
        normalised = F.layer_norm(pooled, pooled.shape, state["ksm.local_norm.weight"], state["ksm.local_norm.bias"])
        kernels = state["ksm.local_conv.weight"]
        logits = F.conv1d(normalised[None, None], kernels, padding=kernels.shape[2] // 2)[0]
    elements = []
    for o, c, d, i, j in product(*(range(size) for size in shape)):
        element = matrix[o * kd + d, c * kh * kw + i * kw + j]
        if logits is not None:
            element = element * 2 * torch.sigmoid(logits[((o * kd + d) * kh + i) * kw + j, c])
            element = element * channels[c] * filters[o]
        for gate in positions:  # of kernels larger than 1
            element = element * gate[(d * kh + i) * kw + j]
        elements.append(element)
    return torch.stack(elements).view(shape)


def fdconv3d(
    state: dict[str, Tensor],
    x: Tensor,
    shape: tuple[int, int, int, int, int],
    num_bands: int,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] | str = 0,
    dilation: int | tuple[int, int, int] = 1,
    cutoffs: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16),
    ksm: bool = True,
    training: bool = False,
) -> Tensor:
    """FDConv3d of x (B, Cin, D, H, W) with a static weight of `shape`, from parameters and buffers by name."""
    out_channels, in_channels, kd, kh, kw = shape
    positions = [kd * kh * kw] if kd * kh * kw > 1 else []
    pooled = x.mean((2, 3, 4))
    gates = ksm_gates(state, pooled, [num_bands] + ([in_channels, out_channels] + positions if ksm else []), training)
    outputs = []
    for b in range(len(x)):
        modulated = x[b]
        if "fbm.weight" in state:
            modulated = fbm(x[b], state["fbm.weight"], state["fbm.bias"], cutoffs)
        weight = weight_of_sample(state, pooled[b], gates[b], shape)
        outputs.append(F.conv3d(modulated[None], weight, state.get("bias"), stride, padding, dilation)[0])
    return torch.stack(outputs)
