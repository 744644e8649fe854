"""The transforms of eager mode against the plain ones and their gradients."""

import pytest
import torch

from fdconv_zoo.layers import transform
from fdconv_zoo.layers.fdw import FDW, synthesize
from tests.compare import relative_error


@pytest.mark.parametrize("packed_elements", [0, 1 << 30])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("size", [(256, 192), (255, 130), (1, 2), (2, 2), (3, 4), (5, 7), (64, 1)])
def test_transform_and_its_adjoint(size, samples, packed_elements, monkeypatch):
    monkeypatch.setattr(transform, "PACKED_ELEMENTS", packed_elements)
    layer = FDW(*size, num_bands=min(9, size[0] * (size[1] // 2 + 1)), dtype=torch.float64)
    spectrum = torch.randn_like(layer.spectrum)  # not Hermitian: training does not keep it so
    gains = torch.rand(samples, layer.num_bands, dtype=torch.float64) + 0.5
    inputs = [spectrum.requires_grad_(), gains.requires_grad_()]
    expected = synthesize(*inputs, layer.gain_map(), size[1])
    direction = torch.randn_like(expected)
    expected_spectrum, expected_gains = torch.autograd.grad(expected, inputs, direction)
    with torch.no_grad():
        layer_transform = transform.Transform(spectrum, layer.gain_map(), size[1])
        assert relative_error(layer_transform(gains), expected) < 1e-14
        grad_spectrum = torch.ones_like(spectrum)
        grad_gains = layer_transform.adjoint(direction, gains, grad_spectrum)
    assert relative_error(grad_gains, expected_gains) < 1e-12
    assert relative_error(grad_spectrum - 1, expected_spectrum) < 1e-12


def test_large_weights_in_float32():
    layer = FDW(768, 1024)
    gains = torch.rand(2, 64) + 0.5
    exact = synthesize(layer.spectrum.double(), gains.double(), layer.gain_map(), 1024)
    with torch.no_grad():
        assert relative_error(transform.Transform(layer.spectrum, layer.gain_map(), 1024)(gains), exact) < 1e-6
