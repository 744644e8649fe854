"""FDConv1d and FDConv3d against the literal equations, and beside the static convolutions they stand for."""

import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fdconv_zoo import FDConv1d, FDConv2d, FDConv3d
from fdconv_zoo.layers.ops import literal, literal_volume
from tests.compare import assert_matches, randomise, relative_error

# Cin, Cout, kernel, keywords, lengths of (B, ...)
SEQUENCES = {
    "3": (6, 4, 3, {"padding": 1, "num_bands": 4}, (2, 17)),
    "5, stride, dilation": (5, 7, 5, {"stride": 2, "padding": 3, "dilation": 2, "num_bands": 8}, (3, 20)),
    "4, same": (4, 5, 4, {"padding": "same", "num_bands": 6}, (2, 9)),
    "1": (6, 9, 1, {"num_bands": 5, "bias": False}, (2, 7)),
    "3, no ksm": (6, 4, 3, {"num_bands": 4, "ksm": False}, (2, 8)),
    "3, other cutoffs": (6, 4, 3, {"padding": 1, "num_bands": 4, "cutoffs": (1 / 3, 1 / 10)}, (2, 13)),
    "3, no fbm": (6, 4, 3, {"padding": "valid", "num_bands": 4, "fbm": False}, (2, 8)),
}
VOLUMES = {
    "3": (3, 4, 3, {"padding": 1, "num_bands": 4}, (2, 4, 5, 6)),
    "sides": (2, 3, (3, 2, 1), {"stride": (1, 2, 1), "padding": (1, 0, 2), "num_bands": 5}, (2, 5, 4, 3)),
    "dilation": (2, 3, (1, 2, 3), {"dilation": (1, 2, 1), "num_bands": 4, "bias": False}, (2, 3, 6, 5)),
    "same": (2, 3, 2, {"padding": "same", "num_bands": 4}, (2, 3, 4, 3)),
    "1": (4, 5, 1, {"num_bands": 3}, (2, 2, 3, 2)),
    "3, no ksm": (3, 4, 3, {"num_bands": 4, "ksm": False}, (1, 4, 3, 5)),
    "3, no fbm": (2, 3, 3, {"padding": 1, "num_bands": 4, "fbm": False}, (2, 3, 3, 4)),
    "3, other cutoffs": (2, 3, 3, {"padding": 1, "num_bands": 4, "cutoffs": (1 / 3, 1 / 10)}, (2, 7, 9, 8)),
}
CASES = {f"1d {name}": (FDConv1d, *case) for name, case in SEQUENCES.items()}
CASES |= {f"3d {name}": (FDConv3d, *case) for name, case in VOLUMES.items()}
on_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
STATIC = {FDConv1d: nn.Conv1d, FDConv3d: nn.Conv3d}
# That padding an even kernel copies the input is torch's remark.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def layer_and_input(case, dtype=torch.float64, **more):
    cls, in_channels, out_channels, kernel, keywords, (batch, *sides) = case
    layer = randomise(cls(in_channels, out_channels, kernel, **keywords, **more, dtype=dtype))
    return layer, torch.randn(batch, in_channels, *sides, dtype=dtype)


def of_sequences(state, x, shape, stride=1, padding=0, dilation=1, **known):
    """The literal equations of maps, one pixel wide."""
    state = dict(state)
    if "fbm.weight" in state:
        state["fbm.weight"] = F.pad(state["fbm.weight"].unsqueeze(-1), (1, 1))
    padding = padding if isinstance(padding, str) else (padding, 0)
    wide = literal.fdconv2d(state, x.unsqueeze(-1), (*shape, 1), stride=(stride, 1), padding=padding,
                            dilation=(dilation, 1), **known)  # fmt: skip
    return wide.squeeze(-1)


def reference_of(layer, case, training):
    known = {key: value for key, value in case[4].items() if key not in ("bias", "fbm")}
    run = of_sequences if case[0] is FDConv1d else literal_volume.fdconv3d
    return partial(run, shape=layer.static_shape, training=training, **known)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@on_cases
def test_forward_and_backward_are_those_of_the_literal_equations(case, training):
    layer, x = layer_and_input(case)
    training = training and len(x) > 1
    assert_matches(layer.train(training), x, reference_of(layer, case, training), tol=1e-9 if training else 1e-11)


@on_cases
def test_from_conv_computes_the_same_function(case):
    cls, in_channels, out_channels, kernel, keywords, (batch, *sides) = case
    static = {key: value for key, value in keywords.items() if key in ("stride", "padding", "dilation", "bias")}
    own = {key: value for key, value in keywords.items() if key not in static}
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 3e-6)):
        conv = STATIC[cls](in_channels, out_channels, kernel, **static, dtype=dtype).eval()
        layer = cls.from_conv(conv, **own)
        x = torch.randn(batch, in_channels, *sides, dtype=dtype)
        assert relative_error(layer(x), conv(x)) < tolerance
        assert not layer.training
        twin = layer.static_twin()
        assert type(twin) is STATIC[cls]
        assert relative_error(twin.weight, conv.weight) < tolerance
        assert relative_error(twin(x), conv(x)) < tolerance
        assert layer.fdw.spectrum.norm().item() == pytest.approx(conv.weight.norm().item(), rel=tolerance)
        other = STATIC[cls](in_channels, out_channels, kernel, **static, dtype=dtype)
        randomise(layer).set_static(other.weight, other.bias)
        assert relative_error(layer(x), other(x)) < tolerance
        randomise(layer).reset_modulation()
        assert relative_error(layer(x), layer.static_twin()(x)) < tolerance


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ("1d 5, stride, dilation", "3d sides") else pytest.mark.slow)
        for name in CASES
    ],
)
def test_scripted_and_exported_layers_compute_the_same(name):
    layer, x = layer_and_input(CASES[name])
    layer.eval()
    larger = torch.randn(3, *x.shape[1:-1], x.shape[-1] + 2, dtype=x.dtype)
    scripted = torch.jit.script(layer)
    free = {0: torch.export.Dim.DYNAMIC, x.dim() - 1: torch.export.Dim.DYNAMIC}
    example = torch.randn(2, *x.shape[1:], dtype=x.dtype)
    exported = torch.export.export(layer, (example,), dynamic_shapes=(free,)).module()
    for sample in (example, larger, x[:1]):
        assert relative_error(scripted(sample), layer(sample)) < 1e-11
        assert relative_error(exported(sample), layer(sample)) < 1e-11


