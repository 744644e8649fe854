import pytest
import torch

from fdconv_zoo.layers.ops.onnx import inverse_dft, inverse_rfft2
from tests.compare import relative_error

SHAPES = [(1, 1), (7, 1), (1, 5), (2, 2), (3, 4), (12, 13), (251, 64), (64, 251), (96, 72), (512, 384)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-13)])
def test_inverse_rfft2(rows, columns, dtype, tolerance):
    spectrum = torch.randn(2, rows, columns // 2 + 1, 2, dtype=dtype)
    half = torch.view_as_complex(spectrum.double())
    expected = torch.fft.irfft2(half, s=(rows, columns), norm="ortho")
    actual = inverse_rfft2(spectrum, columns)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize(("count", "size"), [(1, 6), (4, 6), (6, 6), (5, 12), (3, 7), (7, 48)])
def test_inverse_dft_takes_missing_coefficients_for_zero(count, size):
    x = torch.randn(2, count, 3, dtype=torch.complex128)
    real, imaginary = inverse_dft(x.real.contiguous(), x.imag.contiguous(), size)
    expected = torch.fft.ifft(x, n=size, dim=1, norm="forward")
    assert relative_error(torch.view_as_real(torch.complex(real, imaginary)), torch.view_as_real(expected)) < 1e-14
