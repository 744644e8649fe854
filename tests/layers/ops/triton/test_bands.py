"""FBM's kernels against the plain operations: sizes, cutoffs, dtypes, memory formats."""

import pytest
import torch

from fdconv_zoo.layers import FBM
from fdconv_zoo.layers.ops.triton import bands
from tests.compare import randomise, relative_error

CUTOFFS = [(1 / 4, 1 / 8, 1 / 16), (0.5,), (0.5, 0.3), (0.01,), (0.49, 0.31, 0.2, 0.1)]


def results(fbm, x):
    x = x.detach().requires_grad_()
    output = fbm(x)
    direction = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view_as(x).sin().to(x.dtype)
    return output, *torch.autograd.grad(output, [x, fbm.weight, fbm.bias], direction)


SIZES = [(1, 1), (7, 7), (9, 16), (17, 5), (31, 20)]


@pytest.mark.parametrize(("size", "cutoffs"), list(zip(SIZES, CUTOFFS, strict=True)))
def test_maps_and_gradients(size, cutoffs, monkeypatch):
    fbm, x = randomise(FBM(5, cutoffs)), torch.randn(2, 5, *size)
    calls = []
    forward = bands.forward
    monkeypatch.setattr(bands, "forward", lambda *a: calls.append(1) or forward(*a))
    found = results(fbm, x)
    assert calls
    for value, expected in zip(found, results(fbm.double(), x.double()), strict=True):
        assert relative_error(value, expected) < 1e-5


@pytest.mark.parametrize("channels", [1, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_memory_formats(dtype, channels):
    fbm = randomise(FBM(channels)).to(dtype)
    x = torch.randn(1, channels, 10, 14).to(dtype).contiguous(memory_format=torch.channels_last)
    tol = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    found = results(fbm, x)
    assert found[0].dtype == dtype
    for value, expected in zip(found, results(fbm.double(), x.double()), strict=True):
        assert relative_error(value, expected) < tol


def test_large_maps_and_official_masks_are_left_to_the_plain_operations(monkeypatch):
    monkeypatch.setattr(bands, "forward", None)
    with torch.no_grad():
        randomise(FBM(2))(torch.randn(1, 2, 65, 20))
        randomise(FBM(2, mask_grid=64))(torch.randn(1, 2, 14, 14))
