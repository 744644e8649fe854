"""Each kernel by itself against its formula in float64, on the device: odd sizes, geometries, layouts, dtypes."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from itertools import product, zip_longest
from typing import NamedTuple

import torch
from timm.models.metaformer import StarReLU
from torch import Tensor, nn

from fdconv_zoo.layers import FDW
from fdconv_zoo.layers.fourier import matrix_to_weight
from gpu_checks import reference
from gpu_checks.reference import WeightArguments
from gpu_checks.setup import Row, Setup, UnavailableError, dtype_name, exact_float32, largest_error, worst_of

# Largest error of a result that is rounded once to its dtype, with some room for the exponentials of a GPU.
LIMITS = {torch.float32: 5e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
CUTOFFS = (1 / 4, 1 / 8, 1 / 16)
FRACTIONS = [1, 4, 1, 8, 1, 16]


class WeightShape(NamedTuple):
    """Sizes of weights: samples, filters, channels, kernel, groups, taps of the dense gate."""

    batch: int
    filters: int
    channels: int
    kernel: tuple[int, int]
    groups: int
    taps: int


class MapShape(NamedTuple):
    """Sizes of a convolution: samples, channels, filters, map, kernel, stride, padding, dilation, vertical first."""

    batch: int
    channels: int
    filters: int
    size: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)


# Each by importance: Triton compiles a kernel for each of these, and the budget cuts the last.
WEIGHTS = [
    WeightShape(2, 3, 18, (3, 3), 6, 3),
    WeightShape(64, 64, 64, (3, 3), 64, 3),
    WeightShape(70, 17, 100, (1, 1), 70, 5),
    WeightShape(1, 96, 384, (1, 1), 1, 5),
    WeightShape(5, 129, 7, (2, 3), 9, 3),
]
MAPS = [
    MapShape(2, 18, 5, (7, 6), (3, 3), padding=(1, 1)),
    MapShape(3, 64, 128, (15, 13), (3, 3), (2, 2), (1, 1)),
    MapShape(2, 256, 64, (28, 28), (1, 1)),
    MapShape(2, 33, 20, (17, 19), (3, 2), (2, 3), (2, 1), (2, 1)),
    MapShape(2, 96, 384, (3136, 1), (1, 1)),
    MapShape(2, 130, 70, (7, 7), (1, 1), (2, 1)),
]
BAND_MAPS = [(2, 5, 9, 16), (2, 17, 14, 14), (2, 33, 28, 28), (1, 3, 56, 56), (1, 2, 64, 33), (2, 1, 1, 1)]
BANKS = [(64, 64, 64), (45, 33, 13), (192, 96, 16)]
# By whether rows and columns have three positions each.
KERNELS = {(False, False): (1, 1), (True, False): (3, 1), (False, True): (1, 3), (True, True): (3, 3)}
GATES = [(2, 18, 16), (64, 4681, 128), (33, 100, 24)]


def run(setup: Setup) -> Iterator[Row]:
    """A row for each kernel, dtype and shape; the worst error of its results."""
    setup.seed()
    with exact_float32():
        for shape, dtype in product(BANKS[:1] if setup.small else BANKS, setup.dtypes):
            yield measured(setup, "bank", shape, dtype, check_bank)
        if not setup.has_kernels:
            raise UnavailableError("Triton's kernels need a GPU and Triton, or TRITON_INTERPRET=1 and --device cpu")
        load_kernels()
        few = 1 if setup.small else None
        for shape in GATES[:few]:
            yield measured(setup, "gates", shape, torch.float32, check_gates)
        for number, shapes in enumerate(zip_longest(WEIGHTS[:few], MAPS[:few], BAND_MAPS[:few])):
            for dtype in setup.dtypes[: 3 if number == 0 else 2]:
                yield from check_shapes(setup, number, shapes, dtype)
        if not setup.small:
            yield setup.attempt("weights of more than 2^31 elements", lambda: check_large(setup))


def load_kernels() -> None:
    """Imports Triton's kernels, which makes them operators."""
    import_module("fdconv_zoo.layers.ops.triton.conv")
    import_module("fdconv_zoo.layers.ops.triton.bands")
    import_module("fdconv_zoo.layers.ops.triton.gates")


def check_shapes(setup: Setup, number: int, shapes: tuple, dtype: torch.dtype) -> Iterator[Row]:
    """A row for each kind of weights, of convolution and of bands, as far as there is a shape."""
    of_weights, of_maps, of_bands = shapes
    for from_bank in (True, False) if of_weights else ():
        check = partial(check_weights, from_bank=from_bank)
        yield measured(setup, f"weights from {'bank' if from_bank else 'transforms'}", of_weights, dtype, check)
    for channels_last in (False, True)[: 2 if number < 3 else 1] if of_maps else ():
        check = partial(check_convolution, channels_last=channels_last)
        yield measured(setup, f"product{' channels_last' if channels_last else ''}", of_maps, dtype, check)
    if of_bands:
        yield measured(setup, "bands", of_bands, dtype, check_bands)


