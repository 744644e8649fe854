"""The layers of tests/golden, run by the official code: output and every gradient."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fdconv_zoo import FDConv2d, convert_official_state_dict
from fdconv_zoo.layers.fourier import column_scale
from gpu_checks.setup import Row, Setup, UnavailableError, exact_float32, norm_error, worst_of

FOLDER = Path(__file__).parents[2] / "tests" / "golden"
LIMIT = 1e-4


def run(setup: Setup) -> Iterator[Row]:
    """A row for each layer, with the worst of its results."""
    paths = sorted(FOLDER.glob("*.safetensors"))
    if not paths:
        raise UnavailableError(f"no layers in {FOLDER}")
    with exact_float32():
        for path in paths[:1] if setup.small else paths:
            yield setup.attempt(path.stem, partial(check, setup, path))


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def check(setup: Setup, path: Path) -> Row:
    """The worst error of output and gradients, and which it is."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (it is no mapping)
    config.pop("mode")
    layer = FDConv2d(**config, mask_grid=64).eval()
    layer.load_state_dict(convert_official_state_dict(below("state.", tensors), layer))
    official = below("grad.", tensors)
    statistics = {name: value for name, value in below("state.", tensors).items() if "running" in name}
    expected = convert_official_state_dict(official | statistics, layer)
    # dft_weight = T sqrt(R C) / (scale * min(Cin, Cout)//2); its gradient goes the other way.
    rows, columns = layer.fdw.rows, layer.fdw.columns
    factor = (rows * columns) ** 0.5 / (min(layer.in_channels, layer.out_channels) // 2)
    expected["fdw.spectrum"] = official["dft_weight"][0] * factor / column_scale(columns)[:, None]
    layer.to(setup.device)
    x = tensors["input"].to(setup.device).requires_grad_()
    output = layer(x)
    output.backward(tensors["grad_output"].to(setup.device))
    errors = {
        "output": norm_error(output.detach(), tensors["output"]),
        "input": norm_error(x.grad, tensors["grad_input"]),
    }
    errors |= {name: norm_error(parameter.grad, expected[name]) for name, parameter in layer.named_parameters()}
    worst = worst_of(errors)
    return {"error": errors[worst], "limit": LIMIT, "worst": worst, "results": len(errors)}
