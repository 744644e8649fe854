"""The operators in plain operations: what torch.jit and torch.export read along, with derivatives of any order.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

No size is baked in: neither of the batch nor of the map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fourier import gain_table, gather_gains, lines_to_rows
from ..low_pass import band_factors, box_low_passes, grid_low_passes, grid_sides
from . import onnx, onnx_conv
from .types import Gates, Geometry, Inputs, Spectrum, element_gate


def weight_matrices(spectrum: Spectrum, gains: Tensor, columns: int, for_onnx: bool = False) -> Tensor:
    """Weight matrices from one spectrum and the gains of its groups (Eq. 4-5).

    Args:
        spectrum: Spectrum of a weight matrix.
        gains: Gain of each group for each sample (B, n), in the dtype to transform in.
        columns: Columns C of the weight matrix.
        for_onnx: Transform by products of matrices.

    Returns:
        Weight matrices (B, R, C).
    """
    bank = spectrum.bank
    if bank is not None:
        mixed = torch.matmul(gains, bank.to(gains.dtype).flatten(1))
        # A bank has channels as neighbours, a matrix the columns of the kernel.
        width = columns // bank.shape[2]
        return mixed.view(-1, bank.shape[1] // width, width, bank.shape[2]).transpose(2, 3).flatten(2)
    if for_onnx:
        return onnx.weight_matrices(spectrum, gains, columns)
    # The second half of the table undoes the sqrt(2) of the Parseval scaling in the same gather.
    table = gain_table(gains, math.sqrt(0.5))
    factors = gather_gains(table, spectrum.gain_map, columns // 2 + 1).unsqueeze(-1)
    half = spectrum.coefficients.to(gains.dtype) * factors
    lines = torch.fft.ifft(torch.view_as_complex(half), dim=1, norm="ortho").contiguous()
    return lines_to_rows(lines, columns)


def local_logits(pooled: Tensor, weight: Tensor, kernel_width: int) -> Tensor:
    """Logits of the dense gate, a convolution along the channel axis (Sec. 3.2, local channel branch).

    It is a product of a (Cout*kh, kw*t) and a (kw*t, Cin*kw) matrix, in the layout of the weight matrix. Each kernel
    column has filters of its own; a block pattern keeps them apart.

    Args:
        pooled: Normalised pooled input (B, Cin).
        weight: Convolution weight (Cout*kh*kw, 1, t).
        kernel_width: kw.

    Returns:
        Logits (B, Cout*kh, Cin*kw).
    """
    batch, channels, num_taps = pooled.shape[0], pooled.shape[1], weight.shape[2]
    padded = F.pad(pooled, (num_taps // 2, num_taps // 2))
    # Slices and no unfold, whose gradient vmap does not know.
    taps = torch.stack([padded.narrow(1, i, channels) for i in range(num_taps)], dim=1)
    if kernel_width > 1:
        # An identity that exporters to ONNX have a translation for, unlike torch.eye.
        columns = torch.arange(kernel_width, device=pooled.device)
        blocks = (columns.unsqueeze(1) == columns).to(pooled.dtype).view(kernel_width, 1, 1, kernel_width)
        taps = blocks * taps.unsqueeze(1).unsqueeze(4)
        taps = taps.reshape(batch, kernel_width * num_taps, channels * kernel_width)
    return torch.matmul(weight.reshape(1, -1, kernel_width * num_taps), taps)


def unfold(x: Tensor, geometry: Geometry) -> Tensor:
    """Patches (B, kh, C, kw, Hout, Wout) of a padded map (B, C, H, W), in the order of the weight matrix."""
    (kh, kw), stride, dilation = geometry.kernel_size, geometry.stride, geometry.dilation
    # Ends counted from the far side: a traced size is then in no doubt about what a slice holds.
    bottom, right = x.shape[2] - (kh - 1) * dilation[0], x.shape[3] - (kw - 1) * dilation[1]
    lines: list[Tensor] = []
    for i in range(kh):
        lines.append(x[:, :, i * dilation[0] : bottom + i * dilation[0] : stride[0]])
    rows = lines[0].unsqueeze(1) if kh == 1 else torch.stack(lines, dim=1)
    patches: list[Tensor] = []
    for j in range(kw):
        patches.append(rows[:, :, :, :, j * dilation[1] : right + j * dilation[1] : stride[1]])
    return patches[0].unsqueeze(3) if kw == 1 else torch.stack(patches, dim=3)


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolves each sample of x (B, Cin, H, W) with its weight (B, Cout, kh*Cin*kw) by one matrix product.

    Returns:
        Output (B, Cout, Hout, Wout).
    """
    (kh, kw), stride, padding = geometry.kernel_size, geometry.stride, geometry.padding
    if max(padding) > 0:
        x = F.pad(x, [padding[0], padding[1], padding[2], padding[3]])
    if kh * kw == 1:
        patches = x
        if stride[0] * stride[1] > 1:
            patches = patches[:, :, :: stride[0], :: stride[1]]
    else:
        patches = unfold(x, geometry)
    height, width = patches.shape[-2], patches.shape[-1]
    out = torch.matmul(weight, patches.reshape(x.shape[0], weight.shape[2], height * width))
    return out.reshape(x.shape[0], weight.shape[1], height, width)


