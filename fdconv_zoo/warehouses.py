"""Which layers of a model share a warehouse: those of a stage, as KernelWarehouse has it.

Paper: KernelWarehouse: Rethinking the Design of Dynamic Convolution, ICML 2024, https://arxiv.org/abs/2406.07879

The first convolution of a stage and the shortcut beside it have the previous stage's channels and belong to its
warehouse; before the first stage there is none, and they stay static.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .layers.dynamic import Warehouse
from .structure import SHORTCUTS

WAREHOUSE_OPTIONS = ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio")


def _stage(name: str) -> str:
    """The part of a name that is a stage's: up to the first part with a number, as in layer1 and stages.1."""
    parts = name.split(".")
    numbered = [i for i, part in enumerate(parts) if any(character.isdigit() for character in part)]
    return ".".join(parts[: numbered[0] + 1]) if numbered and numbered[0] + 1 < len(parts) else ""


def _entries(layers: Mapping[str, nn.Module]) -> set[str]:
    """Names of the shortcuts between stages, and of the first layers of their blocks."""
    found = set()
    for name in layers:
        parts = name.split(".")
        place = next((i for i, part in enumerate(parts) if part in SHORTCUTS), None)
        if place is not None:
            block = ".".join(parts[:place])
            found |= {name, next(other for other in layers if other.startswith(f"{block}." if block else ""))}
    return found


def without_warehouse(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Layers that would belong to a warehouse before the first stage's, and why they stay static."""
    stages = [_stage(name) for name in layers]
    reason = "takes the stem's channels, before the first warehouse"
    return {name: reason for name in _entries(layers) if _stage(name) == stages[0]}


def plan_warehouses(layers: Mapping[str, nn.Module], options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of each layer, its warehouse among them.

    Args:
        layers: Convolutions by name, in the model's order.
        options: Of the layers and of the warehouses.

    Raises:
        ValueError: An option of the warehouses is out of range.
    """
    stages = list(dict.fromkeys(_stage(name) for name in layers))
    before = dict(zip(stages[1:], stages, strict=False))
    entries = _entries(layers)
    members: dict[str, list[str]] = {}
    for name in layers:
        stage = _stage(name)
        members.setdefault(before.get(stage, stage) if name in entries else stage, []).append(name)
    ratios = {key: value for key, value in options.items() if key in WAREHOUSE_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in WAREHOUSE_OPTIONS}
    planned = {}
    for names in members.values():
        # A layer that is in the model twice takes one place.
        own = {id(layers[name]): layers[name] for name in names}
        warehouse = Warehouse([tuple(layer.weight.shape) for layer in own.values()], **ratios)
        planned |= {name: {**rest, "warehouse": warehouse} for name in names}
    return planned
