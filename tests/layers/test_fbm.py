import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdconv_zoo.layers import FBM
from fdconv_zoo.layers.low_pass import (
    fourier_basis,
    grid_low_passes,
    grid_sides,
    low_pass,
    low_passes,
    num_kept,
)
from fdconv_zoo.layers.ops import literal
from fdconv_zoo.layers.ops.onnx import box_products
from fdconv_zoo.layers.ops.traced import modulate_bands
from tests.compare import randomise, relative_error

CPU = torch.device("cpu")
CUTOFFS = [(1, 4), (1, 8), (1, 16)]
SIZES = [(1, 1), (1, 7), (2, 2), (3, 5), (4, 4), (8, 8), (9, 16), (17, 31), (40, 12), (64, 48)]
few = settings(max_examples=25, derandomize=True, deadline=None)


@few
@given(size=st.integers(1, 70), numerator=st.integers(1, 8), denominator=st.integers(16, 40))
def test_the_basis_spans_exactly_the_kept_frequencies(size, numerator, denominator):
    count = num_kept(size, numerator, denominator)
    # two-sided frequencies k/size with |k|/size < numerator/denominator
    kept = [k for k in range(-size, size + 1) if abs(k) * denominator < numerator * size]
    # the sine of frequency 0 is counted, and zero
    assert count == len(kept) + 1
    basis = fourier_basis(size, count, CPU, torch.float64)
    lengths = (torch.arange(count, dtype=torch.float64) != 1).double()
    assert torch.allclose(basis.T @ basis, lengths.diag(), atol=1e-12)
    energy = torch.fft.fft(basis, dim=0, norm="ortho").abs() ** 2
    outside = [k for k in range(size) if min(k, size - k) * denominator >= numerator * size]
    assert energy[outside].sum() < 1e-20


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("cutoff", [1 / 2, 0.3, 1 / 4, 1 / 8, 1 / 16, 0.01])
def test_low_pass_is_a_box_in_frequency(size, cutoff):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = literal.low_pass(x, literal.box_mask(*size, cutoff))
    assert relative_error(low_pass(x, cutoff), expected) < 1e-12