def gated_weights(
    gates: Gates, spectrum: Spectrum, kernel_size: tuple[int, int], in_channels: int, for_onnx: bool
) -> Tensor:
    """Weights of all samples with all gates but the filter gate and the dense gate's factor of 2.

    Args:
        gates: Gates of the samples.
        spectrum: Spectrum of the weight.
        kernel_size: (kh, kw).
        in_channels: Cin.
        for_onnx: As in :func:`weight_matrices`.

    Returns:
        Weights (B, Cout, kh*Cin*kw).
    """
    kh, kw = kernel_size
    batch, rows, columns = gates.bands.shape[0], spectrum.coefficients.shape[0], in_channels * kw
    weight = weight_matrices(spectrum, gates.bands, columns, for_onnx)
    # Optional fields are bound to names: TorchScript knows of those alone that they are not None.
    local_input, local_weight = gates.local_input, gates.local_weight
    if local_input is not None and local_weight is not None:
        weight = weight * torch.sigmoid(local_logits(local_input, local_weight, kw))
    element = element_gate(gates, kernel_size)
    weight = weight.reshape(batch, rows // kh, kh * columns)
    return weight if element is None else weight * element.unsqueeze(1)


def dynamic_conv2d(inputs: Inputs, geometry: Geometry, for_onnx: bool = False) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.dynamic_conv2d` without bias; `for_onnx` as in :func:`weight_matrices`."""
    x, filters = inputs.x, inputs.gates.filters
    if for_onnx and (geometry.kernel_size[0] == 1 or geometry.stride[0] == 1):
        out = onnx_conv.dynamic_conv2d(inputs, geometry)
    else:
        weight = gated_weights(inputs.gates, inputs.spectrum, geometry.kernel_size, x.shape[1], for_onnx)
        out = convolve(x, weight.to(x.dtype), geometry)
    if filters is not None:
        # The dense gate's factor of 2 is applied with the filter gate, where it costs least.
        out = out * (2 * filters).to(x.dtype).unsqueeze(2).unsqueeze(3)
    return out


def band_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gates of the bands (B, n, H, W) of a map x (B, C, H, W), from filters (n, C, 3, 3) and bias (n,) (Eq. 10)."""
    return 2 * torch.sigmoid(F.conv2d(x, weight, bias, padding=1))


def modulate_bands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cutoffs: list[tuple[int, int]],
    mask_grid: int | None,
    for_onnx: bool = False,
) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.modulate_bands`; `for_onnx` avoids transforms, which ONNX lacks or gets wrong."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    factors = band_factors(band_gates(exact, weight.to(exact.dtype), bias.to(exact.dtype)))
    modulated = factors[:, :1] * exact
    if mask_grid is None and for_onnx:
        return (modulated + onnx.weighted_low_passes(exact, factors, cutoffs)).to(x.dtype)
    if mask_grid is None:
        lows = box_low_passes(exact, cutoffs, False)
    elif for_onnx:
        lows = onnx.box_products(exact, grid_sides(exact, cutoffs, mask_grid))
    else:
        lows = grid_low_passes(exact, cutoffs, mask_grid)
    for i, low in enumerate(lows):
        modulated = torch.addcmul(modulated, factors[:, i + 1 : i + 2], low)
    return modulated.to(x.dtype)
