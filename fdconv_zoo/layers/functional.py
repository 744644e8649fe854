"""The dynamic convolution of FDConv in plain operations: what torch.jit and torch.export trace.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

No size is baked in: neither of the batch nor of the map. In eager mode and under torch.compile, eager.py computes the
same faster.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fdw import GainMap, synthesize
from .ksm import local_logits


def pad(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Pads a map (..., H, W) with zeros (left, right, top, bottom)."""
    if max(padding) == 0:
        return x
    return F.pad(x, [padding[0], padding[1], padding[2], padding[3]])


def unfold(x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """Patches of a padded map in the order (kh, C, kw) of the weight matrix.

    Args:
        x: Padded map (B, C, H, W).
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        dilation: Vertical and horizontal dilation.

    Returns:
        Patches (B, kh, C, kw, Hout, Wout).
    """
    kh, kw = kernel_size[0], kernel_size[1]
    rows: list[Tensor] = []
    for i in range(kh):
        # Ends counted from the far side: a traced size is then in no doubt about what a slice holds.
        top, bottom = i * dilation[0], x.shape[2] - (kh - 1 - i) * dilation[0]
        row: list[Tensor] = []
        for j in range(kw):
            left, right = j * dilation[1], x.shape[3] - (kw - 1 - j) * dilation[1]
            row.append(x[:, :, top : bottom : stride[0], left : right : stride[1]])
        rows.append(row[0].unsqueeze(2) if kw == 1 else torch.stack(row, dim=2))
    return torch.stack(rows, dim=1)


def element_gated(weight: Tensor, element: Tensor | None) -> Tensor:
    """Weight matrices (B, R, C) times the gate (B, kh*C) of kernel positions and channels, if there is one."""
    if element is None:
        return weight
    batch, rows, columns = weight.shape[0], weight.shape[1], weight.shape[2]
    return (weight.view(batch, -1, element.shape[1]) * element[:, None]).view(batch, rows, columns)


def convolve_by_matmul(
    x: Tensor,
    weight: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Convolves each sample with a weight of its own by one matrix product.

    Args:
        x: Input (B, Cin, H, W).
        weight: Weights (B, Cout, kh*Cin*kw).
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros (left, right, top, bottom).
        dilation: Vertical and horizontal dilation.

    Returns:
        Output (B, Cout, Hout, Wout).
    """
    if kernel_size[0] * kernel_size[1] == 1:
        patches = pad(x, padding)
        if stride[0] * stride[1] > 1:
            patches = patches[:, :, :: stride[0], :: stride[1]]
    else:
        patches = unfold(pad(x, padding), kernel_size, stride, dilation)
    height, width = patches.shape[-2], patches.shape[-1]
    out = torch.matmul(weight, patches.reshape(x.shape[0], weight.shape[2], height * width))
    return out.reshape(x.shape[0], weight.shape[1], height, width)


def dynamic_conv2d(
    x: Tensor,
    bands: Tensor,
    element: Tensor | None,
    scale: Tensor | None,
    local_input: Tensor | None,
    spectrum: Tensor,
    local_weight: Tensor | None,
    gain_map: GainMap,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """Convolves each sample with the weight that FDW and KSM make for it (Eq. 4-7), without bias.

    Args:
        x: Input (B, Cin, H, W) in the dtype to convolve in.
        bands: Gain of each frequency group (B, n).
        element: Position times channel gate (B, kh*Cin*kw), or None.
        scale: Filter gate times the dense gate's factor of 2 (B, Cout), or None.
        local_input: Input of the dense gate (B, Cin), or None.
        spectrum: Parseval-scaled half spectrum (R, C//2+1, 2).
        local_weight: Convolution weight (Cout*kh*kw, 1, t) of the dense gate, or None.
        gain_map: Which gain each coefficient takes.
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros (left, right, top, bottom).
        dilation: Vertical and horizontal dilation.

    Returns:
        Output (B, Cout, Hout, Wout), dtype of `x`.
    """
    kh, kw = kernel_size[0], kernel_size[1]
    rows, columns = gain_map.index.shape[0], x.shape[1] * kw
    weight = synthesize(spectrum, bands, gain_map, columns)
    if local_input is not None and local_weight is not None:
        weight = weight * torch.sigmoid(local_logits(local_input, local_weight, kw))
    weight = element_gated(weight, element).to(x.dtype).view(x.shape[0], rows // kh, kh * columns)
    out = convolve_by_matmul(x, weight, kernel_size, stride, padding, dilation)
    if scale is not None:
        out = out * scale.to(x.dtype)[:, :, None, None]
    return out


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x would have: autocast's where it is on, else that of x."""
    device_type = x.device.type
    if x.dtype == torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def is_exporting() -> bool:
    """Whether plain operations are wanted, for torch.export and the exporters built on it."""
    if torch.jit.is_scripting():
        return True
    if not hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_compiling()
    return torch.compiler.is_exporting()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context in which operations keep the dtype of their inputs."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
