"""Which layers of a model share a warehouse: those of a stage, as KernelWarehouse has it.

Paper: KernelWarehouse: Rethinking the Design of Dynamic Convolution, ICML 2024, https://arxiv.org/abs/2406.07879

The first convolution of a stage and the shortcut beside it have the previous stage's channels and belong to its
warehouse; before the first stage there is none, and they stay static.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn

from .layers.base import DynamicLayer
from .layers.dynamic import Warehouse
from .layers.dynamic.warehouse import refuse_below_one
from .structure import CONVOLUTION, SHORTCUTS, network_names, within_network

Layers = Mapping[str, nn.Module]
WAREHOUSE_OPTIONS = ("cell_num_ratio", "cell_inplane_ratio", "cell_outplane_ratio")


class _Spot(NamedTuple):
    """Where a layer is in its network, whatever that is wrapped in.

    Attributes:
        network: Name of the network.
        stage: The part of the layer's name in it that is a stage's, such as layer1 or stages.1.
        block: The parts before the shortcut, if the layer is one.
    """

    network: str
    stage: str
    block: str | None


def _spots(model: nn.Module, layers: Layers) -> dict[str, _Spot]:
    networks = network_names(model, (CONVOLUTION, DynamicLayer))
    found = {}
    for name in layers:
        network, parts = within_network(name, networks)
        # Up to the first part with a number.
        numbered = next((i for i, part in enumerate(parts[:-1]) if any(map(str.isdigit, part))), -1)
        shortcut = next((i for i, part in enumerate(parts) if part in SHORTCUTS), None)
        block = None if shortcut is None else ".".join([network, *parts[:shortcut]] if network else parts[:shortcut])
        found[name] = _Spot(network, ".".join(parts[: numbered + 1]), block)
    return found


def _entries(spots: Mapping[str, _Spot]) -> set[str]:
    """Names of the shortcuts between stages, and of the first layers of their blocks."""
    found = set()
    for name, spot in spots.items():
        if spot.block is not None:
            prefix = f"{spot.block}." if spot.block else ""
            found |= {name, next(other for other in spots if other.startswith(prefix))}
    return found


def _stages(spots: Mapping[str, _Spot]) -> dict[str, list[str]]:
    """The stages of each network, in its order."""
    found: dict[str, list[str]] = {}
    for spot in spots.values():
        stages = found.setdefault(spot.network, [])
        if spot.stage not in stages:
            stages.append(spot.stage)
    return found


def without_warehouse(model: nn.Module, layers: Layers) -> dict[str, str]:
    """Layers that would belong to a warehouse before the first stage's, and why they stay static."""
    spots = _spots(model, layers)
    stages = _stages(spots)
    reason = "takes the channels of what is before the first warehouse"
    return {name: reason for name in _entries(spots) if spots[name].stage == stages[spots[name].network][0]}


def plan_warehouses(model: nn.Module, layers: Layers, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Options of each layer, its warehouse among them.

    Args:
        model: Holds the layers.
        layers: Convolutions by name, in the model's order.
        options: Of the layers and of the warehouses.

    Raises:
        ValueError: An option of the warehouses is out of range, or they would be too small for static weights.
    """
    refuse_below_one(options.get("cell_num_ratio", 1))
    spots = _spots(model, layers)
    entries, all_stages = _entries(spots), _stages(spots)
    members: dict[tuple[str, str], list[str]] = {}
    for name, spot in spots.items():
        stages = all_stages[spot.network]
        stage = stages[max(stages.index(spot.stage) - (name in entries), 0)]
        members.setdefault((spot.network, stage), []).append(name)
    ratios = {key: value for key, value in options.items() if key in WAREHOUSE_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in WAREHOUSE_OPTIONS}
    planned = {}
    for names in members.values():
        # A layer that is in the model twice takes one place.
        own = {id(layers[name]): layers[name] for name in names}
        warehouse = Warehouse([tuple(layer.weight.shape) for layer in own.values()], **ratios)
        planned |= {name: {**rest, "warehouse": warehouse} for name in names}
    return planned
