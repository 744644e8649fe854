"""Checkpoints of the dynamic convolutions' reference code: their names, and the state of our layers."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .layers.dynamic import CondConv2d, DCDClassifier, DCDConv2d, DYConv2d, KWConv2d, ODConv2d

State = dict[str, Tensor]
WAREHOUSES = "warehouse_manager.weights."
DYCONV = {"weight": "kernels", "bias": "biases"}
DCD = {
    "fc.0.": "attention.fc.",
    "fc.1.fc.0.": "attention.gate.",
    "fc_phi.": "attention.phi.",
    "fc_scale.": "attention.scale.",
}
ODCONV = {"weight": "kernels", "attention.fc.": "attention.hidden.fc.", "attention.bn.": "attention.hidden.norm."}
OD_HEADS = ("channel_fc", "filter_fc", "spatial_fc", "kernel_fc")
KW = {"attention.fc1.": "attention.hidden.fc.", "attention.norm1.": "attention.hidden.norm."}


def _renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """The state with other beginnings of its keys; 1x1 convolutions of attentions are stored as matrices."""
    out = {}
    for key, value in state.items():
        old = next((old for old in names if key.startswith(old)), "")
        new = names.get(old, "") + key.removeprefix(old)
        is_point = new.startswith("attention.") and value.dim() == 4
        out[new] = value.flatten(1) if is_point else value
    return out


def _condconv(state: State, layer: CondConv2d) -> State:
    return dict(state)


def _dyconv(state: State, layer: DYConv2d) -> State:
    return _renamed(state, DYCONV)


def _dcd(state: State, layer: DCDConv2d | DCDClassifier) -> State:
    return _renamed(state, DCD)


def _odconv(state: State, layer: ODConv2d) -> State:
    state = dict(state)
    for kind in ("weight", "bias"):
        heads = [state.pop(f"attention.{head}.{kind}", None) for head in OD_HEADS]
        found = [head.flatten(1) if kind == "weight" else head for head in heads if head is not None]
        if found:
            state[f"attention.heads.{kind}"] = torch.cat(found)
    out = _renamed(state, ODCONV)
    if "kernels" in out:
        # Our gates are twice theirs.
        out["kernels"] = out["kernels"] / 2 ** sum(section > 0 for section in layer.attention.sections[:3])
    return out


def _kw(state: State, layer: KWConv2d) -> State:
    return _renamed(state, KW)


# A key that each official layer of the kind has, and what makes our state of its state.
LAYERS: dict[type[nn.Module], tuple[str, Callable[[State, nn.Module], State]]] = {
    CondConv2d: ("routing_fn.weight", _condconv),
    DYConv2d: ("attention.fc1.weight", _dyconv),
    DCDConv2d: ("fc_phi.weight", _dcd),
    DCDClassifier: ("fc_phi.weight", _dcd),
    ODConv2d: ("attention.fc.weight", _odconv),
    KWConv2d: ("attention.fc1.weight", _kw),
}


def convert_layers(state: Mapping[str, Tensor], model: nn.Module) -> State:
    """A state dict with the official layers under our names, and all else as it is.

    Args:
        state: State dict of an official model.
        model: What it is for, or a lone layer.
    """
    out, warehouses = dict(state), 0
    for name, layer in model.named_modules():
        if type(layer) not in LAYERS:
            continue
        prefix = f"{name}." if name else ""
        marker, convert = LAYERS[type(layer)]
        if f"{prefix}{marker}" in out:
            keys = [key for key in out if key.startswith(prefix) and not key.startswith(WAREHOUSES)]
            own = convert({key.removeprefix(prefix): out.pop(key) for key in keys}, layer)
            out.update({f"{prefix}{key}": value for key, value in own.items()})
        if isinstance(layer, KWConv2d) and layer.first() is layer:
            bank = out.pop(f"{WAREHOUSES}{warehouses}", None)
            warehouses += 1
            if bank is not None:
                out[f"{prefix}cells"] = bank
    return out
