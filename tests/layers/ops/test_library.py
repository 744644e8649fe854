"""The operators as torch knows them: under torch.compile as in eager mode, and by the rules of operators."""

import importlib
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers import FBM
from fdconv_zoo.layers.ops import registry, triton
from tests.compare import randomise, relative_error


@pytest.fixture(autouse=True)
def fresh_compiler():
    """What was compiled for one case counts against the limit of recompilations of the next."""
    torch.compiler.reset()


class Net(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.conv = FDConv2d(18, 24, 3, padding=1, stride=2, num_bands=8, **kwargs)
        self.pointwise = FDConv2d(24, 20, 1, bias=False, num_bands=8, **kwargs)
        self.linear = FDLinear(20, 18, num_bands=8, **kwargs)

    def forward(self, x):
        return self.linear(self.pointwise(self.conv(x).relu_()).relu_().permute(0, 2, 3, 1))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [14, 20])
def test_compiled_equals_eager_forward_and_backward(size, training, memory_format):
    net = randomise(Net()).train(training)
    x = torch.randn(4, 18, size, size).contiguous(memory_format=memory_format).requires_grad_()
    parameters = [x, *net.parameters()]
    output = net(x)
    grads = torch.autograd.grad(output.square().mean(), parameters)
    compiled_output = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    compiled_grads = torch.autograd.grad(compiled_output.square().mean(), parameters)
    assert relative_error(compiled_output, output) < 1e-5
    for grad, expected in zip(compiled_grads, grads, strict=True):
        assert relative_error(grad, expected) < 1e-4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("ksm", [True, False])
def test_weights_are_kept_under_the_compiler_too(ksm, training):
    """What the compiled forward pass keeps for the backward pass is as large as the weights, or not."""
    x = torch.randn(4, 18, 14, 14)
    largest = {}
    for recompute in (True, False):
        net = randomise(Net(recompute=recompute, ksm=ksm)).train(training)
        expected = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            output = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
        largest[recompute] = max(kept)
        grads = torch.autograd.grad(output.square().mean(), list(net.parameters()))
        for grad, wanted in zip(grads, expected, strict=True):
            assert relative_error(grad, wanted) < 1e-4
    weights = 4 * 18 * 24 * 9
    assert largest[True] < weights <= largest[False]


def layer_arguments(layer, x, channels_last, keep):
    spectrum = layer.fdw()
    gates = [None if gate is None else gate.detach() for gate in layer.ksm(x.mean((2, 3)))]
    geometry = layer.kernel_size, layer.stride, layer.pads, layer.dilation
    coefficients = spectrum.coefficients.detach().requires_grad_()
    bank, bias = None, layer.bias.detach()
    return x, *gates, coefficients, *spectrum.gain_map, bank, bias, -1, *geometry, channels_last, keep, True


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("ksm", [False, True])
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_operator_keeps_the_rules_of_operators(channels_last, ksm, keep):
    layer = randomise(FDConv2d(18, 20, 3, padding=1, num_bands=4, ksm=ksm, fbm=False)).eval()
    x = torch.randn(2, 18, 6, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(
        torch.ops.fdconv_zoo.dynamic_conv2d, layer_arguments(layer, x, channels_last, keep),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )  # fmt: skip


@pytest.mark.parametrize("size", [(6, 5), (20, 17)])
@pytest.mark.parametrize("mask_grid", [None, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_of_the_bands_keeps_the_rules_of_operators(dtype, size, mask_grid):
    fbm = randomise(FBM(3, mask_grid=mask_grid))
    x = torch.randn(2, 3, *size).contiguous(memory_format=torch.channels_last).to(dtype).requires_grad_()
    cutoffs = [number for fraction in fbm.cutoffs for number in fraction]
    torch.library.opcheck(torch.ops.fdconv_zoo.modulate_bands, (x, fbm.weight, fbm.bias, cutoffs, mask_grid, True))


def test_large_weights_are_compiled_as_in_eager_mode():
    """Weights large enough for a packed transform."""
    layer = randomise(FDLinear(96, 384)).eval()
    x = torch.randn(2, 16, 96)
    with torch.no_grad():
        assert relative_error(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x)) < 1e-6


def test_torch_counts_the_flops_of_the_operators():
    layer, x = FDConv2d(32, 32, 3, padding=1), torch.randn(2, 32, 14, 14)
    convolution = 2 * 2 * 32 * 32 * 9 * 14 * 14
    with FlopCounterMode(display=False) as forward:
        loss = layer(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert convolution < forward.get_total_flops() < 2.5 * convolution
    # The input needs no gradient: the weight's is one product; FBM adds its own.
    assert convolution < backward.get_total_flops() < 5 * convolution


def test_second_derivatives_under_the_compiler_are_right_or_refused():
    layer = randomise(FDConv2d(18, 20, 3, num_bands=4, dtype=torch.float64))
    x = torch.randn(2, 18, 6, 5, dtype=torch.float64, requires_grad=True)

    def second(layer):
        (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), x)[0]

    assert relative_error(second(torch.compile(layer, fullgraph=True, backend="eager")), second(layer)) < 1e-12
    with pytest.raises(RuntimeError, match="double backward"):
        second(torch.compile(layer, fullgraph=True, backend="aot_eager"))


def test_derivatives_of_the_backward_operators_themselves_are_refused():
    fbm = randomise(FBM(3))
    x, grad = torch.randn(2, 3, 6, 5, requires_grad=True), torch.randn(2, 3, 6, 5)
    cutoffs = [number for fraction in fbm.cutoffs for number in fraction]
    grads = torch.ops.fdconv_zoo.modulate_bands_backward(grad, x, fbm.weight, fbm.bias, cutoffs, None, True, True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        grads[0].sum().backward()


def test_a_second_import_keeps_the_operators():
    operator = torch.ops.fdconv_zoo.dynamic_conv2d
    importlib.reload(registry)
    assert torch.ops.fdconv_zoo.dynamic_conv2d is operator


@pytest.mark.parametrize(
    ("found", "installed"),
    [
        ({}, False),
        ({"triton-windows": "3.8.0.post29"}, True),
        ({"pytorch-triton": "3.5.1"}, False),
        ({"triton": "3.6.0"}, True),
    ],
)
def test_triton_by_any_name_of_its_distribution(found, installed, monkeypatch):
    """On Windows its distribution has another name: importing the package asks for it."""

    def version(name):
        if name not in found:
            raise PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(triton, "version", version)
    monkeypatch.setattr(triton, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton.is_installed() == installed
