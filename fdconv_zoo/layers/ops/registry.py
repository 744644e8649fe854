"""The operators of FDConv as torch knows them: their schemas, and their registration with the dispatcher.

Eager mode and torch.compile call the same ones; the dispatcher chooses the implementation by device.
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import bands, bank, library, mixed, triton
from .eager import bands as eager_bands
from .eager import limits
from .flops import flops_of

NO_SECOND_DERIVATIVES = (
    "FDConv's operators have no second derivatives; their plain operations have: "
    "fdconv_zoo.layers.ops.traced.dynamic_conv2d and modulate_bands"
)


def refuse(ctx: Any, *grads: Any) -> None:
    """Raises a RuntimeError: there are no second derivatives."""
    raise RuntimeError(NO_SECOND_DERIVATIVES)


SCHEMA_TYPES = {Tensor: "Tensor", Tensor | None: "Tensor?", list[int]: "int[]", int: "int", bool: "bool"}
CALL = ", ".join(f"{SCHEMA_TYPES[kind]} {name}" for name, kind in library.Call.__annotations__.items())
BANDS = "Tensor x, Tensor weight, Tensor bias, int[] cutoffs, int? mask_grid, bool fused"


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


def refusing_numbers(fake: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A fake implementation that raises where the dispatcher takes it for a computation.

    It does for numbers beside one tensor on the meta device, a layer's parameter that was never loaded or was put
    elsewhere: the result would be memory that nobody wrote.
    """

    @wraps(fake)
    def checked(first: Tensor, *others: Any) -> Any:
        if not first.is_meta and not isinstance(first, FakeTensor):
            raise RuntimeError(
                f"fdconv_zoo::{name} of numbers on {first.device}, but a parameter of the layer is on the meta device, "
                "where there are none: load it, or whoever keeps it elsewhere (accelerate, FSDP) has to put it in place"
            )
        return fake(first, *others)

    return checked


def counted_kernel(operator: Operator) -> Callable[..., Any]:
    """The implementation whose floating-point operations stand for an operator's: that of CPUs."""
    return operator.kernels.get("cpu", operator.kernels["default"])


OPERATORS = {
    "dynamic_conv2d": Operator(
        f"({CALL}) -> (Tensor, Tensor, Tensor)",
        {
            "cpu": library.conv2d_on_cpu,
            "cuda": library.conv2d_on_gpu,
            "default": library.conv2d_elsewhere,
        },
        library.conv2d_fake,
        library.conv2d_backward,
        library.conv2d_setup,
    ),
    "dynamic_conv2d_backward": Operator(
        f"(Tensor grad, Tensor gated, Tensor gate, bool[] needs, {CALL}) -> Tensor[]",
        {
            "cpu": library.conv2d_backward_on_cpu,
            "cuda": library.conv2d_backward_on_gpu,
            "default": library.conv2d_backward_elsewhere,
        },
        library.conv2d_backward_fake,
        refuse,
        None,
    ),
    "bank": Operator(
        "(Tensor coefficients, Tensor gain_index, Tensor gain_tiles, int num_bands, int columns, int[] kernel_size, "
        "ScalarType dtype) -> Tensor",
        {"cuda": bank.bank_on_gpu, "default": bank.bank_kernel},
        bank.bank_fake,
        bank.bank_backward,
        bank.bank_setup,
    ),
    "bank_backward": Operator(
        "(Tensor grad, Tensor gain_index, Tensor gain_tiles, int[] kernel_size, ScalarType dtype) -> Tensor",
        {"cuda": bank.bank_backward_on_gpu, "default": bank.bank_backward_kernel},
        bank.bank_backward_fake,
        refuse,
        None,
    ),
    "modulate_bands": Operator(
        f"({BANDS}) -> Tensor",
        {
            "cpu": partial(eager_bands.kernel, limits.CPU),
            "cuda": bands.on_gpu,
            "default": partial(eager_bands.kernel, limits.OTHER),
        },
        bands.fake,
        bands.backward,
        bands.setup,
    ),
    "modulate_bands_backward": Operator(
        f"(Tensor grad, {BANDS}, bool need_x) -> Tensor[]",
        {
            "cpu": partial(eager_bands.backward_kernel, limits.CPU),
            "cuda": bands.backward_on_gpu,
            "default": partial(eager_bands.backward_kernel, limits.OTHER),
        },
        bands.backward_fake,
        refuse,
        None,
    ),
    "mixed_conv2d": Operator(
        f"({mixed.CALL}) -> Tensor",
        {"cpu": mixed.on_cpu, "default": mixed.elsewhere},
        mixed.fake,
        mixed.backward,
        mixed.setup,
    ),
    "mixed_conv2d_backward": Operator(
        f"(Tensor grad, {mixed.CALL}, bool need_x) -> Tensor[]",
        {"cpu": mixed.backward_on_cpu, "default": mixed.backward_elsewhere},
        mixed.backward_fake,
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
        kernels = operator.kernels
        if triton.IS_INTERPRETED:
            kernels = {**kernels, "cpu": kernels.get("cuda", kernels["default"])}
        for key, kernel in kernels.items():
            torch.library.impl(full_name, key, kernel)
        torch.library.register_fake(full_name, refusing_numbers(operator.fake, name))
        torch.library.register_autograd(full_name, operator.backward, setup_context=operator.setup)
        formula = flops_of(counted_kernel(operator))
        register_flop_formula(getattr(torch.ops.fdconv_zoo, name), get_raw=True)(formula)
