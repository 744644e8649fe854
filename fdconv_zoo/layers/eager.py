"""The dynamic convolution in eager mode: chunks of samples and a backward pass written by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A sample's weight is as large as the layer, so a batch of weights is never kept: samples pass through in chunks of
bounded size, and the backward pass makes the weights again. Saved for it are the layer's input and its gates. The same
function in traceable form, the reference for this one, is :func:`~fdconv_zoo.layers.functional.dynamic_conv2d`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .fdw import (
    adjoint_columns,
    adjoint_rows,
    refuse_second_derivatives,
    row_blocks,
    synthesize,
    transform_columns,
    transform_rows,
)
from .functional import pad, position_gated, unfold
from .ksm import channel_taps, channel_taps_adjoint

# Weight elements of one chunk. On a CPU the chunk should stay in the cache; on a GPU it should fill the device.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 26
# Largest bank of group weights (num_bands x weight) that is mixed instead of transforming each sample's spectrum.
BANK_LIMIT = 1 << 22
# Below this many output places, reordering a fresh weight for a convolution kernel costs more than a matrix product.
MATMUL_PLACES = 128


@dataclass(frozen=True)
class Plan:
    """How one call computes: the geometry of the convolution, and what fits its size and device.

    Attributes:
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros above and below, and left and right.
        dilation: Vertical and horizontal dilation.
        chunk: Samples of a chunk.
        by_groups: Convolve by one grouped convolution instead of a matrix product.
        recompute: Make the weights again in the backward pass instead of keeping them.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    chunk: int
    by_groups: bool
    recompute: bool

    def chunks(self, batch: int) -> Iterator[slice]:
        """Slices of the batch."""
        return (slice(start, start + self.chunk) for start in range(0, batch, self.chunk))


def take(tensor: Tensor | None, rows: slice) -> Tensor | None:
    """Rows of a tensor that may be missing."""
    return None if tensor is None else tensor[rows]


