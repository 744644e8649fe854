import math

import pytest
import timm
import torch
from torch import nn

from fdconv_zoo.cost import count_macs, count_parameters
from fdconv_zoo.layers import FDW
from fdconv_zoo.layers.fdconv import FDConv2d


class Transform(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "flops"),
    [
        # input (1, 3, 8, 16)
        (lambda x: torch.fft.fft(torch.complex(x, x)), 3 * 8 * 5 * 16 * 4),
        (lambda x: torch.fft.fft2(torch.complex(x, x)), 3 * 5 * 128 * 7),
        (lambda x: torch.fft.fft(torch.complex(x, x), dim=1), 8 * 16 * 5 * 3 * math.log2(3)),
        (lambda x: torch.fft.rfft(x), 3 * 8 * 5 * 16 * 4 / 2),
        (lambda x: torch.fft.rfft2(x), 3 * 5 * 128 * 7 / 2),
        # the half spectrum of 16 columns, seen as complex input of 16 columns, gives 30 real ones
        (lambda x: torch.fft.irfft2(torch.complex(x, x)), 3 * 5 * 240 * math.log2(240) / 2),
        (lambda x: torch.fft.irfft2(torch.complex(x, x), s=(8, 31)), 3 * 5 * 248 * math.log2(248) / 2),
    ],
)
def test_fourier_transforms_are_counted_by_hand(function, flops):
    assert count_macs(Transform(function), (3, 8, 16)) == round(flops) // 2


def test_convolutions_and_linears_are_counted_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    assert count_macs(model, (3, 8, 8)) == 4 * 4 * 9 * 3 * 8 + 128 * 10
    assert count_parameters(model) == 8 * 3 * 9 + 8 + 1280 + 10


@pytest.mark.parametrize(
    ("name", "gmacs", "mparams"),
    # timm's results/benchmark-infer-amp-nchw-pt113-cu117-rtx3090.csv
    [("resnet50", 4.11, 25.56), ("mobilenetv2_100", 0.31, 3.50), ("swin_tiny_patch4_window7_224", 4.51, 28.29)],
)
def test_static_models_agree_with_published_figures(name, gmacs, mparams):
    model = timm.create_model(name)
    assert count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(gmacs, rel=0.04 if gmacs < 1 else 0.006)
    assert count_parameters(model) / 1e6 == pytest.approx(mparams, abs=0.006)


def test_the_transforms_of_fdw_are_counted_by_hand():
    class Synthesis(nn.Module):
        def __init__(self):
            super().__init__()
            self.fdw = FDW(rows=96, columns=80, num_bands=16)

        def forward(self, x):
            return self.fdw.matrices(x.new_ones(1, 16))

    flops = 41 * 5 * 96 * math.log2(96) + 96 * 5 * 80 * math.log2(80) / 2
    assert count_macs(Synthesis(), (3, 8, 8)) == pytest.approx(flops / 2, abs=1)


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_fdconv_costs_a_little_more_than_the_convolution(kernel_size):
    conv = nn.Conv2d(64, 128, kernel_size, padding="same")
    static = count_macs(conv, (64, 28, 28))
    assert static == 28 * 28 * 64 * 128 * kernel_size**2
    assert static < count_macs(FDConv2d.from_conv(conv), (64, 28, 28)) < 1.15 * static


def test_the_model_is_left_as_it_was():
    model = timm.create_model("resnet18")
    model.layer1.eval()
    training = {name: module.training for name, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    count_macs(model, (3, 64, 64))
    assert {name: module.training for name, module in model.named_modules()} == training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("input_size", [(224, 224), (3, 0, 224), (1, 3, 224, 224)])
def test_bad_input_size_is_named(input_size):
    with pytest.raises(ValueError, match="input_size must be"):
        count_macs(nn.Identity(), input_size)
