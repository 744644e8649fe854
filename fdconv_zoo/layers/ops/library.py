"""The convolution as an operator: arguments, implementations by device, fake implementation and autograd.

Eager mode and torch.compile call the same one; the dispatcher chooses the implementation by device. A sample's weight
is as large as the layer, so what is saved for the backward pass is the layer's input, its gates and its spectrum alone,
unless the weights are to be kept.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fourier import GainMap
from . import traced, transforms, triton
from .eager import conv, limits
from .eager.weight import Made
from .types import Gates, Geometry, Gradients, Inputs, Limits, Spectrum


class Call(NamedTuple):
    """Arguments of the convolution's operator, as flat as the dispatcher wants them; those of :class:`Inputs` first."""

    x: Tensor
    bands: Tensor
    channels: Tensor | None
    filters: Tensor | None
    positions: Tensor | None
    local_input: Tensor | None
    local_weight: Tensor | None
    coefficients: Tensor
    gain_index: Tensor
    gain_tiles: Tensor
    bank: Tensor | None
    bias: Tensor | None
    bank_version: int
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    channels_last: bool
    keep: bool
    fused: bool

    @property
    def inputs(self) -> Inputs:
        """The tensors by name, the spectrum in the precision of the transforms, with a bank if that is still true."""
        gates = Gates(
            bands=self.bands,
            channels=self.channels,
            filters=self.filters,
            positions=self.positions,
            local_input=self.local_input,
            local_weight=self.local_weight,
        )
        is_current = self.bank_version == -1 or self.bank_version == self.coefficients._version
        spectrum = Spectrum(
            self.coefficients.to(self.bands.dtype),
            GainMap(self.gain_index, self.gain_tiles),
            self.bank if is_current else None,
        )
        return Inputs(self.x, gates, spectrum)

    @property
    def geometry(self) -> Geometry:
        # As Geometry.of makes it, without its call in each layer's pass.
        return Geometry(tuple(self.kernel_size), tuple(self.stride), tuple(self.padding), tuple(self.dilation))

    @property
    def memory_format(self) -> torch.memory_format:
        """That of the output and of the input's gradient."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def by_triton(self) -> bool:
        """Whether the kernels of a GPU compute."""
        return self.fused and triton.is_supported(self.x, self.bands.dtype)

    @property
    def output_shape(self) -> tuple[int, ...]:
        size = self.geometry.checked_output_size(self.x.shape[2], self.x.shape[3])
        return self.x.shape[0], self.coefficients.shape[0] // self.kernel_size[0], *size


TENSORS = tuple(name for name, kind in Call.__annotations__.items() if kind in (Tensor, Tensor | None))
# The gain map has no gradient.
DIFFERENTIABLE = tuple(name for name in TENSORS if not name.startswith("gain_"))
# A bank pays where it takes fewer transforms: n for its making, n for its gradient, against one for each sample, one
# more for making the weights again and one for their gradient.
TRANSFORMS_OF_BANK, TRANSFORMS_OF_SAMPLE = 2, 3


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which operations keep the dtype of their inputs."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def pad_alike(x: Tensor, geometry: Geometry) -> tuple[Tensor, Geometry]:
    """The map and a geometry that pads both sides alike, which is all that grouped convolutions do."""
    left, right, top, bottom = geometry.padding
    if left == right and top == bottom:
        return x, geometry
    return F.pad(x, geometry.padding), geometry._replace(padding=(0, 0, 0, 0))


def dynamic_conv2d(
    inputs: Inputs, geometry: Geometry, bias: Tensor | None, channels_last: bool, recompute: bool, fused: bool
) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.dynamic_conv2d` by its operator."""
    x, geometry = pad_alike(inputs.x, geometry)
    inputs = inputs._replace(x=x)
    gates, spectrum = inputs.gates, inputs.spectrum
    if x.numel() == 0:
        # Nothing to convolve, but still a function of all parameters, as nn.Conv2d's output is: DDP waits for each.
        size = (max(side, 0) for side in geometry.output_size(x.shape[2], x.shape[3]))
        out = x.new_zeros(len(x), len(spectrum.coefficients) // geometry.kernel_size[0], *size)
        if out.numel():
            raise ValueError(f"input of shape {list(x.shape)}: there is nothing to convolve but padding")
        parts = (x, spectrum.coefficients, bias, *gates)
        return out + sum(part.sum().to(x.dtype) for part in parts if part is not None)
    with without_autocast(x):
        if spectrum.bank is not None and spectrum.bank.dtype != x.dtype:
            spectrum = spectrum._replace(bank=None, bank_version=-1)
        if fused and spectrum.bank is None and wants_bank(inputs, geometry):
            spectrum = with_bank(inputs, geometry)
        tensors = (x, *gates, spectrum.coefficients, spectrum.bank, bias)
        is_trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        call = Call(
            x=x,
            **gates._asdict(),
            coefficients=spectrum.coefficients,
            gain_index=spectrum.gain_map.index,
            gain_tiles=spectrum.gain_map.tiles,
            bank=spectrum.bank,
            bias=bias,
            bank_version=spectrum.bank_version,
            **geometry._asdict(),
            channels_last=channels_last,
            keep=is_trained and not recompute,
            fused=fused,
        )
        return torch.ops.fdconv_zoo.dynamic_conv2d.default(*call)[0]


def wants_bank(inputs: Inputs, geometry: Geometry) -> bool:
    """Whether a bank takes fewer transforms than the samples would, on a device that mixes it, and fits there."""
    x, gates, spectrum = inputs
    batch, num_bands = gates.bands.shape
    if x.device.type != triton.DEVICE or not triton.is_supported(x, gates.bands.dtype):
        return False
    is_trained = torch.is_grad_enabled() and (gates.bands.requires_grad or spectrum.coefficients.requires_grad)
    if is_trained:
        pays = batch * TRANSFORMS_OF_SAMPLE >= num_bands * TRANSFORMS_OF_BANK
    else:
        pays = batch >= num_bands
    elements = num_bands * len(spectrum.coefficients) * x.shape[1] * geometry.kernel_size[1]
    return pays and triton.bank_fits(elements, x.dtype, x.device)


def with_bank(inputs: Inputs, geometry: Geometry) -> Spectrum:
    """The spectrum with its bank, through which its gradient then flows."""
    x, gates, spectrum = inputs
    kernel_size, num_bands = geometry.kernel_size, gates.bands.shape[1]
    bank = torch.ops.fdconv_zoo.bank.default(
        spectrum.coefficients, *spectrum.gain_map, num_bands, columns=x.shape[1] * kernel_size[1],
        kernel_size=kernel_size, dtype=x.dtype,
    )  # fmt: skip
    return spectrum._replace(coefficients=spectrum.coefficients.detach(), bank=bank)


def conv2d_by(device_limits: Limits, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the weights and their dense gate for the backward pass: empty where they are not kept."""
    output, kept = conv.forward(call.inputs, call.geometry, device_limits, call.channels_last, call.keep)
    if call.bias is not None:
        output.add_(call.bias.to(output.dtype)[:, None, None])
    if kept is None:
        return output, call.x.new_empty(0), call.x.new_empty(0)
    return output, kept.gated, call.x.new_empty(0) if kept.gate is None else kept.gate


def conv2d_backward_by(
    device_limits: Limits, grad: Tensor, kept: tuple[Tensor, Tensor], needs: list[bool], call: Call
) -> list[Tensor]:
    """Gradients of what is needed of `DIFFERENTIABLE`, given that of the output and what the forward pass kept."""
    gated, gate = kept
    need = dict(zip(DIFFERENTIABLE, needs, strict=True))
    grads = conv.backward(
        call.inputs,
        call.geometry,
        device_limits,
        grad,
        Made(gated, None if call.local_weight is None else gate) if call.keep else None,
        channels_last=call.channels_last,
        need_x=need["x"],
        need_spectrum=need["coefficients"],
    )
    return needed_gradients(grads, grad, needs, call)


def needed_gradients(grads: Gradients, grad: Tensor, needs: list[bool], call: Call) -> list[Tensor]:
    """What is needed of the gradients, and of that of the bias, as the operator returns it."""
    grad_bias = grad.sum((0, 2, 3), dtype=call.bands.dtype) if needs[DIFFERENTIABLE.index("bias")] else None
    values = (grads.x, *grads.gates, grads.coefficients, grads.bank, grad_bias)
    return [
        value.to(getattr(call, name).dtype).contiguous(memory_format=format_of(value, call))
        for name, value, needed in zip(DIFFERENTIABLE, values, needs, strict=True)
        if needed
    ]


def format_of(tensor: Tensor, call: Call) -> torch.memory_format:
    """Memory format of a tensor's gradient."""
    return call.memory_format if tensor.dim() == 4 else torch.contiguous_format


def conv2d_on_cpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution on a CPU."""
    limits.keep_freed_memory()
    return conv2d_by(limits.CPU, Call(*arguments))


def conv2d_elsewhere(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution on a device without an implementation of its own."""
    return conv2d_by(limits.OTHER, Call(*arguments))


def conv2d_on_gpu(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution by Triton's kernels, where they are there for it."""
    call = Call(*arguments)
    if not call.by_triton:
        return conv2d_by(limits.OTHER, call)
    from .triton import conv as triton_conv

    output, weights = triton_conv.forward(call.inputs, call.geometry, call.bias, call.channels_last, call.keep)
    return output, call.x.new_empty(0) if weights is None else weights, call.x.new_empty(0)


def conv2d_backward_on_cpu(
    grad: Tensor, gated: Tensor, gate: Tensor, needs: list[bool], *arguments: Any
) -> list[Tensor]:
    """The backward pass on a CPU."""
    return conv2d_backward_by(limits.CPU, grad, (gated, gate), needs, Call(*arguments))


def conv2d_backward_elsewhere(
    grad: Tensor, gated: Tensor, gate: Tensor, needs: list[bool], *arguments: Any
) -> list[Tensor]:
    """The backward pass on a device without an implementation of its own."""
    return conv2d_backward_by(limits.OTHER, grad, (gated, gate), needs, Call(*arguments))


def conv2d_backward_on_gpu(
    grad: Tensor, gated: Tensor, gate: Tensor, needs: list[bool], *arguments: Any
) -> list[Tensor]:
    """The backward pass by Triton's kernels, where they are there for it."""
    call = Call(*arguments)
    if not call.by_triton:
        return conv2d_backward_by(limits.OTHER, grad, (gated, gate), needs, call)
    from .triton import conv as triton_conv

    inputs, need = call.inputs, dict(zip(DIFFERENTIABLE, needs, strict=True))
    grads = triton_conv.backward(
        inputs,
        call.geometry,
        grad,
        gated if call.keep else None,
        channels_last=call.channels_last,
        need_x=need["x"],
        need_spectrum=need["coefficients"] if inputs.spectrum.bank is None else need["bank"],
    )
    return needed_gradients(grads, grad, needs, call)


def conv2d_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors in the shapes and memory formats of :func:`conv2d_by`."""
    call = Call(*arguments)
    output = torch.empty(call.output_shape, dtype=call.x.dtype, device=call.x.device, memory_format=call.memory_format)
    gated, gate = call.x.new_empty(0), call.x.new_empty(0)
    if call.keep:
        rows, columns = call.coefficients.shape[0], call.x.shape[1] * call.kernel_size[1]
        if call.by_triton:
            filters, positions = rows // call.kernel_size[0], math.prod(call.kernel_size)
            return output, call.x.new_empty(call.x.shape[0], filters, positions, call.x.shape[1]), gate
        gated = call.bands.new_empty(call.x.shape[0], rows, columns)
        if call.local_weight is not None:
            gate = torch.empty_like(gated)
    return output, gated, gate


def conv2d_backward_fake(grad: Tensor, gated: Tensor, gate: Tensor, needs: list[bool], *arguments: Any) -> list[Tensor]:
    """Empty tensors in the shapes and memory formats of :func:`conv2d_backward_by`."""
    call = Call(*arguments)
    inputs = (getattr(call, name) for name, needed in zip(DIFFERENTIABLE, needs, strict=True) if needed)
    return [torch.empty_like(value, memory_format=format_of(value, call)) for value in inputs]


def conv2d_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    """Keeps the inputs and what the forward pass made for the backward pass."""
    call, (_, gated, gate) = Call(*inputs), output
    ctx.save_for_backward(*(getattr(call, name) for name in TENSORS), gated, gate)
    ctx.without_tensors = call._replace(**dict.fromkeys(TENSORS))
    ctx.mark_non_differentiable(gated, gate)
    ctx.set_materialize_grads(False)


def conv2d_backward(ctx: Any, grad: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    found: dict[str, Tensor] = {}
    if grad is not None:
        *tensors, gated, gate = ctx.saved_tensors
        call = ctx.without_tensors._replace(**dict(zip(TENSORS, tensors, strict=True)))
        wanted = Call(*ctx.needs_input_grad)
        needs = [getattr(wanted, name) for name in DIFFERENTIABLE]
        names = [name for name, needed in zip(DIFFERENTIABLE, needs, strict=True) if needed]

        def plain(*values: Tensor) -> Tensor:
            changed = call._replace(**dict(zip(names, values, strict=True)))
            out = traced.dynamic_conv2d(changed.inputs, changed.geometry)
            return out if changed.bias is None else out + changed.bias.to(out.dtype)[:, None, None]

        with without_autocast(grad):
            if transforms.needs_plain_gradients(grad):
                grads = transforms.gradients(plain, [getattr(call, name) for name in names], grad)
            else:
                grads = torch.ops.fdconv_zoo.dynamic_conv2d_backward.default(grad, gated, gate, needs, *call)
        found = dict(zip(names, grads, strict=True))
    return tuple(found.get(name) for name in Call._fields)
