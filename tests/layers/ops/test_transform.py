"""The transforms of the eager implementation against the plain ones and their gradients."""

import pytest
import torch

from fdconv_zoo.layers import FDW
from fdconv_zoo.layers.ops import weight_matrices
from fdconv_zoo.layers.ops.eager.transform import Transform
from fdconv_zoo.layers.ops.types import Plan
from tests.compare import relative_error


def plan(packed):
    return Plan(
        channels_last=False, size=(1, 1), chunk=1, use_bank=False, by_groups=False, gate_input=False, packed=packed,
        block=1 << 20,
    )  # fmt: skip


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("size", [(256, 192), (255, 130), (1, 2), (2, 2), (3, 4), (5, 7), (64, 1)])
def test_transform_and_its_adjoint(size, samples, packed):
    if packed and size[1] % 2:
        packed = False  # an odd number of columns is never packed
    layer = FDW(*size, num_bands=min(9, size[0] * (size[1] // 2 + 1)), dtype=torch.float64)
    spectrum = torch.randn_like(layer.spectrum)  # not Hermitian: training does not keep it so
    gains = torch.rand(samples, layer.num_bands, dtype=torch.float64) + 0.5
    inputs = [spectrum.requires_grad_(), gains.requires_grad_()]
    made = layer()._replace(coefficients=spectrum)
    expected = weight_matrices(made, gains, size[1])
    direction = torch.randn_like(expected)
    expected_spectrum, expected_gains = torch.autograd.grad(expected, inputs, direction)
    with torch.no_grad():
        transform = Transform(made, size[1], plan(packed))
        assert relative_error(transform(gains), expected) < 1e-14
        grad_spectrum = torch.ones_like(spectrum)
        grad_gains = transform.adjoint(direction, gains, grad_spectrum)
    assert relative_error(grad_gains, expected_gains) < 1e-12
    assert relative_error(grad_spectrum - 1, expected_spectrum) < 1e-12


def test_large_weights_in_float32():
    layer = FDW(768, 1024)
    gains = torch.rand(2, 64) + 0.5
    wide = layer()._replace(coefficients=layer.spectrum.double())
    exact = weight_matrices(wide, gains.double(), 1024)
    with torch.no_grad():
        assert relative_error(Transform(layer(), 1024, plan(True))(gains), exact) < 1e-6
