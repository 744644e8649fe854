"""Dtypes, autocast and memory formats."""

from functools import partial

import pytest
import torch
from torch import nn

from fdconv_zoo import FDConv2d, FDLinear
from tests.compare import randomise, relative_error
from tests.layers.fdconv_configs import CONFIGS, layer_and_input, on_grid

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["3x3", "3x3 of a large map", "1x1", "1x1 of a large map", "more samples than groups"])
def test_half_precision_inputs_of_a_float32_layer(name, dtype):
    layer, x = layer_and_input(CONFIGS[name], torch.float32)
    x = x.to(dtype).requires_grad_()
    out = layer.eval()(x)
    assert out.dtype == dtype
    out.sum().backward()
    assert x.grad.dtype == dtype
    assert {parameter.grad.dtype for parameter in layer.parameters()} == {torch.float32}
    assert relative_error(out, layer(x.float())) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [False, True])
def test_layers_in_half_precision(dtype, training):
    for layer, x in (
        (FDConv2d(24, 32, 3, padding=1), torch.randn(2, 24, 8, 8)),
        (FDConv2d(24, 32, 1), torch.randn(2, 24, 14, 14)),
        (FDLinear(24, 32), torch.randn(2, 8, 24)),
    ):
        expected = layer.eval()(x)
        layer.to(dtype).train(training)
        out = layer(x.to(dtype))
        assert out.dtype == dtype
        assert relative_error(out, expected) < 8 * torch.finfo(dtype).eps
        out.float().square().sum().backward()
        assert all(parameter.grad.dtype == dtype for parameter in layer.parameters())
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (partial(FDConv2d, 24, 32, 3, padding=1, num_bands=16), (2, 24, 14, 13)),
        (partial(FDConv2d, 24, 32, 1, num_bands=16), (2, 24, 6, 5)),
        (partial(FDLinear, 24, 32, num_bands=16), (2, 6, 24)),
    ],
    ids=["3x3", "1x1", "linear"],
)
def test_autocast(layer, shape, recompute, dtype):
    layer = randomise(layer(recompute=recompute)).eval()
    x = torch.randn(shape, requires_grad=True)
    expected = layer(x)
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x)
        assert out.dtype == dtype == nn.Linear(1, 1)(torch.ones(1, 1)).dtype
    assert relative_error(out, expected) < 8 * torch.finfo(dtype).eps
    # Only the input is rounded: the spectral maths and the gates stay in float32.
    assert torch.equal(out, layer(x.to(dtype)))
    # The backward pass runs outside of autocast, as it does in training loops.
    direction = torch.randn(expected.shape)
    inputs = [x, *layer.parameters()]
    for got, wanted in zip(
        torch.autograd.grad(out, inputs, direction.to(dtype)),
        torch.autograd.grad(expected, inputs, direction),
        strict=True,
    ):
        assert got.dtype == torch.float32
        assert relative_error(got, wanted) < 16 * torch.finfo(dtype).eps


@pytest.mark.parametrize("recompute", [False, True])
def test_a_backward_pass_inside_of_autocast_is_as_exact_as_the_dtype(recompute):
    layer = randomise(FDConv2d(24, 32, 3, padding=1, num_bands=16, recompute=recompute)).eval()
    x = torch.randn(2, 24, 6, 5, requires_grad=True)
    inputs = [x, *layer.parameters()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(layer(x).float().sum(), inputs)
        out = layer(x).float().sum()
    for got, wanted in zip(inside, torch.autograd.grad(out, inputs), strict=True):
        assert got.dtype == torch.float32
        assert relative_error(got, wanted) < 4 * torch.finfo(torch.bfloat16).eps


def test_recomputing_counts_a_batch_once():
    layer = FDConv2d(24, 32, 3, recompute=True)
    for batches in (1, 2):
        layer(torch.randn(2, 24, 6, 5)).sum().backward()
        assert layer.ksm.norm.num_batches_tracked == batches


def test_autocast_can_be_disabled_inside():
    layer, x = FDConv2d(24, 32, 3), torch.randn(2, 24, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(x).dtype == torch.float32


@on_grid
def test_channels_last_in_and_out(config):
    layer, x = layer_and_input(config)
    expected = layer.eval()(x)
    out = layer(x.contiguous(memory_format=torch.channels_last))
    assert relative_error(out, expected) < 1e-13
    assert expected.is_contiguous()
    if min(x.shape[1], x.shape[2] * x.shape[3]) > 1:
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_conv_in_channels_last_gives_what_conv2d_gives(kernel_size):
    conv = nn.Conv2d(24, 32, kernel_size).to(memory_format=torch.channels_last)
    layer = FDConv2d.from_conv(conv).to(memory_format=torch.channels_last)
    for size in ((6, 6), (14, 14)):
        x = torch.randn(2, 24, *size).contiguous(memory_format=torch.channels_last)
        assert relative_error(layer(x), conv(x)) < 2e-6
        assert layer(x).stride() == conv(x).stride()