def measured(setup: Setup, name: str, shape: tuple, dtype: torch.dtype, check: Callable[..., dict[str, float]]) -> Row:
    """The worst of a check's errors, and all of them by result."""

    def measure() -> Row:
        errors = check(setup, shape, dtype)
        return {"error": errors[worst_of(errors)], "limit": LIMITS[dtype], "results": errors}

    sizes = " ".join(str(value).replace(" ", "") for value in shape)
    return setup.attempt(f"{name} {dtype_name(dtype)} {sizes}", measure)


def weight_arguments(setup: Setup, shape: WeightShape, dtype: torch.dtype, from_bank: bool) -> WeightArguments:
    """Random arguments; gates are slices of one tensor, as KSM makes them."""
    (kh, kw), positions = shape.kernel, shape.kernel[0] * shape.kernel[1]
    count = shape.groups if from_bank else shape.batch
    if from_bank:
        source = setup.randn(count, shape.filters * positions, shape.channels, dtype=dtype)
    else:
        source = setup.randn(count, shape.filters * kh, shape.channels * kw)
    sizes = [shape.groups, shape.channels, shape.filters, positions]
    gates = 2 * torch.rand(shape.batch, sum(sizes), device=setup.device)
    bands, channels, filters, by_position = gates.split(sizes, 1)
    return WeightArguments(
        source,
        bands,
        channels,
        filters,
        by_position if positions > 1 else None,
        setup.randn(shape.batch, shape.channels),
        setup.randn(shape.filters * positions, 1, shape.taps),
    )


def check_weights(setup: Setup, shape: WeightShape, dtype: torch.dtype, from_bank: bool) -> dict[str, float]:
    """Errors of `gated_weights`, without gates too, and of each result of `ungate`."""
    ops, kernel = torch.ops.fdconv_zoo, list(shape.kernel)
    arguments = weight_arguments(setup, shape, dtype, from_bank)
    wide = arguments.double()
    found = ops.gated_weights(*arguments, kernel, from_bank, dtype)
    errors = {"gated_weights": largest_error(found, reference.gated_weights(wide, shape.kernel, from_bank))}
    found = ops.gated_weights(*arguments[:2], None, None, None, None, None, kernel, from_bank, dtype)
    errors["without gates"] = largest_error(found, reference.plain_weights(wide, shape.kernel, from_bank))
    grad = setup.randn(*found.shape, dtype=dtype)
    results = ops.ungate(grad, *arguments, kernel, from_bank)
    names = ("ungate weights", "ungate logits", "ungate rows", "ungate channels")
    expected = reference.ungate(grad.double(), wide, shape.kernel, from_bank)
    for name, value, wanted in zip(names, results, expected, strict=True):
        errors[name] = largest_error(value.sum(0) if "rows" in name or "channels" in name else value, wanted)
    return errors


