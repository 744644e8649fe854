"""The dynamic convolution in eager mode: chunks of samples and a backward pass written by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A sample's weight is as large as the layer, so a batch of weights is never kept: samples pass through in chunks of
bounded size, and the backward pass makes the weights again. Saved for it are the layer's input and its gates. The same
function in traceable form, the reference for this one, is :func:`~fdconv_zoo.layers.functional.dynamic_conv2d`.
torch.compile takes this one as an operator of its own and fuses what is around it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fdw import adjoint_columns, adjoint_rows, refuse_second_derivatives, transform
from .functional import element_gated, pad
from .sample_conv import Geometry, SampleConv
from .sample_weight import SampleWeight

# Weight elements of one chunk. On a CPU the chunk should stay in the cache; on a GPU it should fill the device.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 26
# Largest bank of group weights (num_bands x weight) that is mixed instead of transforming each sample's spectrum.
BANK_LIMIT = 1 << 22
# Below this many output places, reordering a fresh weight for a convolution kernel costs more than a matrix product.
MATMUL_PLACES = 128


class Inputs(NamedTuple):
    """The tensors that a dynamic convolution is a function of, or their gradients.

    Attributes:
        x: Input (B, Cin, H, W) in the dtype to convolve in.
        bands: Gain of each frequency group (B, n).
        element: Position times channel gate (B, kh*Cin*kw), or None.
        scale: Filter gate times the dense gate's factor of 2 (B, Cout), or None.
        local_input: Input of the dense gate (B, Cin), or None.
        spectrum: Parseval-scaled half spectrum (R, C//2+1, 2).
        local_weight: Convolution weight (Cout*kh*kw, 1, t) of the dense gate, or None.
    """

    x: Tensor
    bands: Tensor
    element: Tensor | None
    scale: Tensor | None
    local_input: Tensor | None
    spectrum: Tensor
    local_weight: Tensor | None

    def chunks(self, size: int) -> Iterator["Inputs"]:
        """Inputs of chunks of `size` samples."""
        for start in range(0, len(self.x), size):
            rows = slice(start, start + size)
            batched = (None if tensor is None else tensor[rows] for tensor in self[:5])
            yield Inputs(*batched, self.spectrum, self.local_weight)


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
        gain_index: Tensor,
        kernel_size: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        channels_last: bool,
    ) -> "Plan":
        """Chooses by size; `channels_last` is the memory format of the input."""
        x, (batch, num_bands) = inputs.x, inputs.bands.shape
        elements = gain_index.shape[0] * x.shape[1] * kernel_size[1]
        chunk = max(1, (GPU_CHUNK if x.is_cuda else CPU_CHUNK) // elements)
        if x.is_cuda:
            by_groups = kernel_size != (1, 1)
        else:
            height, width = output_size(x.shape[2:], kernel_size, stride, padding, dilation)
            by_groups = height * width >= MATMUL_PLACES and not (channels_last and chunk > 1)
        use_bank = batch > num_bands and num_bands * elements <= BANK_LIMIT
        return cls(Geometry(kernel_size, stride, padding, dilation, by_groups), chunk, use_bank)


def output_size(
    size: tuple[int, int],
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[int, int]:
    """Height and width of a convolution's output; below 1 where the padded input is smaller than the kernel."""
    return tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    )


