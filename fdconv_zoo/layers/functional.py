"""The dynamic convolution of FDConv: spectrum -> weight of each sample -> convolution, in chunks of samples.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A sample's weight is as large as the layer, so a batch of weights is never kept: samples pass through in chunks of
bounded size, and the backward pass computes the weights again. Saved for it are the input of the layer and its gates.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fbm import modulate_bands
from .fdw import synthesize
from .ksm import local_logits

# Weight elements of one chunk. On a CPU the chunk should stay in the cache; on a GPU it should fill the device.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 26
# Largest bank of group weights (num_bands x weight) that is mixed instead of transforming each sample's spectrum.
BANK_LIMIT = 1 << 22
# Below this many output places, reordering a fresh weight for a convolution kernel costs more than a matrix product.
MATMUL_PLACES = 128


def pad(x: Tensor, padding: tuple[int, int, int, int]) -> Tensor:
    """Pads a map (..., H, W) with zeros (left, right, top, bottom)."""
    if max(padding) == 0:
        return x
    return F.pad(x, [padding[0], padding[1], padding[2], padding[3]])


def unfold(
    x: Tensor, kernel_size: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int], gate: Tensor | None
) -> Tensor:
    """Patches of a padded map in the order (kh, C, kw) of the weight matrix, scaled by the position gate.

    Args:
        x: Padded map (B, C, H, W).
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        dilation: Vertical and horizontal dilation.
        gate: Gate of each kernel position (B, kh*kw), or None.

    Returns:
        Patches (B, kh, C, kw, Hout, Wout).
    """
    kh, kw = kernel_size[0], kernel_size[1]
    out_height = (x.shape[2] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    out_width = (x.shape[3] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    rows: list[Tensor] = []
    for i in range(kh):
        top = i * dilation[0]
        row: list[Tensor] = []
        for j in range(kw):
            left = j * dilation[1]
            patch = x[
                :,
                :,
                top : top + (out_height - 1) * stride[0] + 1 : stride[0],
                left : left + (out_width - 1) * stride[1] + 1 : stride[1],
            ]
            if gate is not None:
                patch = patch * gate[:, i * kw + j, None, None, None]
            row.append(patch)
        rows.append(torch.stack(row, dim=2))
    return torch.stack(rows, dim=1)


def convolve_by_matmul(
    x: Tensor,
    weight: Tensor,
    position: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    channels_last: bool,
) -> Tensor:
    """Convolves each sample with a weight of its own by one matrix product; no size is baked in when traced.

    Args:
        x: Input (B, Cin, H, W).
        weight: Weights (B, Cout, kh*Cin*kw).
        position: Gate of each kernel position (B, kh*kw), or None.
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros (left, right, top, bottom).
        dilation: Vertical and horizontal dilation.
        channels_last: Memory format of the output.

    Returns:
        Output (B, Cout, Hout, Wout).
    """
    if kernel_size[0] * kernel_size[1] == 1:
        patches = pad(x, padding)
        if stride[0] * stride[1] > 1:
            patches = patches[:, :, :: stride[0], :: stride[1]]
    else:
        patches = unfold(pad(x, padding), kernel_size, stride, dilation, position)
    height, width = patches.shape[-2], patches.shape[-1]
    patches = patches.reshape(x.shape[0], weight.shape[2], height * width)
    if channels_last:
        out = torch.matmul(patches.transpose(1, 2), weight.transpose(1, 2))
        return out.view(x.shape[0], height, width, weight.shape[1]).permute(0, 3, 1, 2)
    out = torch.matmul(weight, patches)
    return out.reshape(x.shape[0], weight.shape[1], height, width)


def convolve_by_groups(
    x: Tensor,
    weight: Tensor,
    position: Tensor | None,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
) -> Tensor:
    """As :func:`convolve_by_matmul`, as one grouped convolution: faster where the map is large."""
    batch, out_channels, kh, kw = x.shape[0], weight.shape[1], kernel_size[0], kernel_size[1]
    kernels = weight.view(batch, out_channels, kh, -1, kw).transpose(2, 3)
    if position is not None:
        kernels = kernels * position.view(batch, 1, 1, kh, kw)
    if padding[0] == padding[1] and padding[2] == padding[3]:
        symmetric = (padding[2], padding[0])
    else:
        x, symmetric = pad(x, padding), (0, 0)
    out = F.conv2d(
        x.reshape(1, -1, x.shape[2], x.shape[3]),
        kernels.reshape(batch * out_channels, -1, kh, kw),
        stride=stride,
        padding=symmetric,
        dilation=dilation,
        groups=batch,
    )
    return out.view(batch, out_channels, out.shape[2], out.shape[3])


def dynamic_conv2d(
    x: Tensor,
    bands: Tensor,
    channel: Tensor | None,
    filter: Tensor | None,
    position: Tensor | None,
    local_input: Tensor | None,
    spectrum: Tensor | None,
    bank: Tensor | None,
    local_weight: Tensor | None,
    fbm_weight: Tensor | None,
    fbm_bias: Tensor | None,
    gain_index: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    cutoffs: list[tuple[int, int]],
    mask_grid: int | None,
    by_groups: bool,
    channels_last: bool,
) -> Tensor:
    """FDConv of a batch, given its gates (Eq. 4-10), all of it at once.

    Args:
        x: Input (B, Cin, H, W) in the dtype to convolve in.
        bands: Gain of each frequency group (B, n).
        channel: Input channel gate (B, Cin), or None.
        filter: Filter gate (B, Cout), or None.
        position: Kernel position gate (B, kh*kw), or None.
        local_input: Input of the dense gate (B, Cin), or None.
        spectrum: Parseval-scaled half spectrum (R, C//2+1, 2), or None where a bank is given.
        bank: Weight matrix of each group (n, R, C), to mix instead of transforming the spectrum, or None.
        local_weight: Convolution weight (Cout*kh*kw, 1, t) of the dense gate, or None.
        fbm_weight: FBM's gate convolution (bands, Cin, 3, 3), or None for no FBM.
        fbm_bias: Its bias.
        gain_index: int32 map (R, C//2+1) of :class:`~fdconv_zoo.layers.fdw.FDW`.
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros (left, right, top, bottom).
        dilation: Vertical and horizontal dilation.
        cutoffs: FBM's band limits as fractions.
        mask_grid: FBM's mask grid, or None.
        by_groups: Convolve by a grouped convolution instead of a matrix product.
        channels_last: Memory format of the matrix product's output.

    Returns:
        Output (B, Cout, Hout, Wout), dtype of `x`, without bias.
    """
    kh, kw = kernel_size[0], kernel_size[1]
    batch, rows, columns = x.shape[0], gain_index.shape[0], x.shape[1] * kw
    if bank is not None:
        weight = torch.matmul(bands, bank.flatten(1)).view(batch, rows, columns)
    else:
        assert spectrum is not None
        weight = synthesize(spectrum, bands, gain_index, columns)
    if local_input is not None and local_weight is not None:
        gate = local_logits(local_input.to(weight.dtype), local_weight.to(weight.dtype), kw).sigmoid_()
        weight = weight * gate if torch.is_grad_enabled() else gate.mul_(weight)
    if fbm_weight is not None and fbm_bias is not None:
        x = modulate_bands(x, fbm_weight, fbm_bias, cutoffs, mask_grid)
    if channel is not None:
        x = x * channel.to(x.dtype)[:, :, None, None]
    weight = weight.to(x.dtype).view(batch, rows // kh, kh * columns)
    if position is not None:
        position = position.to(x.dtype)
    if by_groups:
        out = convolve_by_groups(x, weight, position, kernel_size, stride, padding, dilation)
    else:
        out = convolve_by_matmul(x, weight, position, kernel_size, stride, padding, dilation, channels_last)
    if filter is not None:
        # The dense gate's factor of 2 is applied here, where it costs least.
        scale = 2 * filter if local_weight is not None else filter
        out = out * scale.to(x.dtype)[:, :, None, None]
    return out


class _Recompute(torch.autograd.Function):
    """Runs a function chunk by chunk and keeps its inputs only; the backward pass runs each chunk once more."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], chunk: int, num_batched: int, *tensors: Tensor) -> Tensor:
        ctx.function, ctx.chunk, ctx.num_batched = function, chunk, num_batched
        ctx.save_for_backward(*tensors)
        return map_chunks(function, chunk, tensors[:num_batched], tensors[num_batched:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        grads: list[Any] = [None] * len(tensors)
        for start in range(0, len(grad), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            inputs = [
                tensor if tensor is None else (tensor[rows] if i < ctx.num_batched else tensor).detach()
                for i, tensor in enumerate(tensors)
            ]
            wanted = [i for i, need in enumerate(needed) if need]
            for i in wanted:
                inputs[i].requires_grad_()
            with torch.enable_grad(), without_autocast(grad.device.type):
                output = ctx.function(*inputs)
            parts = torch.autograd.grad(output, [inputs[i] for i in wanted], grad[rows])
            for i, part in zip(wanted, parts, strict=True):
                if i < ctx.num_batched:
                    if grads[i] is None:
                        grads[i] = torch.empty_like(tensors[i])
                    grads[i][rows] = part
                else:
                    grads[i] = part if grads[i] is None else grads[i].add_(part)
        return None, None, None, *grads


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of x would have: autocast's where it is on, else that of x."""
    device_type = x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return x.dtype
    return torch.get_autocast_dtype(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Context in which operations keep the dtype of their inputs."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def map_chunks(
    function: Callable[..., Tensor], chunk: int, batched: Sequence[Tensor | None], shared: Sequence[Tensor | None]
) -> Tensor:
    """Applies a function to chunks of the batch and joins the outputs.

    Args:
        function: Takes all tensors in order and returns a tensor with the batch in front.
        chunk: Samples of a chunk.
        batched: Tensors with the batch in front; the first is never None.
        shared: Tensors that every chunk gets whole.

    Returns:
        The joined outputs.
    """
    batch = len(batched[0])
    if batch <= chunk:
        return function(*batched, *shared)
    parts = [
        function(*(t if t is None else t[start : start + chunk] for t in batched), *shared)
        for start in range(0, batch, chunk)
    ]
    return torch.cat(parts)


def run_in_chunks(
    function: Callable[..., Tensor],
    chunk: int,
    batched: Sequence[Tensor | None],
    shared: Sequence[Tensor | None],
    recompute: bool,
) -> Tensor:
    """As :func:`map_chunks`; with `recompute`, nothing but the inputs is kept for the backward pass."""
    if recompute and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*batched, *shared)):
        return _Recompute.apply(function, chunk, len(batched), *batched, *shared)
    return map_chunks(function, chunk, batched, shared)


def chunked_conv2d(
    x: Tensor,
    bands: Tensor,
    channel: Tensor | None,
    filter: Tensor | None,
    position: Tensor | None,
    local_input: Tensor | None,
    spectrum: Tensor,
    local_weight: Tensor | None,
    fbm_weight: Tensor | None,
    fbm_bias: Tensor | None,
    gain_index: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    cutoffs: list[tuple[int, int]],
    mask_grid: int | None,
    channels_last: bool,
    recompute: bool,
) -> Tensor:
    """As :func:`dynamic_conv2d`, choosing by size and device how to make the weights and how to convolve.

    Args:
        recompute: Keep inputs and gates only for the backward pass and make the weights again there.
    """
    function = partial(
        dynamic_conv2d,
        gain_index=gain_index,
        kernel_size=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        cutoffs=cutoffs,
        mask_grid=mask_grid,
        channels_last=channels_last,
    )
    rows, columns = spectrum.shape[0], x.shape[1] * kernel_size[1]
    batch, num_bands = bands.shape
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return function(
            x, bands, channel, filter, position, local_input, spectrum, None, local_weight, fbm_weight, fbm_bias,
            by_groups=False,
        )  # fmt: skip
    on_gpu = x.is_cuda
    chunk = max(1, (GPU_CHUNK if on_gpu else CPU_CHUNK) // (rows * columns))
    if on_gpu:
        by_groups = kernel_size != (1, 1)
    else:
        places = (x.shape[2] // stride[0]) * (x.shape[3] // stride[1])
        by_groups = places >= MATMUL_PLACES and not (channels_last and chunk > 1)
    bank = None
    if batch > num_bands and num_bands * rows * columns <= BANK_LIMIT:
        # The transform is linear: with more samples than groups, transform each group once and mix the results.
        identity = torch.eye(num_bands, device=x.device, dtype=spectrum.dtype)
        bank = synthesize(spectrum, identity, gain_index, columns)
    return run_in_chunks(
        partial(function, by_groups=by_groups),
        chunk,
        (x, bands, channel, filter, position, local_input),
        (spectrum if bank is None else None, bank, local_weight, fbm_weight, fbm_bias),
        recompute,
    )