def check_convolution(setup: Setup, shape: MapShape, dtype: torch.dtype, channels_last: bool) -> dict[str, float]:
    """Errors of `convolve`, `grad_input` and `grad_weight`."""
    ops, positions = torch.ops.fdconv_zoo, shape.kernel[0] * shape.kernel[1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = setup.randn(shape.batch, shape.channels, *shape.size, dtype=dtype).contiguous(memory_format=layout)
    weight = setup.randn(shape.batch, shape.filters, positions, shape.channels, dtype=dtype)
    bias = setup.randn(shape.filters)
    down, across = shape.padding
    geometry = list(shape.kernel), list(shape.stride), [across, across, down, down], list(shape.dilation)
    wide_x, wide_weight = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = reference.convolve(
        wide_x, wide_weight, bias.double(), shape.kernel, shape.stride, shape.padding, shape.dilation
    )
    grad = setup.randn(*expected.shape, dtype=dtype).contiguous(memory_format=layout)
    grad_x, grad_weight = torch.autograd.grad(expected, (wide_x, wide_weight), grad.double())
    return {
        "convolve": largest_error(ops.convolve(x, weight, bias, *geometry, channels_last), expected.detach()),
        "grad_input": largest_error(ops.grad_input(grad, weight, x, *geometry, channels_last), grad_x),
        "grad_weight": largest_error(ops.grad_weight(grad, x, *geometry), grad_weight),
    }


def check_bands(setup: Setup, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """Errors of `gate_bands`, of its adjoint, of `grad_factors` and of `grad_logits`."""
    ops = torch.ops.fdconv_zoo
    x, grad = (setup.randn(*shape, dtype=dtype) for _ in range(2))
    logits = setup.randn(shape[0], len(CUTOFFS), *shape[2:], dtype=dtype)
    bias = setup.randn(len(CUTOFFS))
    wide = x.double().requires_grad_()
    expected = reference.gate_bands(wide, logits.double(), bias.double(), CUTOFFS)
    (adjoint,) = torch.autograd.grad(expected, wide, grad.double())
    factors = ops.grad_factors(grad, x, FRACTIONS)
    gates = 2 * torch.sigmoid(logits.double() + bias.double()[:, None, None])
    by_factor = factors.double().sum(1)
    slope = (by_factor[:, :-1] - by_factor[:, 1:]) * gates * (1 - gates / 2)
    return {
        "gate_bands": largest_error(ops.gate_bands(x, logits, bias, FRACTIONS, False, True), expected.detach()),
        "adjoint": largest_error(ops.gate_bands(grad, logits, bias, FRACTIONS, True, False), adjoint),
        "grad_factors": largest_error(by_factor, reference.grad_factors(grad.double(), x.double(), CUTOFFS)),
        "grad_logits": largest_error(ops.grad_logits(factors, logits, bias), slope),
    }


def check_gates(setup: Setup, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Error of KSM's gates (samples, gates, hidden channels)."""
    batch, count, width = shape
    norm, star = nn.BatchNorm2d(width).to(setup.device).eval(), StarReLU().to(setup.device)
    heads = nn.Linear(width, count).to(setup.device)
    with torch.no_grad():
        for values in (norm.weight, norm.bias, norm.running_mean, heads.bias):
            values.normal_()
        norm.running_var.uniform_(0.2, 3)
        hidden = setup.randn(batch, width, dtype=dtype)
        found = torch.ops.fdconv_zoo.gates_of_hidden(
            hidden, heads.weight, heads.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps,
            star.scale, star.bias,
        )  # fmt: skip
        wide = star.double()(norm.double()(hidden.double()[:, :, None, None])).flatten(1)
        return {"gates": largest_error(found, 2 * torch.sigmoid(heads.double()(wide)))}


def check_bank(setup: Setup, shape: tuple[int, int, int], dtype: torch.dtype) -> dict[str, float]:
    """Errors of the bank (rows, columns, groups) and of its gradient, against a transform of each group."""
    rows, columns, groups = shape if not setup.small else (18, 12, 4)
    fdw, kernel = FDW(rows, columns, groups, device=setup.device), KERNELS[rows % 3 == 0, columns % 3 == 0]
    bank = torch.ops.fdconv_zoo.bank(fdw.spectrum, fdw.gain_index, fdw.gain_tiles, groups, columns, kernel, dtype)
    direction = setup.randn(*bank.shape, dtype=dtype)
    (grad,) = torch.autograd.grad(bank, fdw.spectrum, direction)
    wide = fdw.double()
    matrices = torch.stack([wide.group_matrix(group) for group in range(groups)])
    expected = matrix_to_weight(matrices.flatten(0, 1), kernel).flatten(2).mT.unflatten(0, (groups, -1)).flatten(1, 2)
    (wanted,) = torch.autograd.grad(expected, wide.spectrum, direction.double())
    return {"bank": largest_error(bank.detach(), expected.detach()), "bank_backward": largest_error(grad, wanted)}


def check_large(setup: Setup) -> Row:
    """Weights and a convolution whose indices pass 2^31: the last samples against the formula."""
    shape = WeightShape(1024, 512, 512, (3, 3), 2, 5)
    elements = shape.batch * shape.filters * shape.channels * 9
    free, _ = torch.cuda.mem_get_info(setup.device)
    if free < 4 * elements:
        raise UnavailableError(f"{elements} elements need {4 * elements / 1e9:.0f} GB of free memory")
    arguments = weight_arguments(setup, shape, torch.bfloat16, from_bank=True)
    weights = torch.ops.fdconv_zoo.gated_weights(*arguments, [3, 3], True, torch.bfloat16)
    last = slice(shape.batch - 2, None)
    wide = arguments.double()
    some = WeightArguments(*(v if n in ("source", "local_weight") else v[last] for n, v in wide._asdict().items()))
    errors = {"gated_weights": largest_error(weights[last], reference.gated_weights(some, shape.kernel, True))}
    x = setup.randn(shape.batch, shape.channels, 3, 3, dtype=torch.bfloat16)
    found = torch.ops.fdconv_zoo.convolve(x, weights, None, [3, 3], [1, 1], [0, 0, 0, 0], [1, 1], False)
    pairs: tuple[Tensor, Tensor] = x[last].double(), weights[last].double()
    errors["convolve"] = largest_error(
        found[last], reference.convolve(*pairs, None, shape.kernel, (1, 1), (0, 0), (1, 1))
    )
    return {"elements": elements, "error": max(errors.values()), "limit": LIMITS[torch.bfloat16], "results": errors}
