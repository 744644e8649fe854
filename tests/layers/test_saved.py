"""Layers that were saved before the arithmetic moved to layers/ops (commit d0db083) load and compute the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fdconv_zoo import FDConv2d, FDLinear
from tests.compare import relative_error

SAVED = Path(__file__).parents[1] / "saved"


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("conv3x3", lambda: FDConv2d(18, 20, 3, stride=2, padding=1, num_bands=8)),
        ("linear", lambda: FDLinear(18, 24, num_bands=8)),
    ],
)
def test_saved_layers_load_and_compute_the_same(name, make):
    tensors = load_file(SAVED / f"{name}.safetensors")
    layer, x = make().eval(), tensors["input"].requires_grad_()
    layer.load_state_dict({key.removeprefix("state."): t for key, t in tensors.items() if key.startswith("state.")})
    output = layer(x)
    grads = torch.autograd.grad(output, [x, *layer.parameters()], tensors["grad_output"])
    expected = [tensors["grad_input"], *(tensors[f"grad.{key}"] for key, _ in layer.named_parameters())]
    for got, wanted in zip((output, *grads), (tensors["output"], *expected), strict=True):
        assert relative_error(got, wanted) < 1e-5
