import gc
import importlib
import re
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers.ops import literal
from fdconv_zoo.layers.ops.eager import bands, limits
from tests.compare import assert_matches, randomise, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
few = settings(max_examples=20, derandomize=True, deadline=None)

# Cin, Cout, kernel, keywords of nn.Conv2d and FDConv2d, input (B, H, W)
CONFIGS = {
    "3x3": (6, 4, 3, {"padding": 1, "num_bands": 8}, (2, 7, 9)),
    "3x3 odd channels, uneven groups": (5, 7, 3, {"padding": 1, "num_bands": 13}, (3, 6, 5)),
    "3x3 of a large map": (4, 3, 3, {"padding": 1, "num_bands": 4}, (2, 17, 16)),
    "3x3 more filters than places": (4, 20, 3, {"padding": 1, "num_bands": 8}, (2, 3, 4)),
    "3x3 stride, more filters than places": (4, 20, 3, {"stride": 2, "padding": 1, "num_bands": 8}, (3, 7, 8)),
    "1x1 more filters than places": (6, 24, 1, {"num_bands": 5, "bias": False}, (2, 4, 5)),
    "1x1 stride, more filters than places": (6, 24, 1, {"stride": 2, "num_bands": 5}, (2, 7, 9)),
    "3x3 stride": (4, 6, 3, {"stride": 2, "padding": 1, "num_bands": 4}, (2, 9, 8)),
    "3x3 stride, large map": (4, 6, 3, {"stride": 2, "padding": 1, "num_bands": 4}, (2, 27, 26)),
    "3x3 strides and paddings": (4, 5, 3, {"stride": (2, 3), "padding": (0, 2), "num_bands": 6}, (2, 8, 11)),
    "3x3 dilation": (4, 5, 3, {"padding": 2, "dilation": 2, "num_bands": 6}, (2, 8, 7)),
    "3x3 dilations, large map": (3, 4, 3, {"padding": (2, 3), "dilation": (2, 3), "num_bands": 5}, (2, 14, 15)),
    "3x3 without padding": (4, 5, 3, {"num_bands": 6}, (2, 5, 6)),
    "3x3 same": (4, 5, 3, {"padding": "same", "dilation": (1, 2), "num_bands": 6}, (2, 5, 6)),
    "3x3 valid": (4, 5, 3, {"padding": "valid", "bias": False, "num_bands": 6}, (2, 5, 6)),
    "2x2 same": (4, 5, 2, {"padding": "same", "num_bands": 6}, (2, 5, 6)),
    "2x3 same": (4, 5, (2, 3), {"padding": "same", "num_bands": 6}, (2, 5, 6)),
    "3x2 same, large map": (3, 4, (3, 2), {"padding": "same", "num_bands": 6}, (2, 12, 13)),
    "4x2 same, large map": (3, 4, (4, 2), {"padding": "same", "dilation": (1, 3), "num_bands": 6}, (2, 12, 13)),
    "1x3": (5, 4, (1, 3), {"padding": (0, 1), "num_bands": 7}, (2, 6, 5)),
    "3x1": (5, 4, (3, 1), {"padding": (1, 0), "num_bands": 7}, (2, 6, 5)),
    "5x5": (3, 4, 5, {"padding": 2, "num_bands": 7}, (2, 6, 6)),
    "1x1": (6, 8, 1, {"num_bands": 5}, (2, 6, 5)),
    "1x1 odd": (7, 5, 1, {"num_bands": 6, "bias": False}, (2, 3, 3)),
    "1x1 of a large map": (6, 8, 1, {"num_bands": 5}, (2, 16, 15)),
    "1x1 stride": (6, 8, 1, {"stride": 2, "num_bands": 5}, (2, 7, 6)),
    "1x1 padding": (6, 8, 1, {"padding": 1, "num_bands": 5}, (2, 4, 6)),
    "1x1 stride and padding": (6, 8, 1, {"stride": (1, 3), "padding": (2, 1), "num_bands": 5}, (2, 7, 6)),
    "3x3 on one pixel": (6, 4, 3, {"padding": 1, "num_bands": 4}, (2, 1, 1)),
    "3x3 on one row": (6, 4, 3, {"padding": 1, "num_bands": 4}, (2, 1, 9)),
    "1x1 on one pixel": (6, 4, 1, {"num_bands": 4}, (3, 1, 1)),
    "more samples than groups": (4, 5, 3, {"padding": 1, "num_bands": 3}, (5, 6, 5)),
    "more samples than groups, large map": (4, 5, 1, {"num_bands": 2}, (4, 12, 12)),
    "one group": (4, 5, 3, {"padding": 1, "num_bands": 1}, (2, 5, 5)),
    "one coefficient a group": (3, 2, 1, {"num_bands": 4}, (2, 5, 5)),
    "one channel": (1, 3, 3, {"padding": 1, "num_bands": 2}, (2, 5, 5)),
    "one filter": (6, 1, 1, {"num_bands": 2}, (2, 5, 5)),
    "wide hidden layer": (40, 6, 1, {"num_bands": 5, "reduction": 1 / 2}, (2, 4, 4)),
    "other cutoffs": (4, 5, 3, {"padding": 1, "num_bands": 5, "cutoffs": (0.4, 0.2)}, (2, 9, 10)),
    "no ksm": (4, 5, 3, {"padding": 1, "num_bands": 5, "ksm": False}, (2, 9, 10)),
    "no fbm": (4, 5, 3, {"padding": 1, "num_bands": 5, "fbm": False}, (2, 9, 10)),
    "fdw only": (4, 5, 3, {"padding": 1, "num_bands": 5, "fbm": False, "ksm": False}, (2, 13, 10)),
}
on_grid = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def layer_and_input(config, dtype=torch.float64, **overrides):
    in_channels, out_channels, kernel, keywords, (batch, height, width) = config
    layer = randomise(FDConv2d(in_channels, out_channels, kernel, dtype=dtype, **(keywords | overrides)))
    return layer, torch.randn(batch, in_channels, height, width, dtype=dtype)


