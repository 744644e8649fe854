"""The dynamic convolution in eager mode: chunks of samples and a backward pass written by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A sample's weight is as large as the layer, so a batch of weights is never kept: samples pass through in chunks of
bounded size, and the backward pass makes the weights again. Saved for it are the layer's input and its gates. The same
function in traceable form, the reference for this one, is :func:`~fdconv_zoo.layers.functional.dynamic_conv2d`.
torch.compile takes this one as an operator of its own and fuses what is around it.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fdw import GainMap
from .functional import element_gated, pad, without_autocast
from .sample_conv import Geometry, SampleConv, output_size
from .sample_weight import Inputs, SampleWeight
from .transform import Transform

# Weight elements of one chunk. On a CPU the chunk should stay in the cache (L3), yet share Python's time among samples;
# on a GPU it should fill the device.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 26
# Largest bank of group weights (num_bands x weight) that is mixed instead of transforming each sample's spectrum.
BANK_LIMIT = 1 << 22
# Below this many output places, a matrix product costs less than a convolution of weights that are new every time.
MATMUL_PLACES = 1024

NO_SECOND_DERIVATIVES = (
    "FDConv has no second derivatives in eager mode and under torch.compile (create_graph=True); its traceable forms "
    "have: fdconv_zoo.layers.functional.dynamic_conv2d and, for FBM, fdconv_zoo.layers.fbm.modulate_bands"
)

# glibc gives a freed block back to the system where it is larger than the largest one freed before, 32 MiB at most, and
# the next weight is then made of fresh pages: a quarter of the time of a ResNet-50 on a CPU. This one is never touched.
torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


class Plan(NamedTuple):
    """How one call computes, by its size and device.

    Attributes:
        geometry: Geometry of the convolution.
        chunk: Samples of a chunk.
        use_bank: With more samples than groups, transform each group once and mix the results: it is linear.
    """

    geometry: Geometry
    chunk: int
    use_bank: bool

    @classmethod
    def make(
        cls,
        inputs: Inputs,
        gain_map: GainMap,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        channels_last: bool,
    ) -> "Plan":
        """Chooses by size; `channels_last` is the memory format of the input."""
        x, (batch, num_bands) = inputs.x, inputs.bands.shape
        rows = len(gain_map.index)
        elements = rows * x.shape[1] * kernel_size[1]
        chunk = max(1, (GPU_CHUNK if x.is_cuda else CPU_CHUNK) // elements)
        chunk = math.ceil(batch / math.ceil(batch / chunk))  # chunks of one size
        places = math.prod(output_size(x.shape[2:], kernel_size, stride, padding, dilation))
        by_groups = kernel_size != (1, 1) and (x.is_cuda or places >= MATMUL_PLACES)
        gate_input = not by_groups and x.dtype == inputs.spectrum.dtype and places * kernel_size[0] <= rows
        use_bank = batch > num_bands and num_bands * elements <= BANK_LIMIT
        geometry = Geometry(kernel_size, stride, padding, dilation, by_groups, gate_input, channels_last)
        return cls(geometry, chunk, use_bank)


def memory_format(channels_last: bool) -> torch.memory_format:
    """Memory format of outputs and of the input's gradient: that of the input."""
    return torch.channels_last if channels_last else torch.contiguous_format


def bank_gains(inputs: Inputs) -> Tensor:
    """Gains (n, n) that pick one frequency group each."""
    return torch.eye(inputs.bands.shape[1], device=inputs.spectrum.device, dtype=inputs.spectrum.dtype)


