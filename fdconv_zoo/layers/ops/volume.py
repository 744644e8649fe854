"""FDConv of volumes, in plain operations: a weight matrix of Cout*kd rows and Cin*kh*kw columns, a box of three sides.

To FDW and KSM the kernel is one of kd by kh*kw; the paper (CVPR 2025, https://arxiv.org/abs/2503.18783) has maps alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..low_pass import band_factors, fourier_basis, num_kept
from .traced import gated_weights
from .types import Inputs, VolumeGeometry


def patches_of(x: Tensor, geometry: VolumeGeometry) -> Tensor:
    """Patches (B, kd, C, kh, kw, Dout, Hout, Wout) of a padded volume (B, C, D, H, W), in the order of the weight."""
    (kd, kh, kw), stride, dilation = geometry.kernel_size, geometry.stride, geometry.dilation
    planes: list[Tensor] = []
    for d in range(kd):
        # Ends counted from the far side, as for maps.
        front, back = d * dilation[0], x.shape[2] - (kd - 1 - d) * dilation[0]
        rows: list[Tensor] = []
        for i in range(kh):
            top, bottom = i * dilation[1], x.shape[3] - (kh - 1 - i) * dilation[1]
            row: list[Tensor] = []
            for j in range(kw):
                left, right = j * dilation[2], x.shape[4] - (kw - 1 - j) * dilation[2]
                part = x[:, :, front : back : stride[0], top : bottom : stride[1], left : right : stride[2]]
                row.append(part)
            rows.append(torch.stack(row, dim=2))
        planes.append(torch.stack(rows, dim=2))
    return torch.stack(planes, dim=1)


def convolve(x: Tensor, weight: Tensor, geometry: VolumeGeometry, by_patches: bool) -> Tensor:
    """Convolves each sample of x (B, Cin, D, H, W) with its weight (B, Cout, kd*Cin*kh*kw).

    Args:
        x: The volumes.
        weight: A weight for each.
        geometry: Geometry of the convolution.
        by_patches: By one matrix product, for an exporter: a grouped convolution would fix the batch.

    Returns:
        Output (B, Cout, Dout, Hout, Wout).
    """
    (kd, kh, kw), padding = geometry.kernel_size, geometry.padding
    batch, channels, filters = x.shape[0], x.shape[1], weight.shape[1]
    if max(padding) > 0:
        x = F.pad(x, [padding[0], padding[1], padding[2], padding[3], padding[4], padding[5]])
    if by_patches:
        patches = patches_of(x, geometry)
        depth, height, width = patches.shape[5], patches.shape[6], patches.shape[7]
        out = torch.matmul(weight, patches.reshape(batch, weight.shape[2], depth * height * width))
        return out.reshape(batch, filters, depth, height, width)
    kernels = weight.view(batch, filters, kd, channels, kh, kw).transpose(2, 3)
    out = F.conv3d(
        x.reshape(1, batch * channels, x.shape[2], x.shape[3], x.shape[4]),
        kernels.reshape(batch * filters, channels, kd, kh, kw),
        stride=geometry.stride,
        dilation=geometry.dilation,
        groups=batch,
    )
    return out.view(batch, filters, out.shape[2], out.shape[3], out.shape[4])


def convolve_nothing(inputs: Inputs, geometry: VolumeGeometry) -> Tensor:
    """:func:`dynamic_conv3d` of an empty input: nothing, but still a function of all parameters."""
    x, coefficients, (kd, kh, kw) = inputs.x, inputs.spectrum.coefficients, geometry.kernel_size
    gates = inputs.gates
    nothing = coefficients.sum() + gates.bands.sum()
    if gates.local_input is not None and gates.local_weight is not None:
        nothing = nothing + gates.local_input.sum() + gates.local_weight.sum()
    weight = x.new_zeros(len(coefficients) // kd, x.shape[1], kd, kh, kw)
    out = F.conv3d(F.pad(x, geometry.padding), weight, stride=geometry.stride, dilation=geometry.dilation)
    return out + nothing.to(x.dtype)


def dynamic_conv3d(inputs: Inputs, geometry: VolumeGeometry, by_patches: bool, for_onnx: bool) -> Tensor:
    """Convolves each volume with the weight that FDW and KSM make for it (Eq. 4-7).

    Args:
        inputs: The input (B, Cin, D, H, W), its gates and the spectrum of the weight.
        geometry: Geometry of the convolution.
        by_patches: As for :func:`convolve`.
        for_onnx: Transform by products of matrices.

    Returns:
        Output (B, Cout, Dout, Hout, Wout), dtype of the input.
    """
    x, filters = inputs.x, inputs.gates.filters
    kd, kh, kw = geometry.kernel_size
    weight = gated_weights(inputs.gates, inputs.spectrum, (kd, kh * kw), x.shape[1], for_onnx)
    out = convolve(x, weight.to(x.dtype), geometry, by_patches)
    if filters is not None:
        # The dense gate's factor of 2 is applied with the filter gate, where it costs least.
        out = out * (2 * filters).to(x.dtype)[:, :, None, None, None]
    return out


def low_passes(x: Tensor, cutoffs: list[tuple[int, int]]) -> list[Tensor]:
    """Low-passes of x (B, C, D, H, W) by boxes max(|fd|, |fh|, |fw|) < numerator/denominator, widest first."""
    batch, channels, depth, height, width = x.shape[0], x.shape[1], x.shape[2], x.shape[3], x.shape[4]
    widest = cutoffs[0]
    # One pair more than the widest cutoff keeps: exporters would take a slice of all for a fixed size.
    planes = fourier_basis(depth, num_kept(depth, widest[0], widest[1]) + 2, x.device, x.dtype)
    rows = fourier_basis(height, num_kept(height, widest[0], widest[1]) + 2, x.device, x.dtype)
    columns = fourier_basis(width, num_kept(width, widest[0], widest[1]) + 2, x.device, x.dtype)
    # Axes take turns to be the last: (D, H, W) to (W', D, H), (H', W', D), (D', H', W').
    maps = x.reshape(batch * channels, depth * height, width)
    analysis = torch.matmul(maps, columns).transpose(1, 2)
    analysis = analysis.reshape(batch * channels, columns.shape[1] * depth, height)
    analysis = torch.matmul(analysis, rows).reshape(batch * channels, columns.shape[1], depth, rows.shape[1])
    analysis = torch.matmul(analysis.permute(0, 3, 1, 2), planes).permute(0, 3, 1, 2)
    outputs: list[Tensor] = []
    for numerator, denominator in cutoffs:
        d, h, w = (
            num_kept(depth, numerator, denominator),
            num_kept(height, numerator, denominator),
            num_kept(width, numerator, denominator),
        )
        # From (D', H', W') back, a side at a time.
        low = torch.matmul(analysis[:, :d, :h, :w], columns[:, :w].t())
        low = torch.matmul(low.transpose(2, 3), rows[:, :h].t()).transpose(2, 3)
        low = torch.matmul(low.permute(0, 2, 3, 1), planes[:, :d].t()).permute(0, 3, 1, 2)
        outputs.append(low.reshape(batch, channels, depth, height, width))
    return outputs


def band_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gates of the bands (B, n, D, H, W) of a volume x (B, C, D, H, W), from filters (n, C, 3, 3, 3) and bias (n,)."""
    return 2 * torch.sigmoid(F.conv3d(x, weight, bias, padding=1))


def modulate_bands(x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[tuple[int, int]]) -> Tensor:
    """Gates the frequency bands of a volume place by place (Eq. 8-10).

    Args:
        x: Volume (B, C, D, H, W), any floating dtype; filtered in float32 at least.
        weight: Gate convolution (bands, C, 3, 3, 3).
        bias: Its bias (bands,).
        cutoffs: Band limits as (numerator, denominator), widest first. The band below the last is left as it is.

    Returns:
        Modulated volume (B, C, D, H, W), dtype of `x`.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    factors = band_factors(band_gates(exact, weight.to(exact.dtype), bias.to(exact.dtype)))
    modulated = factors[:, :1] * exact
    for i, low in enumerate(low_passes(exact, cutoffs)):
        modulated = torch.addcmul(modulated, factors[:, i + 1 : i + 2], low)
    return modulated.to(x.dtype)
