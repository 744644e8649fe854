import pytest
import torch
from torch import nn

from fdconv_zoo import FDConv2d, create_conv2d, summary


@pytest.mark.parametrize(
    ("channels", "options", "kind"),
    [
        ((17, 17), {}, FDConv2d),
        ((16, 32), {}, nn.Conv2d),
        ((32, 16), {}, nn.Conv2d),
        ((32, 32), {"groups": 2}, nn.Conv2d),
        ((32, 32), {"padding_mode": "circular"}, nn.Conv2d),
        ((20, 24), {"dilation": 2, "bias": False, "num_bands": 8}, FDConv2d),
    ],
)
def test_the_rule_of_conversion(channels, options, kind):
    layer = create_conv2d(*channels, 3, stride=2, padding=1, **options)
    assert type(layer) is kind
    assert (layer.bias is None) == (not options.get("bias", True))
    static = {key: value for key, value in options.items() if key != "num_bands"}
    twin = nn.Conv2d(*channels, 3, stride=2, padding=1, **static)
    (report,) = summary(nn.Sequential(twin))
    assert report.replaced == (kind is FDConv2d)
    x = torch.randn(2, channels[0], 9, 10)
    assert layer(x).shape == twin(x).shape


@pytest.mark.parametrize(
    ("kernel", "kind"), [(1, FDConv2d), ((1, 9), FDConv2d), (3, FDConv2d), (4, nn.Conv2d), ((5, 5), nn.Conv2d)]
)
def test_large_kernels_stay_static(kernel, kind):
    assert type(create_conv2d(32, 32, kernel)) is kind
    (report,) = summary(nn.Sequential(nn.Conv2d(32, 32, kernel)))
    assert report.reason == ("" if kind is FDConv2d else "a large kernel: the paper's are of 1x1 and 3x3")


def test_large_kernels_of_other_dimensions():
    layers = [nn.Conv1d(32, 32, 9), nn.Conv1d(32, 32, 10), nn.Conv3d(32, 32, 3), nn.Conv3d(32, 32, (3, 3, 4))]
    assert [report.replaced for report in summary(nn.Sequential(*layers))] == [True, False, True, False]


def test_device_and_dtype():
    for channels in (8, 32):
        layer = create_conv2d(channels, 32, 1, device="meta", dtype=torch.bfloat16)
        assert {(p.device.type, p.dtype) for p in layer.parameters()} == {("meta", torch.bfloat16)}


def test_an_unknown_keyword_is_an_error():
    with pytest.raises(TypeError, match="num_band"):
        create_conv2d(32, 32, 3, num_band=4)
