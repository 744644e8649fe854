"""KSM's gates by their kernel, against KSM without it in float64."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers.ksm import KSM
from fdconv_zoo.layers.ops.triton import gates
from tests.compare import randomise, relative_error


@pytest.fixture
def launches(monkeypatch):
    """Samples of each launch."""
    made = []
    original = gates.gates_of_hidden
    monkeypatch.setattr(gates, "gates_of_hidden", lambda *a, **named: made.append(len(a[0])) or original(*a, **named))
    return made


def random_ksm(in_channels, out_channels, kernel_size, **kwargs):
    torch.manual_seed(0)
    return randomise(KSM(in_channels, out_channels, kernel_size, **kwargs)).eval()


def gates_by(ksm, pooled, by_kernels):
    with torch.no_grad():
        return ksm(pooled, by_kernels)


@pytest.mark.parametrize("batch", [1, 17, 70])
@pytest.mark.parametrize(
    "config",
    [
        {"in_channels": 24, "out_channels": 40, "kernel_size": (3, 3), "num_bands": 8},
        {"in_channels": 100, "out_channels": 7, "kernel_size": (1, 1), "reduction": 1},
        {"in_channels": 5, "out_channels": 3, "kernel_size": (2, 3), "modulate_weight": False, "num_bands": 65},
    ],
    ids=["3x3", "wide hidden layer", "fdw only"],
)
def test_gates_are_those_of_the_modules(config, batch, launches):
    ksm = random_ksm(**config)
    pooled = torch.randn(batch, config["in_channels"])
    found = gates_by(ksm, pooled, True)
    expected = gates_by(copy.deepcopy(ksm).double(), pooled.double(), False)
    assert launches == [batch]
    for value, wanted in zip(found, expected, strict=True):
        assert (value is None) == (wanted is None)
        if value is not None:
            assert value.dtype == torch.float32
            assert relative_error(value, wanted) < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_of_half_precision_parameters(dtype, launches):
    ksm = random_ksm(24, 16, (3, 3), num_bands=8).to(dtype)
    pooled = torch.randn(4, 24)
    expected = gates_by(copy.deepcopy(ksm).double(), pooled.double(), False)
    plain, found = gates_by(ksm, pooled, False), gates_by(ksm, pooled, True)
    assert launches == [4]
    assert found.bands.dtype == plain.bands.dtype
    assert relative_error(found.filters, expected.filters) <= 1.1 * relative_error(plain.filters, expected.filters)


class Inherited(nn.BatchNorm2d):
    """May compute something else."""


class Same(nn.Identity):
    """No normalisation, given the channels."""


@pytest.mark.parametrize(
    "norm_layer",
    [
        partial(nn.GroupNorm, 1),
        Inherited,
        partial(nn.BatchNorm2d, affine=False),
        Same,
    ],
)
def test_other_norms_compute_themselves(norm_layer, launches):
    ksm = random_ksm(24, 16, (1, 1), num_bands=8, norm_layer=norm_layer)
    pooled = torch.randn(3, 24)
    assert torch.equal(gates_by(ksm, pooled, True).bands, gates_by(ksm, pooled, False).bands)
    assert launches == []


def test_other_activations_compute_themselves(launches):
    ksm = random_ksm(24, 16, (1, 1), num_bands=8, act_layer=nn.GELU)
    pooled = torch.randn(3, 24)
    assert torch.equal(gates_by(ksm, pooled, True).bands, gates_by(ksm, pooled, False).bands)
    assert launches == []


@pytest.mark.parametrize("part", ["norm", "act", "heads"])
def test_hooked_parts_are_called(part, launches):
    ksm, called = random_ksm(24, 16, (1, 1), num_bands=8), []
    getattr(ksm, part).register_forward_hook(lambda *a: called.append(part))
    gates_by(ksm, torch.randn(3, 24), True)
    assert called == [part]
    assert launches == []


def test_gradients_and_training_go_by_the_modules(launches):
    ksm = random_ksm(24, 16, (1, 1), num_bands=8)
    pooled = torch.randn(3, 24)
    ksm(pooled, True).bands.sum().backward()
    assert ksm.heads.weight.grad is not None
    gates_by(ksm.train(), pooled, True)
    assert launches == []


@pytest.mark.parametrize("make", [partial(FDConv2d, 8, 12, 3, padding=1), partial(FDLinear, 8, 12)])
def test_layers_use_it(make, launches):
    torch.manual_seed(0)
    layer = randomise(make(num_bands=4)).eval()
    x = torch.randn(2, 8, 5, 5) if isinstance(layer, FDConv2d) else torch.randn(2, 5, 8)
    with torch.no_grad():
        found = layer(x)
        assert launches == [2]
        layer.fused = False
        expected = layer(x)
    assert launches == [2]
    assert relative_error(found, expected) < 1e-5


def test_nothing_is_launched_for_torch_func_or_an_exporter(launches):
    layer = randomise(FDLinear(8, 12, num_bands=4)).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        torch.func.vmap(lambda sample: layer(sample[None])[0], randomness="same")(x)
        torch.jit.trace(layer, x, check_trace=False)
        torch.jit.script(layer)(x)
    assert launches == []


def test_compiled_in_one_graph(launches):
    layer = randomise(FDConv2d(8, 12, 3, padding=1, num_bands=4)).eval()
    x = torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        del launches[:]
        torch._dynamo.reset()
        graphs = []

        def keep(graph, inputs):
            graphs.append(graph)
            return graph

        assert torch.equal(torch.compile(layer, fullgraph=True, backend=keep)(x), expected)
    assert "gates_of_hidden" in graphs[0].code
