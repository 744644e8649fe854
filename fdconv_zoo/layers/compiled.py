"""The eager convolution and FBM as operators of torch.compile, which fuses what is around them.

Inductor has no kernels for complex numbers, and unrolling samples and bands would make graphs that take minutes to
compile.
"""

import torch
from torch import Tensor

from . import eager_fbm
from .eager import NO_SECOND_DERIVATIVES, Inputs, Plan, backward_pass, forward_pass, memory_format
from .fdw import GainMap
from .sample_conv import output_size

INPUTS = (
    "Tensor x, Tensor bands, Tensor? element, Tensor? scale, Tensor? local_input, Tensor spectrum, "
    "Tensor? local_weight, Tensor gain_index, Tensor gain_tiles"
)
GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation, bool channels_last"


def make_plan(inputs: Inputs, gain_map: GainMap, geometry: tuple[list[int], ...], channels_last: bool) -> Plan:
    """Plan for geometry that the dispatcher hands over as lists."""
    return Plan.make(inputs, gain_map, *(tuple(pair) for pair in geometry), channels_last)


def conv2d(*arguments: object) -> Tensor:
    """:func:`~fdconv_zoo.layers.eager.forward_pass`."""
    inputs, gain_map, geometry, channels_last = split(arguments)
    return forward_pass(make_plan(inputs, gain_map, geometry, channels_last), gain_map, inputs)[0]


def fake_conv2d(*arguments: object) -> Tensor:
    """Empty tensor in the shape and memory format of the output."""
    inputs, gain_map, geometry, channels_last = split(arguments)
    size = output_size(inputs.x.shape[2:], *geometry)
    shape = (inputs.x.shape[0], gain_map.index.shape[0] // geometry[0][0], *size)
    return torch.empty(shape, dtype=inputs.x.dtype, device=inputs.x.device, memory_format=memory_format(channels_last))


def conv2d_backward(grad: Tensor, *arguments: object) -> list[Tensor]:
    """:func:`~fdconv_zoo.layers.eager.backward_pass`, for the inputs that are not None."""
    inputs, gain_map, geometry, channels_last = split(arguments)
    plan = make_plan(inputs, gain_map, geometry, channels_last)
    grads = backward_pass(plan, gain_map, inputs, grad, None)
    return [
        value.contiguous(memory_format=memory_format(channels_last and value.dim() == 4))
        for value in grads
        if value is not None
    ]


def fake_conv2d_backward(grad: Tensor, *arguments: object) -> list[Tensor]:
    """Empty tensors in the shapes and memory formats of the gradients."""
    inputs, _, _, channels_last = split(arguments)
    return [
        torch.empty_like(value, memory_format=memory_format(channels_last and value.dim() == 4))
        for value in inputs
        if value is not None
    ]


def split(arguments: tuple[object, ...]) -> tuple[Inputs, GainMap, tuple[list[int], ...], bool]:
    """Arguments of the operators: inputs, gain_map, geometry, channels_last."""
    return Inputs(*arguments[:7]), GainMap(*arguments[7:9]), arguments[9:13], arguments[13]


def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor) -> None:
    """Keeps the inputs."""
    ctx.save_for_backward(*inputs[:9])
    ctx.arguments = inputs[9:]


def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    saved = ctx.saved_tensors
    grads = iter(torch.ops.fdconv_zoo.conv2d_backward(grad, *saved, *ctx.arguments))
    unused = (None for _ in (*saved[7:], *ctx.arguments))
    return *(None if tensor is None else next(grads) for tensor in saved[:7]), *unused


def refuse(ctx: torch.autograd.function.FunctionCtx, *grads: object) -> None:
    """Raises a RuntimeError: there are no second derivatives."""
    raise RuntimeError(NO_SECOND_DERIVATIVES)


def modulate_bands(x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], mask_grid: int | None) -> Tensor:
    """:func:`~fdconv_zoo.layers.eager_fbm.forward_pass`; the cutoffs are numerators and denominators in one list."""
    return eager_fbm.forward_pass(x, weight, bias, fractions(cutoffs), mask_grid)


def fake_modulate_bands(x: Tensor, *arguments: object) -> Tensor:
    """Empty tensor in the shape of the output."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def modulate_bands_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], mask_grid: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`~fdconv_zoo.layers.eager_fbm.backward_pass`."""
    return eager_fbm.backward_pass(grad, x, weight, bias, fractions(cutoffs), mask_grid)


def fake_modulate_bands_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *arguments: object
) -> tuple[Tensor, ...]:
    """Empty tensors in the shapes of the gradients."""
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, weight, bias))


def fractions(numbers: list[int]) -> list[tuple[int, int]]:
    """Numerators and denominators in one list as pairs."""
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def setup_context_of_bands(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[object, ...], output: Tensor
) -> None:
    """Keeps the inputs."""
    ctx.save_for_backward(*inputs[:3])
    ctx.arguments = inputs[3:]


def backward_of_bands(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    return *torch.ops.fdconv_zoo.modulate_bands_backward(grad, *ctx.saved_tensors, *ctx.arguments), None, None


BAND_INPUTS = "Tensor x, Tensor weight, Tensor bias, int[] cutoffs, int? mask_grid"

# With the dispatcher itself: torch.library.custom_op checks all arguments in Python, a tenth of a millisecond a call.
# A second import of the package, by autoreload or a test runner, keeps the operators of the first.
if not hasattr(torch.ops.fdconv_zoo, "conv2d"):
    for kernel, fake, schema in (
        (conv2d, fake_conv2d, f"({INPUTS}, {GEOMETRY}) -> Tensor"),
        (conv2d_backward, fake_conv2d_backward, f"(Tensor grad, {INPUTS}, {GEOMETRY}) -> Tensor[]"),
        (modulate_bands, fake_modulate_bands, f"({BAND_INPUTS}) -> Tensor"),
        (
            modulate_bands_backward, fake_modulate_bands_backward,
            f"(Tensor grad, {BAND_INPUTS}) -> (Tensor, Tensor, Tensor)",
        ),
    ):  # fmt: skip
        name = f"fdconv_zoo::{kernel.__name__}"
        torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(name, "default", kernel)
        torch.library.register_fake(name, fake)
    for name, derivative, setup in (
        ("conv2d", backward, setup_context),
        ("modulate_bands", backward_of_bands, setup_context_of_bands),
    ):
        torch.library.register_autograd(f"fdconv_zoo::{name}", derivative, setup_context=setup)
        torch.library.register_autograd(f"fdconv_zoo::{name}_backward", refuse)
