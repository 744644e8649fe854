"""What the registered models share: options of their layers as keyword arguments, and how often groups are sorted."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import GroupNorm1
from torch import nn

from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.layers import fdw
from fdconv_zoo.pretrained import PretrainedError


def layers_of(name, **kwargs):
    return [layer for _, layer in named_fd_layers(timm.create_model(name, **kwargs))]


def test_options_reach_the_layers():
    layers = layers_of(
        "resnet18_fdconv", num_bands=8, reduction=1 / 4, cutoffs=(0.3,), mask_grid=64, recompute=False,
        ksm_norm_layer=partial(nn.GroupNorm, 1), ksm_act_layer=nn.ReLU,
    )  # fmt: skip
    for layer in layers:
        assert layer.fdw.num_bands == 8
        assert layer.fdw.official_order
        assert layer.ksm.fc.out_features == max(layer.in_channels // 4, 16)
        assert layer.fbm.cutoffs == [(3, 10)]
        assert layer.fbm.mask_grid == 64
        assert not layer.recompute
        assert isinstance(layer.ksm.norm, nn.GroupNorm)
        assert isinstance(layer.ksm.act, nn.ReLU)
    assert all(layer.fbm is None for layer in layers_of("resnet18_fdconv", fbm=False))
    assert all(layer.ksm.local_conv is None for layer in layers_of("mobilenetv2_100_fdconv", ksm=False))


def test_the_norm_of_the_network_is_timms():
    model = timm.create_model("resnet18_fdconv", norm_layer=GroupNorm1)
    assert isinstance(model.bn1, GroupNorm1)
    assert isinstance(model.layer1[0].conv1.ksm.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(("name", "reduction"), [("convnext_atto_fdconv", 1 / 64), ("swin_tiny_fdconv", 1 / 32)])
def test_a_family_has_a_reduction_of_its_own(name, reduction):
    default, chosen = layers_of(name), layers_of(name, reduction=1 / 2)
    assert [layer.ksm.fc.out_features for layer in default] == [
        max(int(layer.static_shape[1] * reduction), 16) for layer in default
    ]
    assert all(layer.ksm.fc.out_features == layer.static_shape[1] // 2 for layer in chosen)


@pytest.mark.parametrize(
    ("name", "unknown", "known"),
    [
        ("resnet18_fdconv", {"bands": 8}, ("num_bands", "mask_grid", "ksm_norm_layer", "drop_path_rate")),
        ("swin_tiny_fdconv", {"mask_grid": 64}, ("num_bands", "recompute", "window_size")),
        ("convnext_atto_fdconv", {"fbm": False}, ("reduction", "conv_mlp")),
        ("mobilenetv2_100_fdconv", {"cutoffs": (0.3,)}, ("mask_grid", "stem_size")),
    ],
)
def test_an_unknown_keyword_lists_the_known_ones(name, unknown, known):
    with pytest.raises(TypeError, match=f"no keyword argument {next(iter(unknown))}; ") as error:
        timm.create_model(name, **unknown)
    for keyword in known:
        assert keyword in str(error.value)


def test_groups_are_sorted_once_for_each_size(monkeypatch):
    sorted_sizes = []
    band_index = fdw.band_index

    def count(*size):
        sorted_sizes.append(size)
        return band_index(*size)

    monkeypatch.setattr(fdw, "band_index", count)
    layers = layers_of("resnet50_fdconv")
    assert len(sorted_sizes) == len(set(sorted_sizes)) == len({(la.fdw.rows, la.fdw.columns) for la in layers})
    twins = [layer for layer in layers if layer.static_shape == layers[1].static_shape]
    assert len(twins) > 1
    assert torch.equal(twins[0].fdw.gain_index, twins[1].fdw.gain_index)
    # Modules that share a buffer would list it once.
    assert twins[0].fdw.gain_index.data_ptr() != twins[1].fdw.gain_index.data_ptr()


def test_the_official_name_of_the_bands_is_told():
    with pytest.raises(TypeError, match=r"no keyword argument kernel_num \(the official name of num_bands\); "):
        timm.create_model("resnet18_fdconv", kernel_num=8)


@pytest.fixture(scope="module")
def static():
    torch.manual_seed(1)
    return timm.create_model("resnet18").state_dict()


class TestWeightsThatFollow:
    """With pretrained weights the random ones are never transformed, and none of their places is left."""

    def create(self, weights, **kwargs):
        torch.manual_seed(0)
        overlay = {"state_dict": weights}
        return timm.create_model("resnet18_fdconv", pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)

    @pytest.mark.parametrize("kwargs", [{}, {"num_classes": 3}, {"features_only": True}, {"in_chans": 1}])
    def test_every_number_is_what_it_is_where_they_are_transformed(self, static, kwargs):
        one = self.create(static, **kwargs).state_dict()
        other = self.create(static, pretrained_strict=False, **kwargs).state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)

    def test_each_weight_is_transformed_once(self, static, monkeypatch):
        transforms = []
        monkeypatch.setattr(fdw, "to_spectrum", lambda matrix: transforms.append(matrix))
        self.create(static)
        assert not transforms

    @pytest.mark.parametrize("kwargs", [{"num_classes": 3}, {"features_only": True}])
    def test_weights_without_a_layer_are_refused(self, static, kwargs):
        partly = {key: value for key, value in static.items() if not key.startswith("layer3.1.")}
        with pytest.raises(PretrainedError, match=r"lack 2 of its layers.*layer3\.1\.conv1.*pretrained_strict=False"):
            self.create(partly, **kwargs)
        drawn = self.create(partly, pretrained_strict=False, **kwargs)
        assert all(value.isfinite().all() for value in drawn.state_dict().values())