@dataclass
class _Weight:
    """The weights of a chunk of samples, and what the backward pass needs of the forward pass that made them.

    Attributes:
        gated: FDW's weight matrices (B, R, C) times the dense gate without its factor of 2.
        gate: That gate, or None.
        taps: Its taps (B, kw*t, Cin*kw), or None.
    """

    gated: Tensor
    gate: Tensor | None
    taps: Tensor | None

    @classmethod
    def make(
        cls,
        bands: Tensor,
        local_input: Tensor | None,
        spectrum: Tensor,
        bank: Tensor | None,
        local_weight: Tensor | None,
        gain_index: Tensor,
        columns: int,
        keep_gate: bool,
    ) -> "_Weight":
        """Makes the weights, in blocks of rows; without `keep_gate` they have no backward pass."""
        batch, rows = len(bands), len(gain_index)
        taps = filters = None
        if local_weight is not None:
            taps = channel_taps(local_input, local_weight.shape[2], columns // local_input.shape[1])
            filters = filters_of(local_weight, gain_index, taps)
        if bank is None:
            lines = transform_rows(spectrum, bands, gain_index)
        gated = spectrum.new_empty(batch, rows, columns)
        gate = torch.empty_like(gated) if keep_gate and filters is not None else None
        for block in row_blocks(gated):
            if bank is None:
                plain = transform_columns(lines[:, block], columns)
            else:
                plain = (bands @ bank[:, block].flatten(1)).view(batch, -1, columns)
            if filters is None:
                gated[:, block] = plain
                continue
            part = torch.bmm(filters[:, block], taps).sigmoid_()
            if gate is not None:
                gate[:, block] = part
            torch.mul(part, plain, out=gated[:, block])
        return cls(gated, gate, taps)

    def backward(
        self,
        grad: Tensor,
        bands: Tensor,
        spectrum: Tensor,
        bank: Tensor | None,
        local_weight: Tensor | None,
        gain_index: Tensor,
        kernel_width: int,
        grad_source: Tensor | None,
        grad_filters: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of bands and local input; those of spectrum or bank and of the local weight are added in place.

        Args:
            grad: Gradient of `gated`.
            grad_source: Gradient of the spectrum or the bank to add to, or None.
            grad_filters: Gradient of the local weight to add to, as (R, kw*t), or None.
        """
        grad_taps = filters = None
        if local_weight is not None:
            filters = filters_of(local_weight, gain_index, self.taps)
            grad_taps = torch.zeros_like(self.taps)
        if bank is None:
            lines = spectrum.new_empty(*grad.shape[:2], spectrum.shape[1], dtype=spectrum.dtype.to_complex())
        grad_bands = torch.zeros_like(bands)
        for block in row_blocks(grad):
            part = grad[:, block]
            if filters is not None:
                gate = self.gate[:, block]
                logits = torch.rsub(gate, 1).mul_(self.gated[:, block]).mul_(part)
                grad_filters[block] += torch.bmm(logits, self.taps.mT).sum(0)
                grad_taps += torch.bmm(filters[:, block].mT, logits)
                part = part * gate
            if bank is None:
                lines[:, block] = adjoint_columns(part)
                continue
            flat = part.flatten(1)
            grad_bands += flat @ bank[:, block].flatten(1).mT
            if grad_source is not None:
                grad_source[:, block] += (bands.mT @ flat).view_as(bank[:, block])
        if bank is None:
            grad_bands = adjoint_rows(lines, spectrum, bands, gain_index, grad_source)
        return grad_bands, None if grad_taps is None else channel_taps_adjoint(grad_taps, kernel_width)


def filters_of(local_weight: Tensor, gain_index: Tensor, taps: Tensor) -> Tensor:
    """The dense gate's convolution weight as the left-hand side (B, R, kw*t) of its matrix product."""
    return local_weight.view(1, len(gain_index), -1).expand(len(taps), -1, -1)


class _Convolution:
    """Convolves the samples of a chunk with weights of their own, in the layout of the weight matrix."""

    def __init__(self, x: Tensor, plan: Plan) -> None:
        self.x, self.plan = x, plan
        self.patches = None
        if not plan.by_groups:
            kh, kw = plan.kernel_size
            if (kh, kw) == (1, 1) and plan.padding == (0, 0):
                patches = x[:, :, :: plan.stride[0], :: plan.stride[1]]
            else:
                (top, left) = plan.padding
                patches = unfold(pad(x, (left, left, top, top)), plan.kernel_size, plan.stride, plan.dilation)
            self.size = patches.shape[-2:]
            self.patches = patches.reshape(len(x), -1, patches.shape[-2] * patches.shape[-1])

    def _arguments(self) -> tuple[tuple[int, int], ...]:
        return self.plan.stride, self.plan.padding, self.plan.dilation

    def _kernels(self, weight: Tensor) -> Tensor:
        kh, kw = self.plan.kernel_size
        kernels = weight.view(len(weight), -1, kh, weight.shape[2] // kw, kw).transpose(2, 3)
        return kernels.reshape(-1, *kernels.shape[2:])

    def forward(self, weight: Tensor) -> Tensor:
        """Output (B, Cout, Hout, Wout) for weight matrices (B, R, C)."""
        batch = len(self.x)
        if self.patches is None:
            x = self.x.reshape(1, -1, *self.x.shape[2:])
            out = F.conv2d(x, self._kernels(weight), None, *self._arguments(), groups=batch)
            return out.view(batch, -1, *out.shape[2:])
        return torch.bmm(weight.view(batch, -1, self.patches.shape[1]), self.patches).view(batch, -1, *self.size)

    def grad_weight(self, grad: Tensor, rows: int) -> Tensor:
        """Gradient of the weight matrices (B, R, C), given R and that of the output."""
        batch, (kh, kw) = len(self.x), self.plan.kernel_size
        if self.patches is None:
            shape = (batch * rows // kh, self.x.shape[1], kh, kw)
            kernels = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), self.x.reshape(1, -1, *self.x.shape[2:]),
                grad.new_empty(1).expand(shape), None, *self._arguments(), False, (0, 0), batch, (False, True, False),
            )[1]  # fmt: skip
            return kernels.view(batch, -1, *shape[1:]).transpose(2, 3).reshape(batch, rows, -1)
        return torch.bmm(grad.flatten(2), self.patches.mT).view(batch, rows, -1)

    def grad_input(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the input (B, Cin, H, W), given that of the output."""
        batch = len(self.x)
        if self.patches is None:
            out = torch.ops.aten.convolution_backward(
                grad.reshape(1, -1, *grad.shape[2:]), self.x.reshape(1, -1, *self.x.shape[2:]),
                self._kernels(weight), None, *self._arguments(), False, (0, 0), batch, (True, False, False),
            )[0]  # fmt: skip
            return out.view_as(self.x)
        patches = torch.bmm(weight.view(batch, -1, self.patches.shape[1]).mT, grad.flatten(2))
        return self._fold(patches.view(batch, -1, *self.size))

    def _fold(self, patches: Tensor) -> Tensor:
        """Adjoint of taking patches: sums (B, kh*Cin*kw, Hout, Wout) into (B, Cin, H, W)."""
        plan, (height, width), (kh, kw) = self.plan, self.size, self.plan.kernel_size
        (top, left), channels = plan.padding, self.x.shape[1]
        if (kh, kw) == (1, 1) and plan.stride == (1, 1) and plan.padding == (0, 0):
            return patches
        patches = patches.view(len(patches), kh, channels, kw, height, width)
        shape = (len(patches), channels, self.x.shape[2] + 2 * top, self.x.shape[3] + 2 * left)
        out = patches.new_zeros(shape)
        for i in range(kh):
            rows = slice(i * plan.dilation[0], i * plan.dilation[0] + (height - 1) * plan.stride[0] + 1, plan.stride[0])
            for j in range(kw):
                start = j * plan.dilation[1]
                places = slice(start, start + (width - 1) * plan.stride[1] + 1, plan.stride[1])
                out[:, :, rows, places] += patches[:, i, :, j]
        return out[:, :, top : shape[2] - top, left : shape[3] - left]


class _DynamicConv(torch.autograd.Function):
    """Convolution with FDW's and KSM's weights; `tensors` are those of :func:`eager_conv2d` in its order."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, gain_index: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.plan = plan
        output, weights = convolve_chunks(plan, gain_index, *tensors, keep=not plan.recompute)
        kept = (tensor for weight in weights for tensor in (weight.gated, weight.gate, weight.taps))
        ctx.save_for_backward(gain_index, *tensors, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives()
        plan = ctx.plan
        saved = ctx.saved_tensors
        gain_index, x, bands, channel, filter, position, local_input, spectrum, bank, local_weight = saved[:10]
        need_x, need_source = ctx.needs_input_grad[2], any(ctx.needs_input_grad[8:10])
        kh, kw = plan.kernel_size
        parts: dict[str, list[Tensor]] = {key: [] for key in ("x", "bands", "channel", "filter", "position", "local")}
        grad_source = torch.zeros_like(spectrum if bank is None else bank) if need_source else None
        grad_filters = (
            None if local_weight is None else local_weight.new_zeros(len(gain_index), kw * local_weight.shape[2])
        )
        for chunk, rows in enumerate(plan.chunks(len(x))):
            gated_x = x[rows] if channel is None else x[rows] * channel[rows].to(x.dtype)[:, :, None, None]
            if plan.recompute:
                weight = _Weight.make(
                    bands[rows], take(local_input, rows), spectrum, bank, local_weight, gain_index, x.shape[1] * kw,
                    keep_gate=True,
                )  # fmt: skip
            else:
                weight = _Weight(*saved[10 + 3 * chunk : 13 + 3 * chunk])
            batch, convolution = len(gated_x), _Convolution(gated_x, plan)
            grad_out = grad[rows]
            # With respect to the gated weight before the position and filter gates, so that neither is divided by.
            grad_weight = convolution.grad_weight(grad_out, weight.gated.shape[1]).to(weight.gated.dtype)
            scale = output_scale(take(filter, rows), local_weight)
            if scale is not None:
                sums = (grad_weight * weight.gated).view(batch, -1, kh, x.shape[1], kw).sum(3)
                if position is not None:
                    gates = position[rows].view(batch, 1, kh, kw)
                    parts["position"].append((sums * scale[:, :, None, None]).sum(1).flatten(1))
                    sums = sums * gates
                    elements = (scale[:, :, None, None] * gates)[:, :, :, None]
                    grad_weight.view(batch, -1, kh, x.shape[1], kw).mul_(elements)
                else:
                    grad_weight.view(batch, scale.shape[1], -1).mul_(scale[:, :, None])
                parts["filter"].append(sums.sum((2, 3)) * (1 if local_weight is None else 2))
                grad_out = grad_out * scale.to(x.dtype)[:, :, None, None]
            if need_x or channel is not None:
                kernels = position_gated(weight.gated, take(position, rows), plan.kernel_size).to(x.dtype)
                grad_x = convolution.grad_input(grad_out, kernels)
                if channel is not None:
                    parts["channel"].append((grad_x * x[rows]).sum((2, 3), dtype=channel.dtype))
                    grad_x = grad_x * channel[rows].to(x.dtype)[:, :, None, None]
                parts["x"].append(grad_x)
            grad_bands, local = weight.backward(
                grad_weight, bands[rows], spectrum, bank, local_weight, gain_index, kw, grad_source, grad_filters
            )
            parts["bands"].append(grad_bands)
            if local is not None:
                parts["local"].append(local)
        joined = {key: torch.cat(value) if value else None for key, value in parts.items()}
        return (
            None, None, joined["x"] if need_x else None, joined["bands"], joined["channel"], joined["filter"],
            joined["position"], joined["local"], grad_source if bank is None else None,
            None if bank is None else grad_source, None if grad_filters is None else grad_filters.view_as(local_weight),
        )  # fmt: skip


def output_scale(filter: Tensor | None, local_weight: Tensor | None) -> Tensor | None:
    """Filter gate (B, Cout) times the dense gate's factor of 2, which costs least on the output."""
    return filter if filter is None or local_weight is None else 2 * filter


def convolve_chunks(
    plan: Plan,
    gain_index: Tensor,
    x: Tensor,
    bands: Tensor,
    channel: Tensor | None,
    filter: Tensor | None,
    position: Tensor | None,
    local_input: Tensor | None,
    spectrum: Tensor,
    bank: Tensor | None,
    local_weight: Tensor | None,
    keep: bool = False,
) -> tuple[Tensor, list[_Weight]]:
    """Output of :func:`eager_conv2d` without autograd, and the weights of each chunk if they are to be kept."""
    outputs, weights = [], []
    for rows in plan.chunks(len(x)):
        weight = _Weight.make(
            bands[rows], take(local_input, rows), spectrum, bank, local_weight, gain_index,
            x.shape[1] * plan.kernel_size[1], keep_gate=keep,
        )  # fmt: skip
        if keep:
            weights.append(weight)
        inputs = x[rows] if channel is None else x[rows] * channel[rows].to(x.dtype)[:, :, None, None]
        kernels = position_gated(weight.gated, take(position, rows), plan.kernel_size).to(x.dtype)
        out = _Convolution(inputs, plan).forward(kernels)
        scale = output_scale(take(filter, rows), local_weight)
        outputs.append(out if scale is None else out.mul_(scale.to(out.dtype)[:, :, None, None]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), weights


def eager_conv2d(
    x: Tensor,
    bands: Tensor,
    channel: Tensor | None,
    filter: Tensor | None,
    position: Tensor | None,
    local_input: Tensor | None,
    spectrum: Tensor,
    local_weight: Tensor | None,
    gain_index: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    channels_last: bool,
    recompute: bool,
) -> Tensor:
    """Convolves each sample with the weight that FDW and KSM make for it (Eq. 4-7), without bias.

    Args:
        x: Input (B, Cin, H, W) in the dtype to convolve in.
        bands: Gain of each frequency group (B, n).
        channel: Input channel gate (B, Cin), or None.
        filter: Filter gate (B, Cout), or None.
        position: Kernel position gate (B, kh*kw), or None.
        local_input: Input of the dense gate (B, Cin), or None.
        spectrum: Parseval-scaled half spectrum (R, C//2+1, 2).
        local_weight: Convolution weight (Cout*kh*kw, 1, t) of the dense gate, or None.
        gain_index: int32 map (R, C//2+1) of :class:`~fdconv_zoo.layers.fdw.FDW`.
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros (left, right, top, bottom).
        dilation: Vertical and horizontal dilation.
        channels_last: Memory format of `x`.
        recompute: Make the weights again in the backward pass instead of keeping them.

    Returns:
        Output (B, Cout, Hout, Wout), dtype of `x`.

    Raises:
        ValueError: If the padded input is smaller than the kernel.
    """
    size = x.shape[2:]
    spans = (padding[2] + padding[3], padding[0] + padding[1])
    height, width = (
        (n + span - d * (k - 1) - 1) // s + 1
        for n, span, d, k, s in zip(size, spans, dilation, kernel_size, stride, strict=True)
    )
    if min(height, width) < 1:
        raise ValueError(f"input of {size[0]}, {size[1]} pixels and padding {spans} are less than kernel {kernel_size}")
    if len(x) == 0:
        return x.new_zeros(0, gain_index.shape[0] // kernel_size[0], height, width)
    if padding[0] != padding[1] or padding[2] != padding[3]:
        x, padding = pad(x, padding), (0, 0, 0, 0)
    elements, columns = gain_index.shape[0] * x.shape[1] * kernel_size[1], x.shape[1] * kernel_size[1]
    chunk = max(1, (GPU_CHUNK if x.is_cuda else CPU_CHUNK) // elements)
    if x.is_cuda:
        by_groups = kernel_size != (1, 1)
    else:
        by_groups = height * width >= MATMUL_PLACES and not (channels_last and chunk > 1)
    plan = Plan(kernel_size, stride, (padding[2], padding[0]), dilation, chunk, by_groups, recompute)
    batch, num_bands = bands.shape
    bank = None
    if batch > num_bands and num_bands * elements <= BANK_LIMIT:
        # The transform is linear: with more samples than groups, transform each group once and mix the results.
        identity = torch.eye(num_bands, device=x.device, dtype=spectrum.dtype)
        bank = synthesize(spectrum, identity, gain_index, columns)
    tensors = (x, bands, channel, filter, position, local_input, spectrum, bank, local_weight)
    if torch.is_grad_enabled():
        return _DynamicConv.apply(plan, gain_index, *tensors)
    return convolve_chunks(plan, gain_index, *tensors)[0]
