"""Layers run by the reference code of each method (eval mode), in tests/golden/dynamic."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import nn

from fdconv_zoo.layers.dynamic import (
    CondConv2d,
    DCDClassifier,
    DCDConv2d,
    DYConv2d,
    KWConv2d,
    ODConv2d,
    Warehouse,
)
from fdconv_zoo.official_names import convert_layers
from tests.compare import relative_error

GOLDEN = sorted((Path(__file__).parents[2] / "golden" / "dynamic").glob("*.safetensors"))
TOLERANCE = 1e-4
LAYERS = {"condconv": CondConv2d, "dyconv": DYConv2d, "dcd": DCDConv2d, "odconv": ODConv2d}
CELLS = ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio")


class Chain(nn.Module):
    """Layers of one warehouse, one behind the other, named as in the files."""

    def __init__(self, configs, options, ratios):
        super().__init__()
        shapes = [(c["out_channels"], c["in_channels"], c["kernel_size"], c["kernel_size"]) for c in configs]
        warehouse = Warehouse(shapes, **ratios)
        self.layers = nn.ModuleList([KWConv2d(**config, **options, warehouse=warehouse) for config in configs])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def read(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert config.pop("mode") == "eval"
    return config, tensors


def below(prefix, tensors):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def build(config):
    method = config.pop("method")
    del config["source"]
    temperature = config.pop("temperature", None)
    if method == "kw":
        temperature = config.pop("beta")
        layers, shape, cells = config.pop("layers"), config.pop("cell_shape"), config.pop("num_cells")
        made = Chain(layers, config, {name: config.pop(name) for name in CELLS})
        assert list(made.layers[0].bank().shape) == [cells, *shape]
    elif config.pop("layer", None) == "classifier":
        made = DCDClassifier(**config)
    else:
        made = LAYERS[method](**config)
    if temperature is not None:
        for module in made.modules():
            if hasattr(module, "set_temperature"):
                module.set_temperature(temperature)
    return made.eval()


def test_all_layers_are_here():
    assert len(GOLDEN) == 14


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_output_and_every_gradient_are_the_reference_s(path):
    config, tensors = read(path)
    layer = build(config)
    layer.load_state_dict(convert_layers(below("state.", tensors), layer), strict=True)
    x = tensors["input"].requires_grad_()
    output = layer(x)
    output.backward(tensors["grad_output"])

    expected = convert_layers(below("grad.", tensors), layer)
    if isinstance(layer, ODConv2d):
        # A bank divided by 8 or 4 has a gradient 8 or 4 times as large, and the conversion divided it.
        expected["kernels"] *= 4 ** sum(section > 0 for section in layer.attention.sections[:3])
    errors = {
        "output": relative_error(output.detach(), tensors["output"]),
        "input": relative_error(x.grad, tensors["grad_input"]),
    }
    errors |= {name: relative_error(p.grad, expected[name]) for name, p in layer.named_parameters()}
    assert expected.keys() == dict(layer.named_parameters()).keys()
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("path", [path for path in GOLDEN if path.stem.startswith("kw")], ids=lambda path: path.stem)
def test_cells_are_shared_out_as_by_the_reference(path):
    config, tensors = read(path)
    chain = build(config)
    for i, layer in enumerate(chain.layers):
        assert layer.attention.column_list == tensors[f"assignment.{i}"].argmax(1).tolist()