@pytest.mark.slow
@pytest.mark.parametrize("name", ["1d 3", "3d 3"])
def test_compiled_layers_compute_the_same(name):
    torch.compiler.reset()
    layer, x = layer_and_input(CASES[name])
    compiled = torch.compile(layer.eval(), fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(x), layer(x)) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["1d 3", "3d 3"])
def test_autocast_and_half_precision(name, dtype):
    layer, x = layer_and_input(CASES[name], torch.float32)
    expected = layer.eval()(x)
    with torch.autocast("cpu", dtype=dtype):
        assert layer(x).dtype == dtype
        assert relative_error(layer(x), expected) < 0.03
    assert relative_error(layer.to(dtype)(x.to(dtype)), expected) < 0.2


@pytest.mark.parametrize("name", ["1d 3", "3d 3"])
def test_a_batch_of_one_an_empty_batch_and_second_derivatives(name):
    layer, x = layer_and_input(CASES[name])
    layer.eval()
    assert relative_error(layer(x[:1]), layer(x)[:1]) < 1e-12
    assert layer(x[:0]).shape == (0, *layer(x).shape[1:])
    assert torch.autograd.gradgradcheck(layer, (x.requires_grad_(),), fast_mode=True)


@pytest.mark.parametrize("cls", [FDConv1d, FDConv3d])
def test_impossible_layers_and_inputs_are_named(cls):
    with pytest.raises(ValueError, match=f"groups=2, but {cls.__name__} has one weight matrix"):
        cls(18, 20, 3, groups=2)
    with pytest.raises(ValueError, match="padding='reflect', but it must be a number"):
        cls(18, 20, 3, padding="reflect")
    with pytest.raises(ValueError, match="padding='same' needs stride 1"):
        cls(18, 20, 3, padding="same", stride=2)
    with pytest.raises(ValueError, match=r"kernel_size=\(3, 3\), but"):
        cls(18, 20, (3, 3))
    with pytest.raises(ValueError, match=r"Conv2d may compute something else than nn.Conv[13]d"):
        cls.from_conv(nn.Conv2d(18, 20, 3))
    with pytest.raises(ValueError, match="padding_mode='circular', but"):
        cls.from_conv(STATIC[cls](18, 20, 3, padding_mode="circular"))
    layer = cls(18, 20, 1, num_bands=8).eval()
    with pytest.raises(ValueError, match=f"{cls.__name__} takes a batch of 18 channels"):
        layer(torch.zeros(2, 17, *[4] * len(layer.stride)))
    with pytest.raises(ValueError, match=f"but {cls.__name__} takes a batch"):
        layer(torch.zeros(18, *[4] * len(layer.stride)))
    with pytest.raises(ValueError, match="int64"):
        layer(torch.zeros(2, 18, *[4] * len(layer.stride)).long())


@pytest.mark.parametrize("name", ["1d 3", "3d 3"])
def test_layers_are_leaves_of_fx(name):
    layer, x = layer_and_input(CASES[name])
    graph = torch.fx.symbolic_trace(nn.Sequential(layer.eval(), nn.Flatten()))
    assert relative_error(graph(x), layer(x).flatten(1)) < 1e-14


@pytest.mark.parametrize("name", ["1d 3", "3d 3"])
def test_batch_norm_is_absorbed(name):
    layer, x = layer_and_input(CASES[name])
    norm = nn.BatchNorm1d(layer.out_channels) if layer.static_class is nn.Conv1d else nn.BatchNorm3d(layer.out_channels)
    norm = randomise(norm.double()).eval()
    expected = norm(layer.eval()(x))
    layer.absorb_batch_norm(norm)
    assert relative_error(layer(x), expected) < 1e-12
    assert layer.weight.shape == layer.static_twin().weight.shape


@pytest.mark.parametrize("cls", [FDConv1d, FDConv3d])
def test_state_dicts_tell_the_cutoffs(cls):
    source = randomise(cls(18, 20, 3, num_bands=8))
    cls(18, 20, 3, num_bands=8).load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match=r"was saved, which has mask_grid=None, cutoffs=\(1/4, 1/8, 1/16\)"):
        cls(18, 20, 3, num_bands=8, cutoffs=(1 / 3, 1 / 8, 1 / 16)).load_state_dict(source.state_dict())


def test_options_are_those_of_the_layer_of_maps():
    of_maps = inspect.signature(FDConv2d).parameters
    for cls in (FDConv1d, FDConv3d):
        own = inspect.signature(cls).parameters
        assert set(of_maps) - set(own) == {"mask_grid", "recompute", "fused"}
        assert all(own[name].default == of_maps[name].default for name in own)
