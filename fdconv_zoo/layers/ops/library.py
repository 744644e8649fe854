"""The operators of FDConv as torch knows them: schema, fake implementation and autograd, once for each.

Eager mode and torch.compile call the same ones; the dispatcher chooses the implementation by device. A sample's weight
is as large as the layer, so what is saved for the backward pass is the layer's input, its gates and its spectrum alone,
unless the weights are to be kept.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..fourier import GainMap
from . import traced, transforms
from .eager import bands, conv, limits
from .eager.weight import Made
from .flops import flops_of
from .types import Gates, Geometry, Inputs, Limits, Spectrum

NO_SECOND_DERIVATIVES = (
    "FDConv's operators have no second derivatives; their plain operations have: "
    "fdconv_zoo.layers.ops.traced.dynamic_conv2d and modulate_bands"
)


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
    kernel_size: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    channels_last: bool
    keep: bool

    @property
    def inputs(self) -> Inputs:
        gates = Gates(
            bands=self.bands,
            channels=self.channels,
            filters=self.filters,
            positions=self.positions,
            local_input=self.local_input,
            local_weight=self.local_weight,
        )
        return Inputs(self.x, gates, Spectrum(self.coefficients, GainMap(self.gain_index, self.gain_tiles)))

    @property
    def geometry(self) -> Geometry:
        return Geometry(tuple(self.kernel_size), tuple(self.stride), tuple(self.padding), tuple(self.dilation))

    @property
    def memory_format(self) -> torch.memory_format:
        """That of the output and of the input's gradient."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @property
    def output_shape(self) -> tuple[int, ...]:
        size = self.geometry.checked_output_size(self.x.shape[2], self.x.shape[3])
        return self.x.shape[0], self.coefficients.shape[0] // self.kernel_size[0], *size


TENSORS = tuple(name for name, kind in Call.__annotations__.items() if kind in (Tensor, Tensor | None))
# The gain map has no gradient.
DIFFERENTIABLE = tuple(name for name in TENSORS if not name.startswith("gain_"))


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Context in which operations keep the dtype of their inputs."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


# The convolution


def dynamic_conv2d(inputs: Inputs, geometry: Geometry, channels_last: bool, recompute: bool) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.dynamic_conv2d` by its operator, without bias."""
    left, right, top, bottom = geometry.padding
    if left != right or top != bottom:
        # Grouped convolutions pad both sides alike.
        inputs = inputs._replace(x=F.pad(inputs.x, geometry.padding))
        geometry = geometry._replace(padding=(0, 0, 0, 0))
    x, gates, (coefficients, gain_map) = inputs
    if x.numel() == 0:
        # Nothing to convolve, but still a function of the input and the weight, as nn.Conv2d's output is.
        size = (max(side, 0) for side in geometry.output_size(x.shape[2], x.shape[3]))
        nothing = x.sum() + coefficients.sum().to(x.dtype)
        return nothing + x.new_zeros(len(x), len(coefficients) // geometry.kernel_size[0], *size)
    tensors = (x, *gates, coefficients, *gain_map)
    is_trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    keep = is_trained and not recompute
    with without_autocast(x):
        return torch.ops.fdconv_zoo.dynamic_conv2d.default(*tensors, *geometry, channels_last, keep)[0]


def conv2d_by(device_limits: Limits, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Output, and the weights and their dense gate for the backward pass: empty where they are not kept."""
    output, kept = conv.forward(call.inputs, call.geometry, device_limits, call.channels_last, call.keep)
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
    found = zip((grads.x, *grads.gates, grads.coefficients), needs, strict=True)
    return [value.contiguous(memory_format=format_of(value, call)) for value, needed in found if needed]


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


def conv2d_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Empty tensors in the shapes and memory formats of :func:`conv2d_by`."""
    call = Call(*arguments)
    output = torch.empty(call.output_shape, dtype=call.x.dtype, device=call.x.device, memory_format=call.memory_format)
    gated, gate = call.x.new_empty(0), call.x.new_empty(0)
    if call.keep:
        rows, columns = call.coefficients.shape[0], call.x.shape[1] * call.kernel_size[1]
        gated = call.coefficients.new_empty(call.x.shape[0], rows, columns)
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
            return traced.dynamic_conv2d(changed.inputs, changed.geometry)

        with without_autocast(grad):
            if transforms.needs_plain_gradients(grad):
                grads = transforms.gradients(plain, [getattr(call, name) for name in names], grad)
            else:
                grads = torch.ops.fdconv_zoo.dynamic_conv2d_backward.default(grad, gated, gate, needs, *call)
        found = dict(zip(names, grads, strict=True))
    return tuple(found.get(name) for name in Call._fields)


# The bands


def modulate_bands(
    x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None
) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.modulate_bands` by its operator."""
    if x.numel() == 0:
        return x + (weight.sum() + bias.sum()).to(x.dtype)
    numbers = [number for fraction in cutoffs for number in fraction]
    with without_autocast(x):
        return torch.ops.fdconv_zoo.modulate_bands.default(x, weight, bias, numbers, mask_grid)


def bands_on_cpu(*arguments: Any) -> Tensor:
    """The bands on a CPU."""
    return bands.forward(*arguments, limits=limits.CPU)


def bands_elsewhere(*arguments: Any) -> Tensor:
    """The bands on a device without an implementation of its own."""
    return bands.forward(*arguments, limits=limits.OTHER)


def bands_backward_on_cpu(*arguments: Any) -> list[Tensor]:
    """Their backward pass on a CPU."""
    return bands.backward(*arguments, limits=limits.CPU)


def bands_backward_elsewhere(*arguments: Any) -> list[Tensor]:
    """Their backward pass on a device without an implementation of its own."""
    return bands.backward(*arguments, limits=limits.OTHER)


def bands_fake(x: Tensor, *unused: Any) -> Tensor:
    """Empty tensor in the shape of the output."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def bands_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], mask_grid: int | None, need_x: bool
) -> list[Tensor]:
    """Empty tensors in the shapes of the gradients."""
    wanted = (x, weight, bias) if need_x else (weight, bias)
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in wanted]


