"""The convolution with each sample's own weight for an exporter to ONNX, by weights as their transform leaves them.

The inverse transform ends in transposed matrices (Cin*kw, Cout*kh). They are gated and multiplied as they are, which
saves passes over the largest tensors there are: runtimes turn an operand of a product while they read it. The product
takes patches of one row, as wide as the kernel, instead of whole ones, and makes what each row of the kernel adds to
the output; these are shifted and summed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import onnx
from .types import Geometry, Inputs

# From so many weights on, channel gates are applied to the map of a pointwise layer, which is the smaller one there.
MANY = 1 << 19


@torch.jit.unused
def dynamic_conv2d(inputs: Inputs, geometry: Geometry) -> Tensor:
    """:func:`.traced.dynamic_conv2d` without filter gates and the dense gate's factor of 2.

    Kernels of several rows have a stride of 1 from row to row: others would leave out rows of what the product makes.
    """
    x, gates, (kh, kw) = inputs.x, inputs.gates, geometry.kernel_size
    channels, rows = int(x.shape[1]), int(inputs.spectrum.coefficients.shape[0])
    weight = onnx.transposed_weights(inputs.spectrum, gates.bands, channels * kw)
    if gates.local_input is not None and gates.local_weight is not None:
        filters = gates.local_weight.reshape(rows, -1)
        weight = weight * torch.sigmoid(torch.matmul(taps(gates.local_input, filters.shape[1] // kw, kw), filters.t()))
    if gates.positions is not None:
        places = torch.arange(kh * kw, device=x.device).reshape(kh, kw).t().unsqueeze(1)
        by_row = gates.positions.index_select(1, places.repeat(1, rows // kh, 1).flatten()).reshape(-1, 1, kw, rows)
        weight = (weight.reshape(-1, channels, kw, rows) * by_row).reshape(-1, channels * kw, rows)
    if gates.channels is not None:
        if x.dtype == weight.dtype and (kh * kw > 1 or channels * rows >= MANY):
            x = x * gates.channels.unsqueeze(2).unsqueeze(3)
        else:
            by_channel = gates.channels.reshape(-1, channels, 1, 1)
            weight = (weight.reshape(-1, channels, kw, rows) * by_channel).reshape(-1, channels * kw, rows)
    return convolve(x, weight.to(x.dtype), geometry)


def taps(pooled: Tensor, count: int, kw: int) -> Tensor:
    """The channels around each channel of a pooled input (B, Cin), as the dense gate's filters take them.

    Returns:
        (B, Cin*kw, kw*count): for each column of the kernel, zero in the places of the others.
    """
    channels = int(pooled.shape[1])
    # By one operation, where slices are dozens in the file.
    places = torch.tensor([i + j for i in range(channels) for j in range(count)], device=pooled.device)
    around = F.pad(pooled, (count // 2, count // 2)).index_select(1, places)
    if kw == 1:
        return around.reshape(-1, channels, count)
    column = torch.arange(kw, device=pooled.device)
    own = (column.unsqueeze(1) == column).to(pooled.dtype).unsqueeze(2)
    return (around.reshape(-1, channels, 1, 1, count) * own).reshape(-1, channels * kw, kw * count)


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolves each sample of x (B, Cin, H, W) with its transposed weight (B, Cin*kw, Cout*kh)."""
    (kh, kw), (left, right, top, bottom) = geometry.kernel_size, geometry.padding
    (down, across), (dh, dw) = geometry.stride, geometry.dilation
    inner, rows = int(weight.shape[1]), int(weight.shape[2])
    if kh == 1:
        x, top, bottom = padded(x, [0, 0, top, bottom]), 0, 0
    if down > 1:
        x = x[:, :, ::down]
    x = padded(x, [left, right])
    patches = x.unsqueeze(2)
    if kw * across > 1:
        # Ends counted from the far side: a traced size is then in no doubt about what a slice holds.
        end = x.shape[3] - (kw - 1) * dw
        patches = torch.stack([x[:, :, :, j * dw : end + j * dw : across] for j in range(kw)], dim=2)
    height, width = patches.shape[3], patches.shape[4]
    made = torch.matmul(weight.transpose(1, 2), patches.reshape(-1, inner, height * width))
    # What lies beyond the map adds nothing: rows are padded here, where they are fewer.
    made = padded(made.reshape(-1, rows // kh, kh, height, width), [0, 0, top, bottom])
    if kh == 1:
        return made.squeeze(2)
    last = made.shape[3] - (kh - 1) * dh
    out = made[:, :, 0, :last]
    for i in range(1, kh):
        out = out + made[:, :, i, i * dh : last + i * dh]
    return out


def padded(x: Tensor, sizes: list[int]) -> Tensor:
    """With zeros around; runtimes copy a map for padding of nothing."""
    return F.pad(x, sizes) if any(sizes) else x
