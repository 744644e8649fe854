"""The dynamic convolutions that models are converted to, by name: which layers each replaces, and what by."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import nn

from .layers import FDConv1d, FDConv2d, FDConv3d, FDLinear
from .layers.base import DynamicLayer
from .layers.dynamic import CondConv2d, DCDConv2d, DYConv2d, KWConv2d, ODConv2d
from .layers.fdw import GainMaps
from .warehouses import WAREHOUSE_OPTIONS, plan_warehouses, without_warehouse

Layers = Mapping[str, nn.Module]
Options = dict[str, Any]


def layer_options(layer_class: type[nn.Module]) -> set[str]:
    """Keyword arguments of a layer that its static source does not decide."""
    parameters = inspect.signature(layer_class).parameters.values()
    decided = {"init_weights", "gain_maps", "warehouse", "device", "dtype"}
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - decided


def _same_options(model: nn.Module, layers: Layers, options: Options) -> dict[str, Options]:
    return dict.fromkeys(layers, options)


def _with_gain_maps(model: nn.Module, layers: Layers, options: Options) -> dict[str, Options]:
    gain_maps: GainMaps = {}
    return {name: {**options, "gain_maps": gain_maps} for name in layers}


def _nothing(model: nn.Module, layers: Layers) -> dict[str, str]:
    return {}


class Method(NamedTuple):
    """A dynamic convolution.

    Attributes:
        title: Name for people.
        layers: Names of its layers, for people.
        counterparts: What makes a layer from a static one, by the static layer's class.
        shortcuts: Whether shortcuts between stages are replaced too.
        groups: Whether a layer may have groups of channels; those that have are replaced where one insists on them.
        extra_options: Options beside those of the layers.
        left: Of a model's layers that would be replaced, those that stay static after all, and why.
        plan: Options of each layer, from the model, its layers that are replaced, and the options that were given.
    """

    title: str
    layers: str
    counterparts: dict[type[nn.Module], Callable[..., DynamicLayer]]
    shortcuts: bool = False
    groups: bool = False
    extra_options: frozenset[str] = frozenset()
    left: Callable[[nn.Module, Layers], dict[str, str]] = _nothing
    plan: Callable[[nn.Module, Layers, Options], dict[str, Options]] = _same_options

    @property
    def options(self) -> set[str]:
        """Keyword arguments that may be given."""
        return layer_options(self.counterparts[nn.Conv2d].__self__) | self.extra_options

    def make(self, layer: nn.Module, options: Options, weights_follow: bool) -> DynamicLayer:
        """The replacement of a static layer, given those of the options that it knows."""
        make = self.counterparts[type(layer)]
        known = layer_options(make.__self__) | {"gain_maps", "warehouse"}
        return make(
            layer, weights_follow=weights_follow, **{key: value for key, value in options.items() if key in known}
        )


METHODS = {
    "fdconv": Method(
        title="FDConv",
        layers="FDConv2d and FDLinear",
        counterparts={
            nn.Conv1d: FDConv1d.from_conv,
            nn.Conv2d: FDConv2d.from_conv,
            nn.Conv3d: FDConv3d.from_conv,
            nn.Linear: FDLinear.from_linear,
        },
        plan=_with_gain_maps,
    ),
    "condconv": Method("CondConv", "CondConv2d", {nn.Conv2d: CondConv2d.from_conv}, groups=True),
    "dyconv": Method("DY-Conv", "DYConv2d", {nn.Conv2d: DYConv2d.from_conv}, shortcuts=True, groups=True),
    "dcd": Method("DCD", "DCDConv2d", {nn.Conv2d: DCDConv2d.from_conv}),
    "odconv": Method("ODConv", "ODConv2d", {nn.Conv2d: ODConv2d.from_conv}, groups=True),
    "kw": Method(
        title="KernelWarehouse",
        layers="KWConv2d and its warehouses",
        counterparts={nn.Conv2d: KWConv2d.from_conv},
        shortcuts=True,
        extra_options=frozenset(WAREHOUSE_OPTIONS),
        left=without_warehouse,
        plan=plan_warehouses,
    ),
}


def find_method(name: str) -> Method:
    """The method of that name.

    Raises:
        ValueError: There is none.
    """
    if name not in METHODS:
        raise ValueError(f"method {name!r}, but there are {', '.join(METHODS)}")
    return METHODS[name]