def reference_of(layer, config):
    known = ("stride", "padding", "dilation", "cutoffs", "ksm", "num_bands")
    keywords = {key: value for key, value in config[3].items() if key in known}
    return partial(literal.fdconv2d, shape=layer.static_shape, training=layer.training, **keywords)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@on_grid
def test_conv_matches_the_reference(config, training):
    layer, x = layer_and_input(config)
    layer.train(training)
    # Batch statistics of a handful of samples can be tiny, which costs digits.
    assert_matches(layer, x, reference_of(layer, config), tol=1e-9 if training else 1e-11)


@pytest.mark.parametrize("name", ["3x3", "3x3 of a large map", "1x1", "3x3 dilation", "more samples than groups"])
def test_conv_matches_the_reference_in_float32(name):
    layer, x = layer_and_input(CONFIGS[name], torch.float32)
    assert_matches(layer.eval(), x, reference_of(layer, CONFIGS[name]), tol=1e-5)


@few
@given(data=st.data())
def test_conv_matches_the_reference_on_random_configurations(data):
    draw = data.draw
    pair = partial(st.tuples, *(2 * [st.integers(1, 3)]))
    kernel, stride, dilation = draw(pair()), draw(pair()), draw(pair())
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    in_channels, out_channels = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    batch, height, width = draw(st.integers(1, 4)), draw(st.integers(1, 14)), draw(st.integers(1, 14))
    extents = [n + 2 * p - d * (k - 1) for n, p, d, k in zip((height, width), padding, dilation, kernel, strict=True)]
    assume(min(extents) >= 1)
    coefficients = out_channels * kernel[0] * (in_channels * kernel[1] // 2 + 1)
    keywords = {"stride": stride, "padding": padding, "dilation": dilation, "bias": draw(st.booleans())}
    keywords |= {"num_bands": draw(st.integers(1, min(coefficients, 12))), "ksm": draw(st.booleans())}
    config = (in_channels, out_channels, kernel, keywords, (batch, height, width))
    torch.manual_seed(0)
    layer, x = layer_and_input(config, recompute=draw(st.booleans()))
    assert_matches(layer.eval(), x, reference_of(layer, config), tol=1e-10)


@pytest.mark.parametrize("name", ["3x3", "3x3 of a large map", "1x1", "1x1 of a large map"])
def test_a_batch_of_one_in_eval(name):
    layer, x = layer_and_input(CONFIGS[name])
    assert_matches(layer.eval(), x[:1], reference_of(layer, CONFIGS[name]), tol=1e-11)


LINEAR = {
    "(B, C)": (6, 9, {"num_bands": 5}, (3,)),
    "(B, N, C)": (6, 9, {"num_bands": 5}, (3, 10)),
    "(B, H, W, C)": (7, 4, {"num_bands": 6, "bias": False}, (2, 4, 5)),
    "(B, T, H, W, C)": (5, 4, {"num_bands": 6}, (2, 2, 3, 2)),
    "many places": (6, 9, {"num_bands": 5}, (2, 12, 13)),
    "more samples than groups": (6, 9, {"num_bands": 2}, (4, 7)),
    "no ksm": (6, 9, {"num_bands": 5, "ksm": False}, (3, 10)),
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("config", LINEAR.values(), ids=LINEAR.keys())
def test_linear_matches_the_reference(config, training):
    in_features, out_features, keywords, leading = config
    layer = randomise(FDLinear(in_features, out_features, dtype=torch.float64, **keywords)).train(training)
    known = {key: value for key, value in keywords.items() if key != "bias"}
    run = partial(literal.fdlinear, shape=(out_features, in_features), training=training, **known)
    x = torch.randn(*leading, in_features, dtype=torch.float64)
    assert_matches(layer, x, run, tol=1e-9 if training else 1e-11)


def test_linear_of_a_view_that_is_not_contiguous():
    layer = randomise(FDLinear(6, 9, num_bands=5, dtype=torch.float64)).eval()
    x = torch.randn(3, 6, 4, 5, dtype=torch.float64)
    assert relative_error(layer(x.permute(0, 2, 3, 1)), layer(x.permute(0, 2, 3, 1).contiguous())) < 1e-14


# --- every way of computing it


def set_limits(monkeypatch, **changed):
    monkeypatch.setattr(limits, "CPU", limits.CPU._replace(**changed))


@pytest.mark.parametrize("name", ["3x3", "3x3 of a large map", "1x1", "more samples than groups, large map"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_chunks_change_nothing(name, recompute, samples, monkeypatch):
    config = (*CONFIGS[name][:4], (5, *CONFIGS[name][4][1:]))
    layer, x = layer_and_input(config, recompute=recompute)
    set_limits(monkeypatch, chunk=samples * layer.fdw.rows * layer.fdw.columns)
    assert_matches(layer.eval(), x, reference_of(layer, config), tol=1e-11)


@pytest.mark.parametrize("elements", [1, 150, 400])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3 odd channels, uneven groups", "1x1 of a large map", "more samples than groups"])
def test_blocks_change_nothing(name, recompute, elements, monkeypatch):
    set_limits(monkeypatch, block=elements)
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    assert_matches(layer.eval(), x, reference_of(layer, CONFIGS[name]), tol=1e-11)


@pytest.mark.parametrize("elements", [1, 150, 400])
@pytest.mark.parametrize("ksm", [False, True])
def test_blocks_change_nothing_for_one_sample_and_without_gates(ksm, elements, monkeypatch):
    set_limits(monkeypatch, block=elements)
    layer, x = layer_and_input(CONFIGS["3x3"], ksm=ksm)
    run = partial(reference_of(layer.eval(), CONFIGS["3x3"]), ksm=ksm)
    assert_matches(layer, x[:1], run, tol=1e-11)
    assert_matches(layer, x, run, tol=1e-11)


@pytest.mark.parametrize(
    "changed",
    [
        {"places": 0},
        {"places": 1 << 30},
        {"bank": 0},
        {"packed": 0},
        limits.OTHER._asdict(),
        {"matrix_places": 0},
    ],
    ids=str,
)
@on_grid
def test_each_way_to_make_and_to_apply_the_weights(config, changed, monkeypatch):
    changed = dict(changed)
    monkeypatch.setattr(bands, "MATRIX_PLACES", changed.pop("matrix_places", bands.MATRIX_PLACES))
    set_limits(monkeypatch, **changed)
    layer, x = layer_and_input(config)
    assert_matches(layer.eval(), x, reference_of(layer, config), tol=1e-11)
    assert_matches(layer, x.contiguous(memory_format=torch.channels_last), reference_of(layer, config), 1e-11)


@on_grid
def test_recomputing_changes_nothing(config):
    layer, x = layer_and_input(config)
    results = []
    for recompute in (False, True):
        layer.recompute = recompute
        out = layer(x.requires_grad_())
        grads = torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])
        results.append([out.detach(), *grads])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*results, strict=True))


