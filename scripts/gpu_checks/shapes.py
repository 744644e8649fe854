"""Each distinct layer shape of the models: our products beside cuDNN's grouped convolution and a batched product.

Forward, as in eval at 64 samples; and the time that making the weights, the bank and the backward's ungating take.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_zoo import FDLinear
from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.layers import FDW
from gpu_checks.builds import fdconv_model, specs
from gpu_checks.clock import median_seconds
from gpu_checks.kernels import WeightShape, load_kernels, weight_arguments
from gpu_checks.setup import Row, Setup, UnavailableError, largest_error


class LayerShape(NamedTuple):
    """What a layer's cost depends on; vertical first. `taps` are those of the dense gate."""

    channels: int
    filters: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    size: tuple[int, int]
    groups: int
    taps: int


SMALL = LayerShape(5, 4, (3, 3), (2, 1), (1, 1), (4, 5), 2, 3)


def shapes_of(model: nn.Module, image_size: int, device: torch.device) -> dict[LayerShape, int]:
    """The distinct shapes of a model's FDConv layers, with how many layers have each."""
    found: dict[LayerShape, int] = {}

    def note(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if isinstance(layer, FDLinear):
            channels, filters, kernel = layer.in_features, layer.out_features, (1, 1)
            size = inputs[0].flatten(1, -2).shape[1], 1
        else:
            channels, filters, kernel = layer.in_channels, layer.out_channels, layer.kernel_size
            size = tuple(inputs[0].shape[2:])
        taps, padding = layer.ksm.local_conv.weight.shape[2], (layer.pads[2], layer.pads[0])
        shape = LayerShape(channels, filters, kernel, layer.stride, padding, size, layer.fdw.num_bands, taps)
        found[shape] = found.get(shape, 0) + 1

    hooks = [layer.register_forward_pre_hook(note) for _, layer in named_fd_layers(model)]
    with torch.no_grad():
        model.eval().to(device)(torch.zeros(1, 3, image_size, image_size, device=device))
    for hook in hooks:
        hook.remove()
    return found


def run(setup: Setup) -> Iterator[Row]:
    """A row for each shape."""
    if not setup.has_kernels:
        raise UnavailableError("Triton's kernels need a GPU and Triton, or TRITON_INTERPRET=1 and --device cpu")
    load_kernels()
    for spec in specs(setup.small):
        found = {SMALL: 1} if setup.small else shapes_of(fdconv_model(spec), spec.size, setup.device)
        for shape, count in found.items():
            sizes = " ".join(str(value).replace(" ", "") for value in shape[:6])
            yield setup.attempt(f"{spec.name} {sizes}", partial(measure, setup, shape, count))


def measure(setup: Setup, shape: LayerShape, count: int) -> Row:
    """Milliseconds of each, and whether the three products agree."""
    ops, dtype, batch = torch.ops.fdconv_zoo, setup.half_dtype, 2 if setup.small else 64
    kernel, (down, across) = list(shape.kernel), shape.padding
    geometry = kernel, list(shape.stride), [across, across, down, down], [1, 1]
    sizes = WeightShape(batch, shape.filters, shape.channels, shape.kernel, shape.groups, shape.taps)
    arguments = weight_arguments(setup, sizes, dtype, from_bank=True)
    weights = ops.gated_weights(*arguments, kernel, True, dtype)
    # Of moderate size, so that the sums of the three can be compared.
    weights = torch.randn_like(weights)
    contiguous = setup.randn(batch, shape.channels, *shape.size, dtype=dtype)
    x = contiguous.contiguous(memory_format=torch.channels_last)
    fdw = FDW(shape.filters * kernel[0], shape.channels * kernel[1], shape.groups, device=setup.device)
    spectrum = fdw.spectrum.detach()
    products: dict[str, Callable[[], Tensor]] = {
        "convolve": lambda: ops.convolve(x, weights, None, *geometry, True),
        "grouped": partial(grouped, contiguous, by_layout(weights, shape), shape),
        "bmm on patches": partial(batched, contiguous, weights, shape),
    }
    others: dict[str, Callable[[], object]] = {
        "gated_weights": lambda: ops.gated_weights(*arguments, kernel, True, dtype),
        "bank": lambda: ops.bank(
            spectrum, fdw.gain_index, fdw.gain_tiles, shape.groups, shape.channels * kernel[1], kernel, dtype
        ),
        "ungate": lambda: ops.ungate(weights, *arguments, kernel, True),
    }
    expected = products["grouped"]().double()
    row: Row = {"layers": count}
    row["error"] = max(largest_error(product(), expected) for product in products.values())
    row["limit"] = 2e-2
    for name, run in {**products, **others}.items():
        row[f"{name} ms"] = round(1000 * median_seconds(run, setup, 0.05), 4)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in (x, weights, expected.to(dtype)))
    row["convolve bytes_per_second"] = moved / row["convolve ms"] * 1000
    return row


def by_layout(weights: Tensor, shape: LayerShape) -> Tensor:
    """Weights (B, Cout, kh*kw, Cin) as those of one grouped convolution (B*Cout, Cin, kh, kw)."""
    return weights.unflatten(2, shape.kernel).permute(0, 1, 4, 2, 3).flatten(0, 1).contiguous()


def grouped(x: Tensor, weights: Tensor, shape: LayerShape) -> Tensor:
    """Each sample as a group of one convolution; the weights are laid out already."""
    maps = x.flatten(0, 1)[None]
    out = F.conv2d(maps, weights, None, shape.stride, shape.padding, groups=len(x))
    return out.unflatten(1, (len(x), -1))[0]


def batched(x: Tensor, weights: Tensor, shape: LayerShape) -> Tensor:
    """A product for each sample: of the map itself, or of its patches."""
    height, width = (
        (side + 2 * pad - size) // step + 1
        for side, pad, size, step in zip(shape.size, shape.padding, shape.kernel, shape.stride, strict=True)
    )
    if shape.kernel == (1, 1):
        maps = x[:, :, :: shape.stride[0], :: shape.stride[1]].flatten(2)
        return torch.bmm(weights.squeeze(2), maps).unflatten(2, (height, width))
    patches = F.unfold(x, shape.kernel, padding=shape.padding, stride=shape.stride)
    return torch.bmm(weights.transpose(2, 3).flatten(2), patches).unflatten(2, (height, width))
