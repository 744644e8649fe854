import io
import math

import onnxruntime
import pytest
import torch

from fdconv_zoo import FDConv1d, FDConv2d, FDConv3d, FDLinear
from fdconv_zoo.layers.fourier import band_index, make_gain_map
from fdconv_zoo.layers.ops import traced
from fdconv_zoo.layers.ops.onnx import chain, factors, inverse_dft, turned, weight_matrices
from fdconv_zoo.layers.ops.types import Spectrum
from tests.compare import randomise, relative_error

SHAPES = [(1, 1), (7, 1), (1, 5), (2, 2), (3, 4), (12, 13), (251, 64), (64, 251), (96, 72), (105, 126), (512, 384)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-13)])
def test_weights_are_those_of_the_fourier_transform(rows, columns, dtype, tolerance):
    num_bands = min(8, rows * (columns // 2 + 1))
    gain_map = make_gain_map(band_index(rows, columns, num_bands), num_bands, columns)
    coefficients = torch.randn(rows, columns // 2 + 1, 2, dtype=torch.float64)
    gains = torch.rand(2, num_bands, dtype=torch.float64) + 0.5
    expected = traced.weight_matrices(Spectrum(coefficients, gain_map), gains, columns)
    actual = weight_matrices(Spectrum(coefficients.to(dtype), gain_map), gains.to(dtype), columns)
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < tolerance


@pytest.mark.parametrize("radices", [[1], [7], [2, 3], [3, 2], [4, 3, 5], [5, 2, 2], [2, 2, 2, 2], [3, 5]])
@pytest.mark.parametrize("half", [False, True], ids=["complex", "real"])
def test_a_chain_of_products_is_an_inverse_transform(radices, half):
    size = math.prod(radices)
    transform = inverse_dft(radices, half)
    x = torch.randn(size // 2 + 1 if half else size, 3, dtype=torch.complex128)
    parts = torch.view_as_real(x).transpose(1, 2)[transform.order].flatten(0, 1)[None]
    made = chain(parts, transform.matrices, 3)
    if half:
        assert relative_error(made[0], torch.fft.irfft(x, n=size, dim=0, norm="forward")) < 1e-14
    else:
        expected = torch.fft.ifft(x, dim=0, norm="forward")
        assert relative_error(made[0], torch.cat([expected.real, expected.imag])) < 1e-14


@pytest.mark.parametrize("size", [1, 2, 13, 64, 251, 502, 1536, 2048])
def test_factors_leave_no_large_composite(size):
    parts = factors(size)
    assert math.prod(parts) == size
    assert all(part <= 32 or factors(part) == [part] for part in parts)
    assert max(parts) <= 16 or size in (251, 502)


@pytest.mark.parametrize(("rows", "columns"), [(1024, 520), (1544, 400), (1021, 521), (12, 7)])
def test_matrices_are_transposed_in_blocks(rows, columns):
    x = torch.arange(2 * rows * columns).view(2, rows, columns)
    assert torch.equal(turned(x, rows, columns), x.transpose(1, 2))


FREE = {0: "batch", 2: "height", 3: "width"}
MAPS = [(2, 18, 8, 8), (1, 18, 8, 8), (3, 18, 9, 14), (2, 18, 16, 5)]
TRACED = {
    "whole layer": (lambda: FDConv2d(18, 20, 3, padding=1, num_bands=8), MAPS, FREE),
    "no ksm": (lambda: FDConv2d(18, 20, 3, stride=2, num_bands=8, ksm=False), MAPS, FREE),
    "neither ksm nor fbm": (lambda: FDConv2d(18, 20, 3, num_bands=8, ksm=False, fbm=False), MAPS, FREE),
    "official masks": (lambda: FDConv2d(18, 20, 3, padding=1, num_bands=8, mask_grid=64), MAPS, FREE),
    "pointwise": (lambda: FDConv2d(18, 20, 1, num_bands=8), MAPS, FREE),
    "sequences": (
        lambda: FDConv1d(18, 20, 5, padding=2, num_bands=8),
        [(2, 18, 9), (3, 18, 16)],
        {0: "batch", 2: "length"},
    ),
    "volumes": (lambda: FDConv3d(18, 20, 2, num_bands=8), [(2, 18, 4, 5, 6), (3, 18, 5, 7, 4)], FREE | {4: "depth"}),
    "linear": (lambda: FDLinear(18, 20, num_bands=8), [(2, 5, 18), (1, 5, 18), (3, 7, 18)], {0: "batch", 1: "tokens"}),
}


@pytest.mark.parametrize("free", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("make", "shapes", "axes"), TRACED.values(), ids=TRACED.keys())
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_the_tracing_exporter(make, shapes, axes, free):
    """`dynamo=False`, the default up to torch 2.8, which ultralytics calls."""
    layer, file = randomise(make()).eval(), io.BytesIO()
    dynamic = {"input": axes, "output": axes} if free else None
    torch.onnx.export(
        layer, (torch.randn(shapes[0]),), file, dynamo=False,
        input_names=["input"], output_names=["output"], dynamic_axes=dynamic,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in shapes if free else shapes[:1]:
        x = torch.randn(shape)
        (output,) = session.run(None, {"input": x.numpy()})
        assert relative_error(torch.from_numpy(output), layer(x)) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_the_exporter_of_graphs_with_official_masks():
    layer, file = randomise(FDConv2d(18, 20, 3, padding=1, num_bands=8, mask_grid=64)).eval(), io.BytesIO()
    free = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    torch.onnx.export(layer, (torch.randn(MAPS[0]),), file, dynamo=True, dynamic_shapes=(free,), optimize=False)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for shape in MAPS:
        x = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert relative_error(torch.from_numpy(output), layer(x)) < 1e-5
