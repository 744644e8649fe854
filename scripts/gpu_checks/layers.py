"""Whole layers, forward and every gradient, against the same layers in float64, which PyTorch's operations compute."""

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fdconv_zoo import FDConv2d, FDLinear
from gpu_checks.setup import Row, Setup, UnavailableError, dtype_name, exact_float32, norm_error, worst_of

# Of the norm of a result or gradient; in 16 bits they go through several roundings.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


class Case(NamedTuple):
    """A layer, (Cin, Cout, kernel) or (Cin, Cout) and its keyword arguments, the shape of its input, and its mode."""

    layer: tuple[int, ...]
    options: dict[str, Any]
    shape: tuple[int, ...]
    training: bool = False
    channels_last: bool = False


CASES = [
    Case((18, 20, 3), {"padding": 1, "num_bands": 4}, (3, 18, 9, 8)),
    Case((18, 20), {"num_bands": 3}, (3, 5, 18)),
    Case((64, 64, 3), {"padding": 1}, (64, 64, 14, 14), True, True),
    Case((64, 128, 3), {"padding": 1, "stride": 2}, (5, 64, 15, 13), True),
    Case((96, 384), {}, (64, 14, 14, 96), True),
    Case((256, 64, 1), {}, (64, 256, 14, 14), True, True),
    Case((33, 40, (3, 2)), {"padding": "same", "dilation": (2, 1), "bias": False}, (4, 33, 17, 12)),
    Case((40, 33, 1), {"stride": (2, 1), "padding": (0, 1), "num_bands": 7}, (6, 40, 9, 7)),
    Case((24, 24, 3), {"padding": 1}, (2, 24, 70, 66), False, True),
    Case((24, 24, 3), {"padding": 1, "mask_grid": 64}, (64, 24, 14, 14)),
    Case((32, 32, 3), {"padding": 1, "ksm": False}, (64, 32, 14, 14)),
    Case((32, 32, 3), {"padding": 1, "fbm": False, "recompute": False}, (64, 32, 14, 14), True),
    Case((512, 512, 3), {"padding": 1}, (8, 512, 7, 7), True, True),
    Case((768, 3072), {}, (48, 7, 7, 768), True),
]


SMALL_CASES = [
    Case((5, 4, 3), {"padding": 1, "num_bands": 2}, (3, 5, 5, 4)),
    Case((6, 3), {"num_bands": 2}, (3, 4, 6)),
]


def run(setup: Setup) -> Iterator[Row]:
    """A row for each case and dtype, with the worst result; then the ways of torch.compile."""
    setup.seed()
    with exact_float32():
        for case, dtype in pairs(setup):
            name = " ".join(str(value).replace(" ", "") for value in (*case.layer, case.options, case.shape))
            mode = f"{' train' if case.training else ''}{' channels_last' if case.channels_last else ''}"
            yield setup.attempt(f"{dtype_name(dtype)} {name}{mode}", partial(check, setup, case, dtype))
        for mode in ("default", "reduce-overhead")[: 1 if setup.small else 2]:
            yield setup.attempt(f"torch.compile {mode}", partial(check_compiled, setup, mode))
    if not setup.has_kernels:
        raise UnavailableError("these were PyTorch's operations: no Triton kernels here")


def pairs(setup: Setup) -> Iterator[tuple[Case, torch.dtype]]:
    """Cases with dtypes; Triton compiles for each, and 16 bits are the same code but for their rounding."""
    if setup.small:
        yield from product(SMALL_CASES, setup.dtypes)
        return
    for number, case in enumerate(CASES):
        yield from ((case, dtype) for dtype in setup.dtypes[: 3 if number < 2 else 2 if number < 6 else 1])
    yield from ((case, torch.bfloat16) for case in CASES[6:])


def make(case: Case, device: torch.device) -> nn.Module:
    """The layer with random parameters and statistics, none of which leaves a term trivial."""
    layer = (FDLinear if len(case.layer) == 2 else FDConv2d)(*case.layer, device=device, **case.options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
        layer.ksm.norm.running_mean.normal_(std=0.2)
        layer.ksm.norm.running_var.uniform_(0.6, 1.4)
    return layer.train(case.training)


def output_and_gradients(layer: nn.Module, x: Tensor, direction: Tensor, autocast: Any) -> dict[str, Tensor]:
    """Output, and gradients of the input and of every parameter, by name."""
    x = x.detach().requires_grad_()
    with autocast:
        output = layer(x)
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(output, [x, *parameters.values()], direction.to(output.dtype))
    return {"output": output.detach(), "input": grads[0], **dict(zip(parameters, grads[1:], strict=True))}


def random_input(setup: Setup, case: Case, dtype: torch.dtype) -> Tensor:
    """An input that is rounded to a dtype and, as the layers' neighbours leave it, no mean of zero."""
    x = (setup.randn(*case.shape) + 0.3).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if case.channels_last else x


def check(setup: Setup, case: Case, dtype: torch.dtype) -> Row:
    """The worst error of output and gradients, and which it is."""
    layer, x = make(case, setup.device), random_input(setup, case, dtype)
    wide = copy.deepcopy(layer).double()
    with torch.no_grad():
        direction = setup.randn(*copy.deepcopy(layer)(x.float()).shape, dtype=dtype)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(setup.device.type, dtype)
    found = output_and_gradients(layer, x, direction, autocast)
    expected = output_and_gradients(wide, x.double(), direction, nullcontext())
    errors = {name: norm_error(value, expected[name]) for name, value in found.items()}
    # Some of KSM's gradients are small sums of large numbers: they are seen beside the largest of the parameters'.
    scale = max(expected[name].norm().item() for name, _ in layer.named_parameters())
    least = (1e-3 if dtype == torch.float32 else 0.1) * scale
    for name, _ in layer.named_parameters():
        norm = expected[name].norm().item()
        errors[name] *= norm / max(norm, least) if norm > 1e-12 else 1 / least
    worst = worst_of(errors)
    return {"error": errors[worst], "limit": LIMITS[dtype], "worst": worst, "output": errors["output"]}


def check_compiled(setup: Setup, mode: str) -> Row:
    """Two layers compiled into one graph, at two batches, against the same ones without the compiler."""
    case = SMALL_CASES[0] if setup.small else CASES[0]
    filters, channels = case.layer[:2][::-1]
    cases = case, Case((filters, channels, 1), {"num_bands": 4}, case.shape)
    model = nn.Sequential(*(make(case, setup.device) for case in cases))
    torch._dynamo.reset()
    options = {"mode": mode} if setup.on_gpu else {"backend": "aot_eager"}
    compiled = torch.compile(model, fullgraph=True, **options)
    errors: dict[str, float] = {}
    for batch in (3, 5):
        x = random_input(setup, case._replace(shape=(batch, *case.shape[1:])), torch.float32)
        direction = setup.randn(batch, channels, *case.shape[2:])
        expected = output_and_gradients(model, x, direction, nullcontext())
        for call in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            found = output_and_gradients(compiled, x, direction, nullcontext())
            for name, wanted in zip(found, expected.values(), strict=True):
                errors[f"batch {batch}, call {call}: {name}"] = norm_error(found[name], wanted)
    worst = worst_of(errors)
    return {"error": errors[worst], "limit": 1e-3, "worst": worst, "options": options}