def make_bank(spectrum: Tensor, num_bands: int, gain_index: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Weight matrix of each group (n, R, C), and the gains (n, n) that make it."""
    gains = torch.eye(num_bands, device=spectrum.device, dtype=spectrum.dtype)
    return transform(spectrum, gains, gain_index, columns), gains


def forward_pass(
    plan: Plan, gain_index: Tensor, inputs: Inputs, keep: bool = False
) -> tuple[Tensor, list[SampleWeight]]:
    """Convolves each sample with its weight (Eq. 4-7).

    Returns:
        Output (B, Cout, Hout, Wout), and the weights of each chunk if they are to be kept.
    """
    columns = inputs.x.shape[1] * plan.geometry.kernel_size[1]
    bank = None
    if plan.use_bank:
        bank, _ = make_bank(inputs.spectrum, inputs.bands.shape[1], gain_index, columns)
    outputs, weights = [], []
    for part in inputs.chunks(plan.chunk):
        # Without a backward pass, the element gate is applied to one block in the cache at a time.
        weight = SampleWeight.make(
            part.bands, part.local_input, part.spectrum, bank, part.local_weight, gain_index, columns, keep,
            None if keep else part.element,
        )  # fmt: skip
        kernels = weight.gated
        if keep:
            weights.append(weight)
            kernels = element_gated(kernels, part.element)
        out = SampleConv(part.x, plan.geometry).forward(kernels.to(part.x.dtype))
        outputs.append(out if part.scale is None else out.mul_(part.scale.to(out.dtype)[:, :, None, None]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs), weights


def backward_pass(
    plan: Plan,
    gain_index: Tensor,
    inputs: Inputs,
    grad: Tensor,
    weights: list[SampleWeight] | None,
    need_x: bool = True,
    need_spectrum: bool = True,
) -> Inputs:
    """Gradients of :func:`forward_pass`.

    Args:
        plan: That of the forward pass.
        gain_index: That of the forward pass.
        inputs: Those of the forward pass.
        grad: Gradient of the output.
        weights: Weights that the forward pass kept, or None to make them again.
        need_x: Computes the gradient of the input.
        need_spectrum: Computes the gradient of the spectrum.

    Returns:
        Gradients of the inputs, None for those that are None or not needed.
    """
    kw = plan.geometry.kernel_size[1]
    spectrum, local_weight, channels = inputs.spectrum, inputs.local_weight, inputs.x.shape[1]
    bank = grad_bank = grad_filters = None
    if plan.use_bank:
        bank, bank_gains = make_bank(spectrum, inputs.bands.shape[1], gain_index, channels * kw)
        grad_bank = torch.zeros_like(bank) if need_spectrum else None
    grad_spectrum = torch.zeros_like(spectrum) if need_spectrum else None
    if local_weight is not None:
        grad_filters = local_weight.new_zeros(len(gain_index), kw * local_weight.shape[2])
    grads: dict[str, list[Tensor]] = {name: [] for name in Inputs._fields[:5]}
    for i, (part, grad_out) in enumerate(zip(inputs.chunks(plan.chunk), grad.split(plan.chunk), strict=True)):
        if weights is None:
            weight = SampleWeight.make(
                part.bands, part.local_input, spectrum, bank, local_weight, gain_index, channels * kw, keep_gate=True
            )
        else:
            weight = weights[i]
        convolution = SampleConv(part.x, plan.geometry)
        grad_weight = convolution.grad_weight(grad_out, len(gain_index)).to(spectrum.dtype)
        if need_x:
            if part.scale is not None:
                grad_out = grad_out * part.scale.to(grad_out.dtype)[:, :, None, None]
            kernels = element_gated(weight.gated, part.element).to(part.x.dtype)
            grads["x"].append(convolution.grad_input(grad_out, kernels))
        parts = weight.backward(
            grad_weight, part.bands, part.element, part.scale, spectrum, bank, local_weight, gain_index, kw,
            grad_spectrum if bank is None else grad_bank, grad_filters,
        )  # fmt: skip
        for name, value in zip(Inputs._fields[1:5], parts, strict=True):
            if value is not None:
                grads[name].append(value)
    if grad_bank is not None:
        adjoint_rows(adjoint_columns(grad_bank), spectrum, bank_gains, gain_index, grad_spectrum)
    return Inputs(
        *(torch.cat(parts) if parts else None for parts in grads.values()),
        grad_spectrum,
        None if grad_filters is None else grad_filters.view_as(local_weight),
    )


class _DynamicConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, recompute: bool, gain_index: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.plan, ctx.recompute = plan, recompute
        output, weights = forward_pass(plan, gain_index, Inputs(*inputs), keep=not recompute)
        kept = (tensor for weight in weights for tensor in (weight.gated, weight.gate, weight.taps))
        ctx.save_for_backward(gain_index, *inputs, *kept)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives()
        gain_index, *tensors = ctx.saved_tensors
        inputs, kept = Inputs(*tensors[:7]), tensors[7:]
        weights = None if ctx.recompute else [SampleWeight(*kept[i : i + 3]) for i in range(0, len(kept), 3)]
        need_x, need_spectrum = ctx.needs_input_grad[3], ctx.needs_input_grad[8]
        grads = backward_pass(ctx.plan, gain_index, inputs, grad, weights, need_x, need_spectrum)
        return None, None, None, *grads


def eager_conv2d(
    inputs: Inputs,
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
        inputs: The input, its gates and the parameters.
        gain_index: int32 map (R, C//2+1) of :class:`~fdconv_zoo.layers.fdw.FDW`.
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
    if min(height, width) < 1:
        raise ValueError(f"input of {size[0]}, {size[1]} pixels with padding {pads} is less than kernel {kernel_size}")
    if len(inputs.x) == 0:
        return inputs.x.new_zeros(0, gain_index.shape[0] // kernel_size[0], height, width)
    if torch.compiler.is_compiling():
        return torch.ops.fdconv_zoo.conv2d(*inputs, gain_index, kernel_size, stride, pads, dilation, channels_last)
    plan = Plan.make(inputs, gain_index, kernel_size, stride, pads, dilation, channels_last)
    if torch.is_grad_enabled():
        return _DynamicConv.apply(plan, recompute, gain_index, *inputs)
    return forward_pass(plan, gain_index, inputs)[0]