def test_recomputing_leaves_frozen_parameters_alone():
    layer, x = layer_and_input(CONFIGS["3x3"])
    for frozen in (layer.fdw.spectrum, layer.fbm.weight, layer.ksm.local_conv.weight):
        frozen.requires_grad_(False)
    layer(x).sum().backward()
    given = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert given == {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3", "3x3 of a large map", "1x1", "more samples than groups", "no ksm"])
def test_parameters_get_the_same_gradients_where_the_input_needs_none(name, recompute):
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x.requires_grad_()).sin().sum(), parameters)
    got = torch.autograd.grad(layer(x.detach()).sin().sum(), parameters)
    assert all(relative_error(a, b) < 1e-13 for a, b in zip(got, expected, strict=True))
    layer.requires_grad_(False)
    only_input = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    layer.requires_grad_(True)
    assert relative_error(only_input, torch.autograd.grad(layer(x).sin().sum(), x)[0]) < 1e-13


def test_recomputing_keeps_less_for_the_backward_pass():
    weights = 4 * 24 * 32 * 9
    largest = {}
    for recompute in (False, True):
        # Held, so that no address is used again: what tests before this one left alive is not the layer's.
        earlier = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        addresses = {id(thing) for thing in earlier}
        layer = FDConv2d(24, 32, 3, padding=1, recompute=recompute)
        x = torch.randn(4, 24, 8, 8, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            out = layer(x)
        # Functions with a backward pass of their own keep tensors on their context too.
        alive = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and id(thing) not in addresses]
        kept += [thing.numel() for thing in alive]
        largest[recompute] = max(kept)
        del out, alive, earlier
    assert largest[True] < weights <= largest[False]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3", "1x1", "more samples than groups, large map"])