def join(parts: list[Tensor]) -> Tensor:
    """Joins chunks of a batch, without a copy where there is one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def forward_pass(
    plan: Plan, gain_map: GainMap, inputs: Inputs, keep: bool = False
) -> tuple[Tensor, list[SampleWeight]]:
    """Convolves each sample with its weight (Eq. 4-7).

    Returns:
        Output (B, Cout, Hout, Wout), and the weights of each chunk if they are to be kept.
    """
    columns, geometry = inputs.x.shape[1] * plan.geometry.kernel_size[1], plan.geometry
    transform = Transform(inputs.spectrum, gain_map, columns)
    bank = transform(bank_gains(inputs)) if plan.use_bank else None
    size = output_size(inputs.x.shape[2:], geometry.kernel_size, geometry.stride, geometry.padding, geometry.dilation)
    output = torch.empty(
        (len(inputs.x), len(gain_map.index) // geometry.kernel_size[0], *size), dtype=inputs.x.dtype,
        device=inputs.x.device, memory_format=memory_format(geometry.channels_last),
    )  # fmt: skip
    weights = []
    for part, out in zip(inputs.chunks(plan.chunk), output.split(plan.chunk), strict=True):
        weight = SampleWeight.make(part, transform, bank, keep)
        kernels = weight.gated
        if keep:
            weights.append(weight)
        if not geometry.gate_input:
            kernels = element_gated(kernels, part.element)
        scale = None if part.scale is None else part.scale.to(out.dtype)
        SampleConv(part.x, part.element, geometry).forward(kernels.to(out.dtype), scale, out)
    return output, weights


def backward_pass(
    plan: Plan,
    gain_map: GainMap,
    inputs: Inputs,
    grad: Tensor,
    weights: list[SampleWeight] | None,
    need_x: bool = True,
    need_spectrum: bool = True,
) -> Inputs:
    """Gradients of :func:`forward_pass`.

    Args:
        plan: That of the forward pass.
        gain_map: That of the forward pass.
        inputs: Those of the forward pass.
        grad: Gradient of the output.
        weights: Weights that the forward pass kept, or None to make them again.
        need_x: Computes the gradient of the input.
        need_spectrum: Computes the gradient of the spectrum.

    Returns:
        Gradients of the inputs, None for those that are None or not needed.
    """
    kw = plan.geometry.kernel_size[1]
    spectrum, local_weight, columns = inputs.spectrum, inputs.local_weight, inputs.x.shape[1] * kw
    transform = Transform(spectrum, gain_map, columns)
    bank = transform(bank_gains(inputs)) if plan.use_bank else None
    grad_spectrum = torch.zeros_like(spectrum) if need_spectrum else None
    grad_bank = torch.zeros_like(bank) if need_spectrum and bank is not None else None
    grad_filters = None
    if local_weight is not None:
        grad_filters = local_weight.new_zeros(len(gain_map.index), kw * local_weight.shape[2])
    grads: dict[str, list[Tensor]] = {name: [] for name in Inputs._fields[:5]}
    for i, (part, grad_out) in enumerate(zip(inputs.chunks(plan.chunk), grad.split(plan.chunk), strict=True)):
        weight = weights[i] if weights else SampleWeight.make(part, transform, bank, keep=True)
        convolution = SampleConv(part.x, part.element, plan.geometry)
        grad_weight = convolution.grad_weight(grad_out, len(gain_map.index)).to(spectrum.dtype)
        grad_element = None
        if need_x or plan.geometry.gate_input:
            if part.scale is not None:
                grad_out = grad_out * part.scale.to(grad_out.dtype)[:, :, None, None]
            kernels = weight.gated if plan.geometry.gate_input else element_gated(weight.gated, part.element)
            grad_x, grad_element = convolution.grad_input(grad_out, kernels.to(part.x.dtype))
            grads["x"].append(grad_x)
        grad_source = grad_spectrum if bank is None else grad_bank
        parts = weight.backward(grad_weight, grad_element, part, transform, bank, kw, grad_source, grad_filters)
        for name, value in zip(Inputs._fields[1:5], parts, strict=True):
            if value is not None:
                grads[name].append(value)
    if grad_bank is not None:
        transform.adjoint(grad_bank, bank_gains(inputs), grad_spectrum)
    return Inputs(
        *(join(parts) if parts else None for parts in grads.values()),
        grad_spectrum,
        None if grad_filters is None else grad_filters.view_as(local_weight),
    )


class _DynamicConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, recompute: bool, index: Tensor, tiles: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.plan, ctx.recompute = plan, recompute
        output, weights = forward_pass(plan, GainMap(index, tiles), Inputs(*inputs), keep=not recompute)
        kept = (tensor for weight in weights for tensor in (weight.gated, weight.gate, weight.taps))
        ctx.save_for_backward(index, tiles, *inputs, *kept)
        # A view made here could not be changed in place by what follows, such as ReLU(inplace=True).
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVES)
        index, tiles, *tensors = ctx.saved_tensors
        inputs, kept = Inputs(*tensors[:7]), tensors[7:]
        weights = None if ctx.recompute else [SampleWeight(*kept[i : i + 3]) for i in range(0, len(kept), 3)]
        need_x, need_spectrum = ctx.needs_input_grad[4], ctx.needs_input_grad[9]
        with without_autocast(grad.device.type):
            grads = backward_pass(ctx.plan, GainMap(index, tiles), inputs, grad, weights, need_x, need_spectrum)
        return None, None, None, None, *grads


def eager_conv2d(
    inputs: Inputs,
    gain_map: GainMap,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    channels_last: bool,
    recompute: bool,
) -> Tensor:
    """Convolves each sample with the weight that FDW and KSM make for it (Eq. 4-7), without bias.

    Args:
        inputs: The input, its gates and the parameters.
        gain_map: Which gain each coefficient takes.
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros (left, right, top, bottom).
        dilation: Vertical and horizontal dilation.
        channels_last: Memory format of the input.
        recompute: Make the weights again in the backward pass instead of keeping them.

    Returns:
        Output (B, Cout, Hout, Wout), dtype of the input.

    Raises:
        ValueError: If the padded input is smaller than the kernel.
    """
    if padding[0] != padding[1] or padding[2] != padding[3]:
        inputs, padding = inputs._replace(x=pad(inputs.x, padding)), (0, 0, 0, 0)
    pads = (padding[2], padding[0])
    size = tuple(inputs.x.shape[2:])
    height, width = output_size(size, kernel_size, stride, pads, dilation)
    if inputs.x.numel() == 0:
        # Nothing to convolve, but still a function of the input and the weight, as nn.Conv2d's output is.
        nothing = inputs.x.sum() + inputs.spectrum.sum().to(inputs.x.dtype)
        shape = (len(inputs.x), gain_map.index.shape[0] // kernel_size[0], max(height, 0), max(width, 0))
        return nothing + inputs.x.new_zeros(shape)
    if min(height, width) < 1:
        raise ValueError(f"input of {size[0]}, {size[1]} pixels with padding {pads} is less than kernel {kernel_size}")
    if torch.compiler.is_compiling():
        return torch.ops.fdconv_zoo.conv2d(*inputs, *gain_map, kernel_size, stride, pads, dilation, channels_last)
    plan = Plan.make(inputs, gain_map, kernel_size, stride, pads, dilation, channels_last)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs):
        return _DynamicConv.apply(plan, recompute, *gain_map, *inputs)
    return forward_pass(plan, gain_map, inputs)[0]
