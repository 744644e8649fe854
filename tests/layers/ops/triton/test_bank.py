"""The bank's kernels against its plain operations in float64: sizes, groups, dtypes, chunks."""

import pytest
import torch

from fdconv_zoo.layers.fdw import FDW
from fdconv_zoo.layers.fourier import GainMap
from fdconv_zoo.layers.ops import bank
from fdconv_zoo.layers.ops.triton import bank as triton_bank
from tests.compare import relative_error

# (rows, columns, groups, kernel): odd and even sides, pairs of mirror images that a border cuts, a group for each.
SHAPES = [
    (12, 9, 5, (3, 3)),
    (7, 16, 63, (1, 1)),
    (1, 1, 1, (1, 1)),
    (5, 2, 3, (1, 2)),
    (2, 3, 4, (2, 1)),
    (40, 66, 16, (1, 1)),
]


def made(spectrum, gain_map, shape, dtype):
    """The bank by its operator, and the gradient of a fixed function of it."""
    _, columns, groups, kernel = shape
    spectrum = spectrum.detach().requires_grad_()
    weights = torch.ops.fdconv_zoo.bank(spectrum, *gain_map, groups, columns, kernel, dtype)
    direction = torch.linspace(-1, 1, weights.numel(), dtype=torch.float64).view_as(weights).sin()
    (grad,) = torch.autograd.grad(weights, spectrum, direction.to(dtype))
    return weights.detach(), grad


def spectrum_and_map(shape):
    rows, columns, groups, kernel = shape
    fdw = FDW(rows, columns, groups, kernel_size=kernel)
    return torch.randn_like(fdw.spectrum), GainMap(fdw.gain_index, fdw.gain_tiles)


@pytest.fixture
def launches(monkeypatch):
    """Names of what was launched."""
    names = []
    for name in ("spread_groups", "collect_groups"):
        original = getattr(triton_bank, name)
        monkeypatch.setattr(triton_bank, name, lambda *a, n=name, f=original: names.append(n) or f(*a))
    return names


@pytest.mark.parametrize(
    ("shape", "at_once"), [*((shape, None) for shape in SHAPES), (SHAPES[0], 1), (SHAPES[0], 2)], ids=str
)
def test_bank_and_gradient(shape, at_once, launches, monkeypatch):
    if at_once is not None:
        monkeypatch.setattr(bank, "CHUNK", at_once * shape[0] * shape[1])
    spectrum, gain_map = spectrum_and_map(shape)
    found = made(spectrum, gain_map, shape, torch.float32)
    times = 1 if at_once is None else -(-shape[2] // at_once)
    assert launches == ["spread_groups"] * times + ["collect_groups"] * times
    expected = made(spectrum.double(), gain_map, shape, torch.float64)
    assert len(launches) == 2 * times
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, wanted) < 2e-6


@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision(dtype, tol, launches):
    """Parameters and weights in 16 bits are transformed in float32."""
    shape = (24, 15, 6, (3, 3))
    spectrum, gain_map = spectrum_and_map(shape)
    spectrum = spectrum.to(dtype)
    found = made(spectrum, gain_map, shape, dtype)
    assert launches == ["spread_groups", "collect_groups"]
    expected = made(spectrum.double(), gain_map, shape, torch.float64)
    assert [value.dtype for value in found] == [dtype, dtype]
    for value, wanted in zip(found, expected, strict=True):
        assert relative_error(value, wanted) < tol


def test_a_piece_of_a_flat_vector(launches):
    """FSDP and DDP hold parameters so: at odd places, and not contiguous."""
    shape = (6, 10, 3, (1, 1))
    spectrum, gain_map = spectrum_and_map(shape)
    flat = torch.randn(2 * spectrum.numel() + 1)
    piece = flat[1:].view(*spectrum.shape, 2)[..., 0]
    expected = made(piece.double(), gain_map, shape, torch.float64)
    for value, wanted in zip(made(piece, gain_map, shape, torch.float32), expected, strict=True):
        assert relative_error(value, wanted) < 2e-6
    assert launches == ["spread_groups", "collect_groups"]