def bands_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs; gates and filtered maps, several times as large, are made again."""
    x, weight, bias, ctx.cutoffs, ctx.mask_grid = inputs
    ctx.save_for_backward(x, weight, bias)


def bands_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    x, weight, bias = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return traced.modulate_bands(x, weight, bias, bands.fractions(ctx.cutoffs), ctx.mask_grid)

    with without_autocast(grad):
        if transforms.needs_plain_gradients(grad):
            return *transforms.gradients(plain, (x, weight, bias), grad), None, None
        grads = torch.ops.fdconv_zoo.modulate_bands_backward.default(
            grad, x, weight, bias, ctx.cutoffs, ctx.mask_grid, need_x=need_x
        )
    return *(grads if need_x else (None, *grads)), None, None


# Registration


def refuse(ctx: Any, *grads: Any) -> None:
    """Raises a RuntimeError: there are no second derivatives."""
    raise RuntimeError(NO_SECOND_DERIVATIVES)


SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", list[int]: "int[]", bool: "bool"}
CALL = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in Call.__annotations__.items())
BANDS = "Tensor x, Tensor weight, Tensor bias, int[] cutoffs, int? mask_grid"


class Operator(NamedTuple):
    """An operator and its implementations by the dispatcher's keys; "default" is for all devices without one.

    Attributes:
        schema: Its arguments and results.
        kernels: Implementations.
        fake: Makes empty tensors in the shapes of the results.
        backward: Derivative.
        setup: Keeps what `backward` needs, or None.
    """

    schema: str
    kernels: dict[str, Callable[..., Any]]
    fake: Callable[..., Any]
    backward: Callable[..., Any]
    setup: Callable[..., None] | None


OPERATORS = {
    "dynamic_conv2d": Operator(
        f"({CALL}) -> (Tensor, Tensor, Tensor)",
        {"cpu": conv2d_on_cpu, "default": conv2d_elsewhere},
        conv2d_fake,
        conv2d_backward,
        conv2d_setup,
    ),
    "dynamic_conv2d_backward": Operator(
        f"(Tensor grad, Tensor gated, Tensor gate, bool[] needs, {CALL}) -> Tensor[]",
        {"cpu": conv2d_backward_on_cpu, "default": conv2d_backward_elsewhere},
        conv2d_backward_fake,
        refuse,
        None,
    ),
    "modulate_bands": Operator(
        f"({BANDS}) -> Tensor",
        {"cpu": bands_on_cpu, "default": bands_elsewhere},
        bands_fake,
        bands_backward,
        bands_setup,
    ),
    "modulate_bands_backward": Operator(
        f"(Tensor grad, {BANDS}, bool need_x) -> Tensor[]",
        {"cpu": bands_backward_on_cpu, "default": bands_backward_elsewhere},
        bands_backward_fake,
        refuse,
        None,
    ),
}

# With the dispatcher itself: torch.library.custom_op checks all arguments in Python, a tenth of a millisecond a call.
# A second import of the package, by autoreload or a test runner, keeps the operators of the first.
if not hasattr(torch.ops.fdconv_zoo, "dynamic_conv2d"):
    for name, operator in OPERATORS.items():
        full_name = f"fdconv_zoo::{name}"
        torch.library.define(full_name, operator.schema, tags=torch.Tag.pt2_compliant_tag)
        for key, kernel in operator.kernels.items():
            torch.library.impl(full_name, key, kernel)
        torch.library.register_fake(full_name, operator.fake)
        torch.library.register_autograd(full_name, operator.backward, setup_context=operator.setup)
        register_flop_formula(getattr(torch.ops.fdconv_zoo, name), get_raw=True)(flops_of(operator.kernels["cpu"]))