def test_the_graph_can_be_walked_twice(name, recompute):
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    inputs = [x.requires_grad_(), *layer.parameters()]
    out = layer(x).sin().sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    again = torch.autograd.grad(out, inputs)
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3 without padding", "1x1", "one filter"])
def test_gradcheck(name, recompute):
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer.eval(), dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x[:, :, :4, :4].clone().requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


# --- from and to static layers


@on_grid
def test_from_conv_computes_the_same_function(config):
    in_channels, out_channels, kernel, keywords, (batch, height, width) = config
    static = {key: value for key, value in keywords.items() if key in ("stride", "padding", "dilation", "bias")}
    own = {key: value for key, value in keywords.items() if key not in static}
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        conv = nn.Conv2d(in_channels, out_channels, kernel, **static, dtype=dtype).eval()
        layer = FDConv2d.from_conv(conv, **own)
        x = torch.randn(batch, in_channels, height, width, dtype=dtype)
        assert relative_error(layer(x), conv(x)) < tolerance
        assert not layer.training
        assert layer.fdw.spectrum.norm().item() == pytest.approx(conv.weight.norm().item(), rel=tolerance)
        twin = layer.static_twin()
        assert relative_error(twin.weight, conv.weight) < tolerance
        assert relative_error(twin(x), conv(x)) < tolerance


def test_from_conv_trains_as_the_conv_does_at_first():
    conv = nn.Conv2d(20, 24, 3, padding=1)
    layer = FDConv2d.from_conv(conv)
    x = torch.randn(4, 20, 9, 8)
    assert layer.training
    assert relative_error(layer(x), conv(x)) < 2e-6
    layer(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [False, True])
