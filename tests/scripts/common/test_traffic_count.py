"""Bytes and kernels of operations, and of FDConv's operators by what they launch."""

import torch

from common.traffic import traffic_of
from fdconv_zoo import FDConv2d


def test_reads_and_writes_once_and_views_never():
    a, b = torch.ones(10, 4), torch.ones(10, 4, dtype=torch.float64)
    traffic = traffic_of(lambda: (a.t().contiguous(), b.add_(1), torch.empty(1 << 20)), "cpu")
    assert sum(traffic.bytes.values()) == 2 * 160 + 320
    assert sum(traffic.kernels.values()) == 2


def test_operators_of_the_layers_count_as_what_they_launch():
    layer, x = FDConv2d(5, 4, 3, num_bands=2).eval(), torch.ones(2, 5, 6, 6)
    with torch.no_grad():
        traffic = traffic_of(lambda: layer(x), "cpu")
    assert not any(name.startswith("fdconv_zoo") for name in traffic.kernels)
    assert sum(traffic.kernels.values()) > 20
