"""Convolutions that see what came before alone are refused, as FDConv pools over what comes after too."""

import pytest
import torch
from torch import nn

from fdconv_zoo import convert_to_fdconv
from fdconv_zoo.choice import named_fd_layers


class PaddedBefore(nn.Module):
    """A causal convolution by another name."""

    def __init__(self, before=4):
        super().__init__()
        self.conv, self.before = nn.Conv1d(32, 32, 3, dilation=2), before

    def forward(self, x):
        return self.conv(nn.functional.pad(x, (self.before, 0)))


class PaddedByOthers(PaddedBefore):
    def forward(self, x):
        return self.conv(nn.functional.pad(x, [(3 - 1) * self.conv.dilation[0], 0], value=0.0))


class CutAfter(PaddedBefore):
    def forward(self, x):
        return self.conv(nn.functional.pad(x, (4, 4)))[..., : -self.before]


class CutToLength(nn.Module):
    """Padded by the convolution itself, and cut to the length that there was."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3, dilation=2, padding=4)

    def forward(self, x):
        return self.conv(x).narrow(2, 0, x.shape[2])


class PaddedAlike(PaddedBefore):
    def forward(self, x):
        first, last = x[:, :, :1], x[:, :, -1:]
        return self.conv(nn.functional.pad(torch.cat([first, x, last], 2), (1, 1)))[:, :, 0:]


@pytest.mark.parametrize("make", [PaddedBefore, PaddedByOthers, CutAfter, CutToLength])
def test_convolutions_of_what_came_before_are_refused(make):
    with pytest.raises(ValueError, match=r"1 layers \(conv\) are causal"):
        convert_to_fdconv(make(), num_bands=8)


@pytest.mark.parametrize("pad", [nn.ConstantPad1d((2, 0), 0.0), nn.ReplicationPad1d((2, 0)), nn.ZeroPad1d((2, 0))])
def test_convolutions_after_padding_before_are_refused(pad):
    with pytest.raises(ValueError, match=r"1 layers \(0.1\) are causal"):
        convert_to_fdconv(nn.Sequential(nn.Sequential(pad, nn.Conv1d(32, 32, 3)), nn.ReLU()), num_bands=8)


@pytest.mark.parametrize(
    "make", [PaddedAlike, lambda: nn.Sequential(nn.ConstantPad1d((1, 1), 0.0), nn.Conv1d(32, 32, 3), nn.ReLU())]
)
def test_convolutions_of_both_sides_are_not(make):
    assert len(list(named_fd_layers(convert_to_fdconv(make(), num_bands=8)))) == 1


class CausalConv(nn.Module):
    """A convolution that sees no later token, by padding of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 3)


def test_causal_convolutions_are_refused():
    with pytest.raises(ValueError, match=r"2 layers \(0.conv, 1.conv\) are causal"):
        convert_to_fdconv(nn.Sequential(CausalConv(), CausalConv()))