@pytest.mark.parametrize("size", SIZES)
def test_nested_low_passes_are_those_of_each_cutoff(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    lows = low_passes(x, CUTOFFS, None)
    for low, (numerator, denominator) in zip(lows, CUTOFFS, strict=True):
        expected = literal.low_pass(x, literal.box_mask(*size, numerator / denominator))
        assert relative_error(low, expected) < 1e-12


def test_float32_bases_are_exact_at_any_size():
    for size in (7, 224, 1333):
        count = num_kept(size, 1, 4)
        wide = fourier_basis(size, count, CPU, torch.float64)
        assert (fourier_basis(size, count, CPU, torch.float32) - wide).abs().max() < 1e-6


@pytest.mark.parametrize("cutoff", [1 / 4, 1 / 8, 1 / 16])
def test_the_64_grid_loses_a_quarter_to_rounding_and_keeps_the_rest(cutoff):
    mask = literal.grid_mask(64, 64, cutoff, 64)
    assert mask[0, int(64 * cutoff)] == (cutoff < 1 / 4)


def grid_masks_seen(height, width, cutoffs, grid):
    """The masks that grid_low_passes applies, read from what it makes of a map with all frequencies."""
    impulse = torch.zeros(1, 1, height, width, dtype=torch.float64)
    impulse[..., 0, 0] = 1
    return [torch.fft.rfft2(low)[0, 0] for low in grid_low_passes(impulse, cutoffs, grid)]


@pytest.mark.parametrize(
    ("grid", "cutoffs"), [(64, CUTOFFS), (63, CUTOFFS), (64, [(1, 2), (49, 100), (1, 3)]), (7, [(1, 2), (3, 10)])]
)
def test_official_masks_are_stretched_as_interpolate_does(grid, cutoffs):
    sizes = [(n, m) for n in range(1, 66) for m in (1, 2, n, 40, 57)]
    sizes += [(7, 7), (14, 14), (28, 28), (56, 56), (112, 112), (100, 167), (167, 100), (200, 334), (128, 256)]
    sizes += [(200, 336), (96, 97), (224, 224), (13, 300), (301, 14)]
    for height, width in sizes:
        seen = grid_masks_seen(height, width, cutoffs, grid)
        for spectrum, (numerator, denominator) in zip(seen, cutoffs, strict=True):
            mask = literal.grid_mask(height, width, numerator / denominator, grid)
            # An impulse's low pass has the mask as its spectrum, but for the mirror symmetry that irfft2 gives the
            # columns that are their own mirror image.
            expected = torch.fft.rfft2(torch.fft.irfft2(mask.to(torch.complex128), s=(height, width)))
            assert (spectrum - expected).abs().max() < 1e-12, (height, width, grid)


@few
@given(size=st.tuples(st.integers(1, 20), st.integers(1, 20)), grid=st.sampled_from([64, 33]))
def test_low_passes_for_onnx_are_the_same(size, grid):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    actual = box_products(x, grid_sides(x, CUTOFFS, grid))
    for product, transformed in zip(actual, grid_low_passes(x, CUTOFFS, grid), strict=True):
        assert (product - transformed).abs().max() < 1e-12


@few
@given(
    size=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    channels=st.integers(1, 3),
    cutoffs=st.sampled_from([(1 / 4, 1 / 8, 1 / 16), (1 / 2,), (0.3, 0.2), (0.45, 0.35, 0.25, 0.1, 0.05)]),
    grid=st.sampled_from([None, 64]),
)
def test_modulation_and_its_gradients_match_the_reference(size, channels, cutoffs, grid):
    torch.manual_seed(channels)
    fbm = randomise(FBM(channels, cutoffs, grid, dtype=torch.float64))
    x = torch.randn(2, channels, *size, dtype=torch.float64, requires_grad=True)
    inputs = [x, fbm.weight, fbm.bias]
    expected = torch.stack([literal.fbm(sample, fbm.weight, fbm.bias, cutoffs, grid) for sample in x])
    output = fbm(x)
    direction = torch.randn_like(expected)
    assert relative_error(output, expected) < 1e-12
    for got, wanted in zip(
        torch.autograd.grad(output, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        assert relative_error(got, wanted) < 1e-11


@pytest.mark.parametrize("grid", [None, 64])
@pytest.mark.parametrize("size", [(7, 7), (20, 17)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_eager_and_traceable_form_agree(dtype, size, grid):
    fbm = randomise(FBM(5, mask_grid=grid)).to(dtype)
    x = torch.randn(3, 5, *size).contiguous(memory_format=torch.channels_last).to(dtype).requires_grad_()
    inputs = [x, fbm.weight, fbm.bias]
    output, expected = fbm(x), modulate_bands(*inputs, fbm.cutoffs, grid)
    direction = torch.randn_like(expected)
    grads, expected_grads = (torch.autograd.grad(out, inputs, direction) for out in (output, expected))
    assert output.dtype == dtype
    for got, wanted in zip((output, *grads), (expected, *expected_grads), strict=True):
        assert relative_error(got, wanted) < (1e-12 if dtype == torch.float64 else 1e-2)


@pytest.mark.parametrize("grid", [None, 64])
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 0, 5)])
def test_empty_maps_have_gradients(shape, grid):
    fbm = FBM(4, mask_grid=grid)
    output = fbm(torch.zeros(shape))
    assert output.shape == shape
    output.sum().backward()
    assert fbm.weight.grad.abs().max() == fbm.bias.grad.abs().max() == 0


@pytest.mark.parametrize("grid", [None, 64])
@pytest.mark.parametrize("size", [5, 20])
def test_the_output_may_be_changed_in_place(size, grid):
    fbm = randomise(FBM(4, mask_grid=grid))
    inputs = [torch.randn(2, 4, size, size, requires_grad=True), fbm.weight, fbm.bias]
    expected = torch.autograd.grad(torch.relu(fbm(inputs[0])).square().sum(), inputs)
    found = torch.autograd.grad(torch.relu_(fbm(inputs[0])).square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("grid", [None, 64])
@pytest.mark.parametrize("size", [5, 20])
def test_gates_get_the_same_gradients_where_the_map_needs_none(size, grid):
    fbm = randomise(FBM(4, mask_grid=grid))
    x = torch.randn(2, 4, size, size)
    found = torch.autograd.grad(fbm(x).square().sum(), [fbm.weight, fbm.bias])
    expected = torch.autograd.grad(fbm(x.requires_grad_()).square().sum(), [fbm.weight, fbm.bias])
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_autocast_does_not_reach_the_filters():
    fbm = randomise(FBM(4))
    x = torch.randn(2, 4, 19, 24)
    expected = fbm(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fbm(x), expected)


def test_second_derivatives_are_those_of_the_traceable_form():
    fbm = randomise(FBM(2, dtype=torch.float64))
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    inputs = [x, fbm.weight, fbm.bias]

    def second(output):
        (grad,) = torch.autograd.grad(output.sin().sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), inputs)

    expected = second(modulate_bands(*inputs, CUTOFFS, None))
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(second(fbm(x)), expected, strict=True))


@pytest.mark.parametrize("grid", [None, 64])
def test_gradcheck(grid):
    weight, bias = torch.randn(3, 2, 3, 3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = torch.randn(1, 2, 5, 6, dtype=torch.float64)
    inputs = tuple(tensor.requires_grad_() for tensor in (x, weight, bias))
    assert torch.autograd.gradcheck(lambda *tensors: modulate_bands(*tensors, CUTOFFS, grid), inputs)


@pytest.mark.parametrize("grid", [None, 64])
def test_the_bands_sum_to_the_input_at_first(grid):
    x = torch.randn(2, 4, 19, 24)
    fbm = FBM(4, mask_grid=grid)
    assert (fbm(x) - x).abs().max() < 1e-5
    randomise(fbm).reset_parameters()
    assert (fbm(x) - x).abs().max() < 1e-5


@pytest.mark.parametrize("grid", [None, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_filtered_in_float32(dtype, grid):
    fbm = randomise(FBM(4, mask_grid=grid))
    x = torch.randn(2, 4, 19, 24).to(dtype)
    assert torch.equal(fbm(x), fbm(x.float()).to(dtype))


@pytest.mark.parametrize(
    "cutoffs", [(), (0.25, 0.25), (0.125, 0.25), (0.6, 0.25), (0.25, 0.0), (0.25, -0.1), (0.25, float("nan"))]
)
def test_impossible_cutoffs_are_named(cutoffs):
    with pytest.raises(ValueError, match="must fall strictly") as error:
        FBM(4, cutoffs)
    assert str(cutoffs) in str(error.value)


@pytest.mark.parametrize("grid", [1, 0, -64])
def test_impossible_mask_grids_are_named(grid):
    with pytest.raises(ValueError, match=f"mask_grid={grid}, but it must be None or at least 2"):
        FBM(4, mask_grid=grid)


def test_the_smallest_cutoffs_keep_the_mean():
    fbm = randomise(FBM(4, (1 / 4, 1e-6), dtype=torch.float64))
    x = torch.randn(2, 4, 6, 7, dtype=torch.float64)
    expected = torch.stack([literal.fbm(s, fbm.weight, fbm.bias, (1 / 4, 1e-6)) for s in x])
    assert relative_error(fbm(x), expected) < 1e-12


def test_the_cutoffs_are_fractions_in_lowest_terms():
    assert FBM(4).cutoffs == CUTOFFS
    assert FBM(4, (1 / 3, 0.1)).cutoffs == [(1, 3), (1, 10)]
