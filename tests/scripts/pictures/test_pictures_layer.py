"""What scripts/visualize.py draws of a layer: gates, bands, groups and spectra against the layer itself."""

import pytest
import torch
import torch.nn.functional as F

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers.fourier import matrix_to_weight
from pictures import layer as layer_module
from tests.compare import randomise


def test_gates_and_bands_are_those_of_the_layer():
    """The layer's output from what is drawn: FDW's groups, KSM's gates, FBM's bands and maps."""
    torch.manual_seed(0)
    layer = randomise(FDConv2d(20, 24, 3, padding=1, num_bands=8)).eval()
    x = torch.randn(1, 20, 14, 11)
    with torch.inference_mode():
        gates = layer_module.gates_of(layer, x)
        bands = layer.fbm.bands(x)
        torch.testing.assert_close(bands.sum(0), x, rtol=0, atol=1e-5)
        maps = torch.cat([gates["FBM maps"][0], torch.ones(1, 14, 11)])
        groups, matrices = layer_module.group_matrices(layer)
        assert groups == list(range(8))
        matrix = torch.einsum("k,krc->rc", gates["group gains"][0], matrices) * gates["weight elements"][0]
        weight = matrix_to_weight(matrix, (3, 3)) * gates["kernel positions"][0]
        weight = weight * gates["input channels"][0, :, None, None] * gates["filters"][0, :, None, None, None]
        expected = F.conv2d((bands * maps[:, None, None]).sum(0), weight, layer.bias, padding=1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_gates_of_a_linear_layer():
    torch.manual_seed(0)
    layer = randomise(FDLinear(20, 24, num_bands=8)).eval()
    x = torch.randn(1, 5, 20)
    with torch.inference_mode():
        gates = layer_module.gates_of(layer, x)
        matrix = torch.einsum("k,krc->rc", gates["group gains"][0], layer_module.group_matrices(layer)[1])
        weight = matrix * gates["weight elements"][0] * gates["input channels"][0] * gates["filters"][0][:, None]
        torch.testing.assert_close(layer(x), F.linear(x, weight, layer.bias), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("shape", [(3, 32, 3), (24, 20, 3), (20, 24, 1), (64, 64, 1)])
def test_only_groups_with_a_cut_pair_are_not_orthogonal(shape):
    torch.manual_seed(0)
    layer = FDConv2d(*shape, num_bands=16)
    similarity = layer_module.cosine_similarity(layer_module.group_matrices(layer)[1])
    cut = torch.zeros_like(similarity, dtype=torch.bool)
    for low, high in layer_module.cut_pairs(layer).tolist():
        cut[low, high] = cut[high, low] = True
    apart = ~cut & ~torch.eye(16, dtype=torch.bool)
    assert similarity[apart].abs().max() < 1e-6
    assert (similarity[cut].abs() > 1e-6).all()


@pytest.mark.parametrize("in_channels", [20, 21])
def test_energy_of_a_group_is_that_of_its_weight(in_channels):
    torch.manual_seed(0)
    layer = FDConv2d(in_channels, 24, 3, num_bands=8)
    groups = layer_module.group_matrices(layer)[1]
    energy = layer_module.group_energy(layer.fdw, layer_module.magnitudes(groups.sum(0)))
    torch.testing.assert_close(energy.sum(), groups.sum(0).square().sum())
    # a cut pair of mirrored coefficients counts for both of its groups
    torch.testing.assert_close(energy, groups.flatten(1).square().sum(1), rtol=0.02, atol=0)


def test_kernel_response_is_the_rms_of_all_kernels_transforms():
    torch.manual_seed(0)
    matrices = torch.randn(2, 4 * 3, 5 * 3)
    response = layer_module.kernel_response(matrices, (3, 3), size=16)
    for matrix, actual in zip(matrices, response, strict=True):
        transforms = torch.fft.fft2(matrix_to_weight(matrix, (3, 3)), s=(16, 16)).abs()
        torch.testing.assert_close(actual, torch.fft.fftshift(transforms.square().mean((0, 1)).sqrt()))


@pytest.mark.parametrize("half", [False, True])
def test_profile_of_the_frequency_is_the_frequency(half):
    radius = layer_module.plane_radius(64, 60, half=half)
    assert radius.shape == (64, 31 if half else 60)
    middles, (profile,) = layer_module.radial_profile(radius[None], radius, rings=20)
    torch.testing.assert_close(profile, middles, rtol=0, atol=0.02)