def test_from_linear_computes_the_same_function(bias):
    linear = nn.Linear(24, 40, bias=bias, dtype=torch.float64)
    layer = FDLinear.from_linear(linear)
    x = torch.randn(3, 5, 2, 24, dtype=torch.float64)
    assert relative_error(layer(x), linear(x)) < 1e-14
    assert relative_error(layer.static_twin()(x), linear(x)) < 1e-14
    assert layer.fdw.spectrum.norm().item() == pytest.approx(linear.weight.norm().item(), rel=1e-14)


def test_from_conv_keeps_dtype_and_frozen_weights():
    conv = nn.Conv2d(20, 24, 3).to(torch.bfloat16)
    conv.weight.requires_grad_(False)
    layer = FDConv2d.from_conv(conv)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert not layer.fdw.spectrum.requires_grad
    assert layer.bias.requires_grad
    assert not layer.static_twin().weight.requires_grad


@pytest.mark.parametrize(
    "options", [{"lr": 0.2}, {"lr": 0.1, "weight_decay": 0.3}, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}]
)
def test_sgd_on_the_layer_moves_it_as_sgd_moves_the_conv(options):
    conv = nn.Conv2d(5, 8, 3, padding=1, dtype=torch.float64)
    layer = FDConv2d.from_conv(conv, num_bands=6)
    trained = [layer.fdw.spectrum, layer.bias]
    optimizers = (torch.optim.SGD(conv.parameters(), **options), torch.optim.SGD(trained, **options))
    for _ in range(3):
        x = torch.randn(4, 5, 6, 7, dtype=torch.float64)
        for module, optimizer in zip((conv, layer), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).tanh().square().mean().backward()
            optimizer.step()
        twin = layer.static_twin()
        assert relative_error(twin.weight.detach(), conv.weight.detach()) < 1e-13
        assert relative_error(twin.bias.detach(), conv.bias.detach()) < 1e-13


def test_initialised_as_the_static_layers_are():
    layer = FDConv2d(64, 96, 3)
    bound = (64 * 9) ** -0.5
    weight = layer.static_twin().weight
    assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.02)
    assert layer.bias.abs().max() <= bound
    before = layer.fdw.spectrum.clone()
    randomise(layer).reset_parameters()
    x = torch.randn(2, 64, 5, 5)
    assert relative_error(layer(x), layer.static_twin()(x)) < 2e-6
    assert not torch.equal(layer.fdw.spectrum, before)


# --- dtypes and memory formats


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


# --- errors


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"groups": 2}, "groups=2, .*only groups=1"),
        ({"num_bands": 0}, "num_bands=0, but a 96x72 weight matrix has 1 to 3552 bands"),
        ({"num_bands": 3553}, "num_bands=3553, but"),
        ({"cutoffs": (1 / 8, 1 / 4)}, r"cutoffs=\(0.125, 0.25\), but they must fall"),
        ({"cutoffs": (0.7,)}, r"cutoffs=\(0.7,\), but they must fall"),
        ({"mask_grid": 1}, "mask_grid=1, but it must be None or at least 2"),
        ({"padding": "reflect"}, "padding='reflect', but it must be a number, a pair, 'same' or 'valid'"),
        ({"padding": "same", "stride": 2}, "padding='same' needs stride 1, but stride=2"),
    ],
)
def test_impossible_layers_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        FDConv2d(24, 32, 3, **keywords)


@pytest.mark.parametrize("num_bands", [0, 417])
def test_impossible_linear_layers_are_named(num_bands):
    with pytest.raises(ValueError, match=f"num_bands={num_bands}, but a 32x24 weight matrix has 1 to 416 bands"):
        FDLinear(24, 32, num_bands=num_bands)


@pytest.mark.parametrize("shape", [(24, 8, 8), (2, 23, 8, 8), (2, 8, 8, 24), (2, 24, 8), (2, 24, 8, 8, 1)])
def test_inputs_that_do_not_fit_a_conv_are_named(shape):
    with pytest.raises(ValueError, match=r"\(B, 24, H, W\)") as error:
        FDConv2d(24, 32, 3)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


