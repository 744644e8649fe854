"""What scripts/benchmark.py compares: models and their twins, and the literal equations."""

import pytest
import torch
from benchmark_pairs import tiny_pair
from torch import nn

import fdconv_zoo
from benchmarking import models
from common.gates import move_gates
from fdconv_zoo.conversion import named_fd_layers
from tests.compare import relative_error

MODEL = "mobilenetv2_100_fdconv"


def test_no_gate_is_one_after_the_gates_were_moved_and_the_seed_decides():
    pairs = [models.model_pair(MODEL, 32, seed, {}) for seed in (0, 0, 1)]
    states = [pair.fdconv.state_dict() for pair in pairs]
    moved = [name for name in states[0] if ".ksm.heads." in name or ".ksm.local_conv." in name or ".fbm." in name]
    assert len(moved) == 3 * 32
    for name in moved:
        assert states[0][name].count_nonzero() == states[0][name].numel()
        assert torch.equal(states[0][name], states[1][name])
        assert not torch.equal(states[0][name], states[2][name])


@pytest.mark.parametrize("name", ["resnet18_fdconv", "convnext_atto_fdconv"])
@torch.no_grad()
def test_outputs_depend_on_layers_in_branches_that_start_at_zero(name):
    model = models.model_pair(name, 64, 0, {"num_bands": 8}).fdconv.eval()
    x = torch.randn(2, 3, 64, 64)
    before = model(x)
    for _, layer in named_fd_layers(model):
        layer.reset_modulation()
    assert relative_error(model(x), before) > 1e-4


def test_pairs_are_a_model_and_its_twin():
    pair = models.model_pair("resnet18_fdconv", 64, 0, {"num_bands": 8})
    assert pair.static_name == "resnet18"
    assert {layer.fdw.num_bands for _, layer in named_fd_layers(pair.fdconv)} == {8}
    assert not list(named_fd_layers(pair.static))
    layer = models.layer_pair(0)
    assert layer.fdconv.static_shape == tuple(layer.static.weight.shape) == (512, 512, 3, 3)
    net = models.small_net_pair(0)
    x = torch.randn(2, *net.input_size)
    assert [feature.shape[-1] for feature in net.static.forward_intermediates(x, intermediates_only=True)][1:] == [
        28,
        14,
        7,
        4,
    ]
    assert [layer.fdw.num_bands for _, layer in named_fd_layers(net.fdconv)] == [16] * 8


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_literal_model_computes_what_the_model_computes(training):
    pair = tiny_pair()
    literal = models.literal_model(pair.fdconv.train(training))
    x = torch.randn(2, *pair.input_size)
    assert relative_error(pair.fdconv(x), literal(x)) < 1e-5
    assert "forward" not in vars(pair.fdconv[2]), "the model itself was changed"


def test_literal_model_of_linear_layers():
    model = move_gates(nn.Sequential(fdconv_zoo.FDLinear(20, 24, num_bands=4)), 0).eval()
    x = torch.randn(2, 5, 20)
    assert relative_error(model(x), models.literal_model(model)(x)) < 1e-5


def test_literal_model_refuses_official_masks():
    layer = fdconv_zoo.FDConv2d(20, 20, 3, num_bands=4, mask_grid=64)
    with pytest.raises(ValueError, match="mask_grid"):
        models.literal_model(layer)
