"""What a layer must bear from the network around it in eager mode."""

import pytest
import timm
import torch
from torch import nn

from fdconv_zoo import FDConv2d, FDLinear, summary
from fdconv_zoo.layers.ops.eager import limits
from fdconv_zoo.layers.ops.traced import dynamic_conv2d
from fdconv_zoo.layers.ops.types import Gates, Geometry, Inputs, Plan
from tests.compare import randomise, relative_error


def only_bands(gains):
    return Gates(gains, None, None, None, None, None)


@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("size", [5, 14])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("recompute", [True, False])
def test_the_output_may_be_changed_in_place(kernel_size, size, samples, recompute, monkeypatch):
    layer = randomise(FDConv2d(18, 20, kernel_size, bias=False, num_bands=4, recompute=recompute))
    chunk = samples * layer.fdw.rows * layer.fdw.columns
    monkeypatch.setattr(limits, "CPU", limits.CPU._replace(chunk=chunk))
    x = torch.randn(4, 18, size, size, requires_grad=True)
    expected = torch.autograd.grad(torch.relu(layer(x)).square().sum(), [x, *layer.parameters()])
    found = torch.autograd.grad(torch.relu_(layer(x)).square().sum(), [x, *layer.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_the_traceable_form_has_second_derivatives():
    layer = FDConv2d(3, 4, 3, padding=1, num_bands=2, dtype=torch.float64)
    made = layer.fdw()
    x, bands = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)

    def function(x, bands, spectrum):
        geometry = Geometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
        inputs = Inputs(x, only_bands(bands), made._replace(coefficients=spectrum))
        return dynamic_conv2d(inputs, geometry, for_onnx=False)

    inputs = [tensor.detach().requires_grad_() for tensor in (x, bands, made.coefficients)]
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_backward_pass_inside_of_autocast_stays_in_float32():
    layer = randomise(FDConv2d(18, 20, 3, padding=1, num_bands=4))
    x = torch.randn(4, 18, 9, 9)
    parameters = list(layer.fdw.parameters())
    expected = torch.autograd.grad(layer(x).square().mean(), parameters)
    loss = layer(x).square().mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(loss, parameters)
    assert relative_error(found[0], expected[0]) < 1e-6


def test_large_patches_are_not_unfolded():
    layer = FDConv2d(18, 20, 3, padding=1, num_bands=4)
    inputs = Inputs(torch.randn(8, 18, 40, 40), only_bands(torch.ones(8, 4)), layer.fdw())
    geometry = Geometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))
    plan = Plan.make(inputs, geometry, limits.CPU, channels_last=True)
    assert plan.chunk > 1
    assert plan.by_groups


def test_one_filter_of_one_column_on_a_large_map(monkeypatch):
    layer = randomise(FDConv2d(8, 1, (3, 1), padding=(1, 0), num_bands=4, dtype=torch.float64))
    x = torch.randn(2, 8, 40, 40, dtype=torch.float64)
    found = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    monkeypatch.setattr(limits, "CPU", limits.CPU._replace(places=1 << 30))
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-12


def test_subclasses_are_refused():
    with pytest.raises(ValueError, match="Conv2dSame"):
        FDConv2d.from_conv(timm.layers.Conv2dSame(20, 20, 3, stride=2))
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear"):
        FDLinear.from_linear(nn.modules.linear.NonDynamicallyQuantizableLinear(20, 20))


@pytest.mark.parametrize("tokens", [(3, 4), (16, 16)])
def test_linear_outputs_are_contiguous(tokens):
    assert FDLinear(18, 20, num_bands=4).eval()(torch.randn(2, *tokens, 18)).is_contiguous()


@pytest.mark.parametrize("shape", [(0, 18, 5, 5), (2, 18, 0, 5)])
def test_empty_inputs_have_gradients(shape):
    layer = FDConv2d(18, 20, 1, bias=False, num_bands=4).eval()
    output = layer(torch.zeros(shape))
    assert output.shape == (shape[0], 20, *shape[2:])
    output.sum().backward()
    assert layer.fdw.spectrum.grad.abs().max() == 0


@pytest.mark.parametrize(
    ("named", "arguments"),
    [
        ("stride=0", dict(stride=0)),
        ("dilation=0", dict(dilation=0)),
        ("padding=-1", dict(padding=-1)),
        ("reduction=-1", dict(reduction=-1)),
    ],
)
def test_bad_numbers_are_named(named, arguments):
    with pytest.raises(ValueError, match=named):
        FDConv2d(18, 20, 3, **arguments)


def test_a_lone_layer_is_one_report():
    assert [str(report) for report in summary(FDConv2d(18, 20, 3))] == [": 20x18x3x3 FDConv"]