@pytest.mark.parametrize("shape", [(24,), (2, 23), (2, 24, 8)])
def test_inputs_that_do_not_fit_a_linear_layer_are_named(shape):
    with pytest.raises(ValueError, match=r"\(B, \.\.\., 24\)") as error:
        FDLinear(24, 32)(torch.zeros(shape))
    assert str(list(shape)) in str(error.value)


def test_groups_and_other_paddings_of_a_static_layer_are_named():
    with pytest.raises(ValueError, match="groups=4"):
        FDConv2d.from_conv(nn.Conv2d(24, 32, 3, groups=4))
    with pytest.raises(ValueError, match="padding_mode='reflect', but FDConv2d pads with zeros only"):
        FDConv2d.from_conv(nn.Conv2d(24, 32, 3, padding=1, padding_mode="reflect"))


def test_a_batch_of_one_in_training_is_an_error_for_layers_too():
    for layer, x in ((FDConv2d(24, 32, 3), torch.randn(1, 24, 8, 8)), (FDLinear(24, 32), torch.randn(1, 9, 24))):
        with pytest.raises(ValueError, match="BatchNorm can't train on a batch of 1"):
            layer(x)
        layer.eval()(x)


def test_functions_named_in_the_batchnorm_error_exist():
    with pytest.raises(ValueError, match="batch of 1") as error:
        FDConv2d(20, 24, 3)(torch.zeros(1, 20, 5, 5))
    module, name = re.search(r"(timm\.\w+)\.(freeze_batch_norm_2d)", str(error.value)).groups()
    assert hasattr(importlib.import_module(module), name)


def test_a_frozen_bias_stays_frozen():
    conv, linear = nn.Conv2d(20, 24, 3), nn.Linear(20, 24)
    conv.bias.requires_grad_(False)
    linear.bias.requires_grad_(False)
    assert not FDConv2d.from_conv(conv).bias.requires_grad
    assert not FDLinear.from_linear(linear).bias.requires_grad
    assert not FDConv2d.from_conv(conv).static_twin().bias.requires_grad


@pytest.mark.parametrize("size", [(2, 2), (1, 1), (1, 9)])
def test_inputs_smaller_than_the_kernel_are_named(size):
    with pytest.raises(ValueError, match=f"{size[0]}, {size[1]}"):
        FDConv2d(20, 24, 3).eval()(torch.zeros(2, 20, *size))


def test_integer_inputs_are_named():
    for layer, x in ((FDConv2d(20, 24, 1), torch.zeros(2, 20, 5, 5)), (FDLinear(20, 24), torch.zeros(2, 20))):
        with pytest.raises(ValueError, match="int64"):
            layer.eval()(x.long())


@pytest.mark.parametrize("size", [5, 25])
def test_an_empty_batch(size):
    assert FDConv2d(20, 24, 3).eval()(torch.zeros(0, 20, size, size)).shape == (0, 24, size - 2, size - 2)
    assert FDLinear(20, 24).eval()(torch.zeros(0, size, 20)).shape == (0, size, 24)


def test_autocast_leaves_float64_alone_as_it_does_for_conv2d():
    conv, x = nn.Conv2d(20, 24, 3, dtype=torch.float64), torch.zeros(2, 20, 5, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.float64
        assert FDConv2d.from_conv(conv)(x).dtype == torch.float64


def test_second_derivatives_are_refused_not_wrong():
    layer = FDConv2d(20, 24, 3)
    x = torch.randn(2, 20, 5, 5, requires_grad=True)
    with pytest.raises(RuntimeError):
        (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        grad.sum().backward()


# --- construction on the meta device


@pytest.mark.parametrize("mask_grid", [None, 64])
def test_meta_construction(mask_grid):
    real = FDConv2d(24, 32, 3, mask_grid=mask_grid)
    with torch.device("meta"):
        layer = FDConv2d(24, 32, 3, mask_grid=mask_grid)
    assert all(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))
    assert layer(torch.empty(2, 24, 9, 9, device="meta")).shape == (2, 32, 7, 7)
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    layer.load_state_dict(real.state_dict())
    assert torch.equal(layer.fdw.band_index(), real.fdw.band_index())
    x = torch.randn(2, 24, 9, 9)
    assert torch.equal(layer.eval()(x), real.eval()(x))
