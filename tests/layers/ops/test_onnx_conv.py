"""The convolution that exporters to ONNX see against the one of other exporters."""

import pytest
import torch

from fdconv_zoo.layers.fourier import band_index, make_gain_map
from fdconv_zoo.layers.ops import onnx_conv, traced
from fdconv_zoo.layers.ops.types import Gates, Geometry, Inputs, Spectrum
from tests.compare import relative_error

CHANNELS, FILTERS, BATCH, BANDS = 6, 10, 3, 4
GEOMETRIES = [  # kernel, stride, padding (left, right, top, bottom), dilation
    Geometry((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)),
    Geometry((1, 1), (2, 1), (0, 0, 0, 0), (1, 1)),
    Geometry((1, 1), (2, 2), (1, 0, 2, 1), (1, 1)),
    Geometry((3, 3), (1, 1), (1, 1, 1, 1), (1, 1)),
    Geometry((3, 3), (1, 1), (0, 0, 0, 0), (1, 1)),
    Geometry((3, 3), (1, 2), (2, 1, 0, 3), (2, 1)),
    Geometry((3, 3), (2, 2), (1, 1, 1, 1), (1, 1)),
    Geometry((3, 3), (2, 1), (1, 2, 0, 1), (1, 2)),
    Geometry((1, 3), (2, 1), (1, 1, 1, 0), (3, 2)),
    Geometry((3, 1), (1, 2), (0, 1, 1, 2), (2, 3)),
    Geometry((2, 5), (1, 1), (2, 2, 0, 1), (1, 1)),
]


def make_inputs(geometry, gated, dtype):
    kh, kw = geometry.kernel_size
    rows, columns = FILTERS * kh, CHANNELS * kw
    coefficients = torch.randn(rows, columns // 2 + 1, 2, dtype=dtype)
    gain_map = make_gain_map(band_index(rows, columns, BANDS), BANDS, columns)

    def gate(*shape):
        return torch.rand(BATCH, *shape, dtype=dtype) + 0.5 if gated else None

    gates = Gates(
        bands=torch.rand(BATCH, BANDS, dtype=dtype) + 0.5,
        channels=gate(CHANNELS),
        filters=gate(FILTERS),
        positions=gate(kh * kw) if kh * kw > 1 else None,
        local_input=torch.randn(BATCH, CHANNELS, dtype=dtype) if gated else None,
        local_weight=torch.randn(rows * kw, 1, 5, dtype=dtype) if gated else None,
    )
    return Inputs(torch.randn(BATCH, CHANNELS, 9, 7, dtype=dtype), gates, Spectrum(coefficients, gain_map))


@pytest.mark.parametrize("many", [0, 1 << 30], ids=["gated map", "gated weight"])
@pytest.mark.parametrize("gated", [True, False], ids=["gates", "no gates"])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_it_is_the_convolution_of_other_exporters(geometry, gated, many, monkeypatch):
    monkeypatch.setattr(onnx_conv, "MANY", many)
    inputs = make_inputs(geometry, gated, torch.float64)
    expected = traced.dynamic_conv2d(inputs, geometry)
    assert expected.shape[2:] == geometry.output_size(9, 7)
    assert relative_error(traced.dynamic_conv2d(inputs, geometry, for_onnx=True), expected) < 1e-12


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_gates_are_not_rounded_to_the_dtype_of_the_map(geometry):
    inputs = make_inputs(geometry, True, torch.float32)
    inputs = inputs._replace(x=inputs.x.bfloat16())
    expected = traced.dynamic_conv2d(inputs, geometry)
    actual = traced.dynamic_conv2d(inputs, geometry, for_onnx=True)
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual.float(), expected.float()) < 2e-2


@pytest.mark.parametrize("kw", [1, 3])
def test_taps_make_the_logits_of_the_dense_gate(kw):
    pooled, weight = torch.randn(3, 20, dtype=torch.float64), torch.randn(2 * 3 * kw, 1, 5, dtype=torch.float64)
    logits = torch.matmul(onnx_conv.taps(pooled, 5, kw), weight.reshape(6, -1).t())
    assert relative_error(logits.transpose(1, 2), traced.local_logits(pooled, weight, kw)) < 1e-14
