"""Layers run by the official code (eval mode): parameters, input, output and every gradient, in tests/golden."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fdconv_zoo import FDConv2d, convert_official_state_dict
from fdconv_zoo.layers.fourier import column_scale
from tests.compare import relative_error

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.safetensors"))
TOLERANCE = 1e-4


def read(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert config.pop("mode") == "eval"
    return config, tensors


def below(prefix, tensors):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def load(path):
    config, tensors = read(path)
    layer = FDConv2d(**config, mask_grid=64).eval()
    layer.load_state_dict(convert_official_state_dict(below("state.", tensors), layer))
    return layer, tensors


def spectrum_gradient(layer, official):
    """d loss/d T from d loss/d dft_weight, by the chain rule: dft_weight = T sqrt(R C) / (scale min(Cin, Cout)//2)."""
    rows, columns = layer.fdw.rows, layer.fdw.columns
    factor = (rows * columns) ** 0.5 / (min(layer.in_channels, layer.out_channels) // 2)
    return official[0] * factor / column_scale(columns)[:, None]


def test_all_five_layers_are_here():
    assert len(GOLDEN) == 5


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_groups_are_exactly_the_official_ones(path):
    layer, tensors = load(path)
    assert torch.equal(layer.fdw.band_index(), tensors["band_index"])


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_output_and_every_gradient_are_the_official_ones(path, recompute):
    layer, tensors = load(path)
    layer.recompute = recompute
    x = tensors["input"].requires_grad_()
    output = layer(x)
    output.backward(tensors["grad_output"])

    statistics = {key: value for key, value in below("state.", tensors).items() if "running" in key}
    official = below("grad.", tensors)
    # Gradients are renamed as the weights are; only the spectrum's scale goes the other way.
    expected = convert_official_state_dict(official | statistics, layer)
    expected["fdw.spectrum"] = spectrum_gradient(layer, official["dft_weight"])
    errors = {
        "output": relative_error(output.detach(), tensors["output"]),
        "input": relative_error(x.grad, tensors["grad_input"]),
    }
    errors |= {name: relative_error(p.grad, expected[name]) for name, p in layer.named_parameters()}
    assert len(official) >= 15
    assert max(errors.values()) < TOLERANCE, errors


def test_the_paper_masks_are_other_ones():
    layer, tensors = load(next(path for path in GOLDEN if path.stem == "conv3x3_32_to_32"))
    layer.fbm.mask_grid = None
    assert relative_error(layer(tensors["input"]), tensors["output"]) > 100 * TOLERANCE
