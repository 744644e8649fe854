"""The layers against the literal equations, and from and to static ones."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fdconv_zoo import FDConv1d, FDConv2d, FDConv3d, FDLinear
from fdconv_zoo.layers.dynamic import ODConv2d
from fdconv_zoo.layers.ops import literal
from tests.compare import assert_matches, randomise, relative_error
from tests.layers.fdconv_configs import CONFIGS, draw_config, layer_and_input, on_grid, reference_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
few = settings(max_examples=20, derandomize=True, deadline=None)


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
    config = draw_config(data.draw, channels=7, side=14, bands=12)
    torch.manual_seed(0)
    layer, x = layer_and_input(config, recompute=data.draw(st.booleans()))
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


def test_a_layer_without_initial_weights_takes_those_of_another():
    layer, empty = randomise(FDConv2d(20, 24, 3)).eval(), FDConv2d(20, 24, 3, init_weights=False).eval()
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(2, 20, 9, 8)
    assert torch.equal(empty(x), layer(x))


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


@pytest.mark.parametrize(
    ("kind", "static", "changes"),
    [
        (FDConv2d, nn.Conv2d, {"dilation": (2, 2), "padding": (2, 2)}),
        (FDConv2d, nn.Conv2d, {"padding": 0}),
        (FDConv2d, nn.Conv2d, {"padding": "same", "dilation": 2}),
        (FDConv2d, nn.Conv2d, {"stride": 2}),
        (FDConv1d, nn.Conv1d, {"padding": (0,), "dilation": (3,)}),
        (FDConv3d, nn.Conv3d, {"padding": (0, 2, 1)}),
        (ODConv2d, nn.Conv2d, {"dilation": (2, 2), "padding": (2, 2)}),
    ],
)
def test_stride_padding_and_dilation_may_be_set_later(kind, static, changes):
    """As those who dilate a finished network do."""
    conv = static(17, 3, 3, padding=1)
    layer = kind.from_conv(conv)
    for name, value in changes.items():
        setattr(layer, name, value)
        values = value if isinstance(value, str | tuple) else (value,) * len(conv.kernel_size)
        setattr(conv, name, values)
    # nn.Conv2d makes its own numbers of "same" when it is built.
    if conv.padding == "same":
        conv = static(17, 3, 3, padding="same", dilation=conv.dilation).requires_grad_(False)
        conv.load_state_dict(layer.static_twin().state_dict())
    x = torch.randn(2, 17, *[9] * len(conv.kernel_size))
    torch.testing.assert_close(layer(x), conv(x), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.static_twin()(x), conv(x), rtol=0, atol=1e-5)


def test_a_stride_that_same_padding_has_no_answer_to_is_refused_later_too():
    layer = FDConv2d(17, 3, 3, padding="same")
    with pytest.raises(ValueError, match="padding='same' needs stride 1, but stride=2"):
        layer.stride = 2
    with pytest.raises(ValueError, match="one number, or 2"):
        layer.dilation = (1, 2, 3)
    assert (layer.stride, layer.dilation, layer.pads) == ((1, 1), (1, 1), (1, 1, 1, 1))


def test_a_scripted_layer_changes_its_mode():
    layer, x = randomise(FDConv2d(17, 3, 3)).eval(), torch.randn(2, 17, 5, 5)
    scripted = torch.jit.script(layer)
    torch.testing.assert_close(scripted.train().eval()(x), layer(x), rtol=1e-4, atol=1e-5)
