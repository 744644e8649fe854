"""What a layer refuses, and how it says so."""

import functools
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from fdconv_zoo import FDConv1d, FDConv2d, FDConv3d, FDLinear
from fdconv_zoo.layers import ksm


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


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_bands": "8"}, "num_bands='8', but it must be an integer"),
        ({"num_bands": 8.0}, "num_bands=8.0, but it must be an integer"),
        ({"num_bands": True}, "num_bands=True, but it must be an integer"),
        ({"reduction": True}, "reduction=True, but it must be a number"),
        ({"cutoffs": (True,)}, r"cutoffs=\(True,\), but it must be a sequence of numbers"),
        ({"mask_grid": True}, "mask_grid=True, but it must be None or an integer"),
        ({"reduction": "1/16"}, "reduction='1/16', but it must be a number"),
        ({"cutoffs": 0.25}, "cutoffs=0.25, but it must be a sequence of numbers"),
        ({"cutoffs": "0.25"}, "cutoffs='0.25', but it must be a sequence of numbers"),
        ({"mask_grid": "64"}, "mask_grid='64', but it must be None or an integer"),
    ],
)
def test_options_of_another_type_are_named(keywords, message):
    with pytest.raises(TypeError, match=message):
        FDConv2d(24, 32, 3, **keywords)


@pytest.mark.parametrize("layer", [FDConv1d, FDConv2d, FDConv3d, FDLinear])
def test_the_official_name_of_the_bands_is_told(layer):
    with pytest.raises(TypeError, match=rf"{layer.__name__} .*kernel_num \(the official name of num_bands\)"):
        layer(24, 32, 3, kernel_num=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'bands'"):
        layer(24, 32, 3, bands=8)


@pytest.mark.parametrize("num_bands", [-1, 10**12])
@pytest.mark.parametrize("ksm", [False, True])
def test_impossible_numbers_of_bands_are_named_before_anything_is_made(ksm, num_bands):
    with pytest.raises(ValueError, match=f"num_bands={num_bands}, but a 96x72 weight matrix"):
        FDConv2d.from_conv(nn.Conv2d(24, 32, 3), num_bands=num_bands, ksm=ksm)


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


def test_functions_named_in_the_batchnorm_warning_exist():
    ksm._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="batch of one") as caught:
        FDConv2d(20, 24, 3)(torch.zeros(1, 20, 5, 5))
    text = re.search(r"norm_layer=functools\.(partial\(nn\.GroupNorm, 1\))", str(caught[0].message)).group(1)
    norm_layer = eval(text, {"partial": functools.partial, "nn": nn})
    FDConv2d(20, 24, 3, norm_layer=norm_layer)(torch.zeros(1, 20, 5, 5))
    timm.create_model("mobilenetv2_100_fdconv", ksm_norm_layer=norm_layer, device="meta")


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


NONE = {
    "conv": (lambda **kwargs: FDConv2d(18, 20, 3, padding=1, num_bands=4, **kwargs), [(2, 18, 0, 5), (0, 18, 5, 5)]),
    "conv1d": (lambda **kwargs: FDConv1d(18, 20, 3, padding=1, num_bands=4, **kwargs), [(2, 18, 0), (0, 18, 5)]),
    "conv3d": (lambda **kwargs: FDConv3d(18, 20, 1, num_bands=4, **kwargs), [(0, 18, 5, 5, 5)]),
    "linear": (lambda **kwargs: FDLinear(18, 20, num_bands=4, **kwargs), [(2, 0, 18), (0, 5, 18), (0, 18)]),
}


@pytest.mark.parametrize("kind", NONE)
def test_nothing_has_gradients_for_all_parameters_and_leaves_the_statistics(kind):
    make, shapes = NONE[kind]
    for shape in shapes:
        layer = make(norm_layer=nn.BatchNorm2d if shape[0] else lambda channels: nn.GroupNorm(1, channels)).train()
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        out = layer(torch.zeros(shape))
        assert out.numel() == 0
        out.sum().backward()
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in layer.parameters())
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
        assert layer.training and layer.ksm.norm.training


def test_padding_alone_is_no_map():
    with pytest.raises(ValueError, match="nothing to convolve but padding"):
        FDConv2d(18, 20, 3, padding=2, num_bands=4)(torch.zeros(2, 18, 0, 0))


@pytest.mark.parametrize("wrap", [nn.utils.weight_norm, nn.utils.spectral_norm, prune.identity])
@pytest.mark.filterwarnings("ignore")
def test_computed_weights_are_refused(wrap):
    options = {"name": "weight"} if wrap is prune.identity else {}
    for make, layer in ((FDConv2d.from_conv, nn.Conv2d(18, 20, 3)), (FDLinear.from_linear, nn.Linear(18, 20))):
        with pytest.raises(ValueError, match="its weight is computed from"):
            make(wrap(layer, **options))


def test_autocast_leaves_float64_alone_as_it_does_for_conv2d():
    conv, x = nn.Conv2d(20, 24, 3, dtype=torch.float64), torch.zeros(2, 20, 5, 5, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.float64
        assert FDConv2d.from_conv(conv)(x).dtype == torch.float64
