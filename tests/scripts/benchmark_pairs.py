"""A pair of tiny models for the tests of scripts/benchmark.py and its parts."""

from torch import nn

import fdconv_zoo
from benchmarking import models
from common.gates import move_gates


def tiny_pair(img_size=16, channels=20):
    static = nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.Flatten()
    )
    static.num_classes = channels * (img_size - 2) ** 2
    fdconv = nn.Sequential(
        static[0],
        nn.ReLU(),
        fdconv_zoo.FDConv2d.from_conv(static[2], num_bands=4),
        nn.Flatten(),
    )
    return models.Pair("tiny_fdconv", "tiny", move_gates(fdconv, 0), static, (3, img_size, img_size))
