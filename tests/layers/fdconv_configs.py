"""Layers of every kind, and the literal equations for each."""

from functools import partial

import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from fdconv_zoo import FDConv2d
from fdconv_zoo.layers.ops import literal
from tests.compare import randomise

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


def draw_config(draw, *, channels, side, bands):
    """A random one of those, by hypothesis' `draw`: channels, pixels of a side and groups at most."""
    pair = partial(st.tuples, *(2 * [st.integers(1, 3)]))
    kernel, stride, dilation = draw(pair()), draw(pair()), draw(pair())
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    in_channels, out_channels = draw(st.integers(1, channels)), draw(st.integers(1, channels))
    batch, height, width = draw(st.integers(1, 4)), draw(st.integers(1, side)), draw(st.integers(1, side))
    extents = [n + 2 * p - d * (k - 1) for n, p, d, k in zip((height, width), padding, dilation, kernel, strict=True)]
    assume(min(extents) >= 1)
    coefficients = out_channels * kernel[0] * (in_channels * kernel[1] // 2 + 1)
    keywords = {"stride": stride, "padding": padding, "dilation": dilation, "bias": draw(st.booleans())}
    keywords |= {"num_bands": draw(st.integers(1, min(coefficients, bands))), "ksm": draw(st.booleans())}
    return in_channels, out_channels, kernel, keywords, (batch, height, width)


def layer_and_input(config, dtype=torch.float64, **overrides):
    in_channels, out_channels, kernel, keywords, (batch, height, width) = config
    layer = randomise(FDConv2d(in_channels, out_channels, kernel, dtype=dtype, **(keywords | overrides)))
    return layer, torch.randn(batch, in_channels, height, width, dtype=dtype)


def reference_of(layer, config):
    known = ("stride", "padding", "dilation", "cutoffs", "ksm", "num_bands")
    keywords = {key: value for key, value in config[3].items() if key in known}
    return partial(literal.fdconv2d, shape=layer.static_shape, training=layer.training, **keywords)
