"""Static layers, models and state dicts into dynamic ones; official FDConv checkpoints into this package's names.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 4)
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import OPTIONAL, fits
from .choice import (
    Candidate,
    FDLayer,
    Include,
    LayerReport,
    Summary,
    choose,
    named_dynamic_layers,
    named_fd_layers,
)
from .handover import find_shared, hand_over, tie
from .layers.base import DynamicLayer
from .layers.fourier import column_scale
from .layers.options import describe_names
from .methods import find_method
from .official_names import convert_layers
from .reparameterize import keep_unfused
from .tokens import PROBLEMS

_logger = logging.getLogger(__name__)


def summary(model: nn.Module, include: Include | None = None, method: str = "fdconv") -> Summary:
    """What :func:`convert` replaces in a model, or has replaced, and what it leaves and why.

    `print(summary(model))` prints a table.

    Args:
        model: A static or a converted model.
        include: As for :func:`convert`.
        method: As for :func:`convert`.

    Returns:
        A report for each convolution and linear layer, of whatever dimension, in the model's order. In a converted
        model those that are static stay static, also where the rules would replace them.

    Raises:
        ValueError: If `include` insists on what can't be replaced, or names what the model has not.
        TypeError: If `model` is no module, or `include` neither function nor names.
    """
    chosen = find_method(method)
    reports = {candidate.name: candidate.report(chosen.title) for candidate in choose(model, include, method=chosen)}
    converted = {
        name: LayerReport(name, layer.static_shape, "", layer.method) for name, layer in named_dynamic_layers(model)
    }
    if converted:
        left = "left when the model was converted"
        reports = {name: replace(report, reason=report.reason or left) for name, report in reports.items()} | converted
    return Summary(reports[name] for name, _ in model.named_modules(remove_duplicate=False) if name in reports)


def place(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts a module in the place of the one of a name."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def convert(
    model: nn.Module,
    method: str = "fdconv",
    include: Include | None = None,
    *,
    allow: Collection[str] = (),
    **kwargs: Any,
) -> nn.Module:
    """Replaces layers of a model by dynamic ones, in place; the model computes the same function as before.

    Which ones is the method's matter. "fdconv" replaces the convolutions of the blocks and the linear layers of the
    MLPs; stems, shortcuts, classifiers, grouped and narrow layers stay (:func:`summary` lists them with the reason).
    "condconv", "dcd" and "odconv" replace these convolutions and no linear layers, "dyconv" the shortcuts too, and "kw"
    those but the ones before its first warehouse. CondConv's paper has it in the last stage alone: narrow it with
    `include`. DCD has its form for bottlenecks, `pool=1`; its paper's for BasicBlocks is `pool=2`, as in
    `resnet18_dcd`. Hooks, shared parameters and lists that hold a layer go over to its replacement.

    Args:
        model: Any CNN or transformer of timm, torchvision or one's own.
        method: "fdconv", "condconv", "dyconv", "dcd", "odconv" or "kw".
        include: Names of modules, such as "layer4", ["layer3", "layer4"] or "*.conv2": what lies in none of them is
            left. Or a function: `include(name, module)` is asked about each convolution and linear layer: False leaves
            it, True insists on it where the rules would leave it, None takes the rules' choice.
        allow: What is refused otherwise: "causal" for the MLPs of causal blocks, "sequence_first" for those of blocks
            with nn.MultiheadAttention(batch_first=False).
        **kwargs: Keyword arguments of the method's layers, such as FDConv2d and FDLinear; the latter has no `cutoffs`,
            `mask_grid` and `fbm`. Of "kw" also `cell_num_ratio`, `cell_inplane_ratio` and `cell_outplane_ratio`.

    Returns:
        The model.

    Raises:
        ValueError: If a keyword belongs to no layer, `include` insists on what can't be replaced or names what the
            model has not, FDLinear would mix what must not be mixed (see `allow`), the method can't hold static
            weights, or nothing was replaced.
        TypeError: If `model` is no module, `include` neither function nor names, or an option no number where one is
            wanted.
    """
    return replace_layers(model, method, include, allow, kwargs)


def replace_layers(
    model: nn.Module,
    method: str,
    include: Include | None,
    allow: Collection[str],
    given: dict[str, Any],
    weights_follow: bool = False,
) -> nn.Module:
    """:func:`convert`, with its keyword arguments as `given`.

    Args:
        weights_follow: Weights are loaded next: those of the static layers are not taken over, but NaN stands for them.
    """
    chosen = find_method(method)
    known = chosen.options
    if set(given) - known:
        raise ValueError(
            f"{chosen.layers} have no keyword argument {describe_names(set(given) - known)} to choose here, "
            f"but {', '.join(sorted(known))}"
        )
    keywords = {problem.keyword for problem in PROBLEMS}
    if set(allow) - keywords:
        raise ValueError(f"allow={tuple(allow)}, but it may name {', '.join(map(repr, sorted(keywords)))}")
    candidates = choose(model, include, allow, chosen)
    _raise_on_unfit_blocks(candidates)
    layers = {c.name: c.layer for c in candidates if not c.reason}
    shared = find_shared(model, layers.values())
    options = chosen.plan(model, layers, given)
    replaced: dict[nn.Module, DynamicLayer] = {}
    for name, layer in layers.items():
        if layer in replaced:
            continue
        if layer in shared:
            raise ValueError(f"{name}: {shared[layer]}; leave it with include")
        try:
            replaced[layer] = chosen.make(layer, options[name], weights_follow)
        except ValueError as error:
            raise ValueError(f"{name or 'the layer'}: {error}") from None
    if not replaced:
        reasons = "; ".join(f"{c.name}: {c.reason}" for c in candidates) or "it has no convolution or linear layer"
        if converted := [layer.method for _, layer in named_dynamic_layers(model)]:
            reasons = f"already converted, {len(converted)} of its layers are {', '.join(dict.fromkeys(converted))}; "
            reasons += "print(summary(model)) lists the rest"
        raise ValueError(f"nothing to replace in {type(model).__name__}: {reasons}")
    tie(replaced)
    hand_over(model, replaced)
    if model in replaced:
        return replaced[model]
    for name, layer in layers.items():
        place(model, name, replaced[layer])
        keep_unfused(model, name)
    _logger.info(f"{len(layers)} of {len(candidates)} layers are {chosen.title} now; summary(model) lists them")
    return model


def convert_to_fdconv(
    model: nn.Module, include: Include | None = None, *, allow: Collection[str] = (), **kwargs: Any
) -> nn.Module:
    """:func:`convert` with "fdconv": replaces the layers of a model that the FDConv paper replaces, in place."""
    return convert(model, "fdconv", include, allow=allow, **kwargs)


def first_three(items: list[str], separator: str = ", ") -> str:
    """Three of many, for a message."""
    return separator.join([*items[:3], "..."] if len(items) > 3 else items)


def _raise_on_unfit_blocks(candidates: list[Candidate]) -> None:
    for problem in PROBLEMS:
        names = [candidate.name for candidate in candidates if candidate.problem == problem]
        if names:
            raise ValueError(
                f"{len(names)} layers ({first_three(names)}) are {problem.reason}. "
                "Convert another part of the model, leave these with include, or insist with "
                f"allow=({problem.keyword!r},)"
            )


def init_static(model: nn.Module, initialize: Callable[[], None]) -> None:
    """Runs a static initialisation on a converted model: its dynamic layers get the weights their static twins would.

    Args:
        model: A converted model; its layers keep their identity, and their modulation goes back to rest.
        initialize: Initialises `model`, in which dynamic layers stand as nn.Conv2d and nn.Linear meanwhile.
    """
    layers = dict(named_dynamic_layers(model))
    twins = {name: layer.static_twin() for name, layer in layers.items()}
    for name, twin in twins.items():
        place(model, name, twin)
    try:
        initialize()
    finally:
        for name, layer in layers.items():
            place(model, name, layer)
    for name, layer in layers.items():
        layer.set_static(twins[name].weight, twins[name].bias)


def _raise_on_unfit(unfit: list[str], what: str) -> None:
    if unfit:
        raise ValueError(f"{len(unfit)} keys of the {what} state dict fit nothing in the model: {first_three(unfit)}")


def convert_static_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turns the state dict of a static model into one for its dynamic counterpart, which computes the same function.

    Keys that are a dynamic layer's already stay as they are, so converting twice changes nothing. A layer's static
    weight is all of it: BatchNorm that `model` has absorbed into the layer goes, when the state dict is loaded.

    Args:
        state_dict: Weights of the static model, or of the dynamic one.
        model: The FDConv model, or one with other dynamic layers, or a lone layer. What the state dict lacks of a
            layer's modulation, and its static weight does not decide, is as in `model`.

    Returns:
        A state dict for `model`.

    Raises:
        ValueError: If keys fit nothing in the model, a static weight has another shape, or a layer has both a static
            and a dynamic weight; three of them are named.
    """
    own = model.state_dict()
    out = move_static_weights(state_dict, model)
    _raise_on_unfit([key for key in out if not fits(key, own)], "static")
    return out


def move_static_weights(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """:func:`convert_static_state_dict` that leaves keys which fit nothing as they are."""
    own = model.state_dict()
    out = dict(state_dict)
    wrong_shapes = []
    layers = dict(named_dynamic_layers(model))
    prefixes = {layer: f"{name}." if name else "" for name, layer in layers.items()}
    for name, layer in layers.items():
        prefix = f"{name}." if name else ""
        weight = out.pop(f"{prefix}weight", None)
        if weight is not None:
            dynamic = (f"{prefix}{layer.held[0]}", f"{prefix}filter_scale")
            both = [key for key in dynamic if key in state_dict]
            if both:
                raise ValueError(f"the state dict has {prefix}weight, which is static, beside {', '.join(both)}")
            expected = layer.static_shape
            if not layer.takes_shape(weight.shape):
                wrong_shapes.append(f"{prefix}weight {tuple(weight.shape)} instead of {expected}")
                continue
            # Another name of the bias means that the layer has several.
            bias = out.get(f"{prefix}bias") if layer.held[1] == "bias" else out.pop(f"{prefix}bias", None)
            layer.put_static(out, {**prefixes, layer: prefix}, weight.reshape(expected), bias)
        if f"{prefix}{layer.held[0]}" in out or weight is not None:
            for key in layer.state_dict(prefix=prefix):
                if key not in (f"{prefix}{layer.held[1]}", f"{prefix}filter_scale"):
                    out.setdefault(key, own[key].clone())
    if wrong_shapes:
        raise ValueError(f"{len(wrong_shapes)} static weights do not fit the model: {first_three(wrong_shapes, '; ')}")
    return out


def filter_pretrained(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """As :func:`convert_static_state_dict`, leaving the classifier to timm, which drops it where classes differ."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    classifier = {key: value for key, value in state_dict.items() if key.startswith(prefixes)}
    rest = {key: value for key, value in state_dict.items() if key not in classifier}
    return convert_static_state_dict(rest, model) | classifier


def static_shapes(model: nn.Module) -> SimpleNamespace:
    """What a filter of timm's asks a model for, its `state_dict()`, with the static weights' names and shapes too."""
    state = model.state_dict()
    for name, layer in named_dynamic_layers(model):
        state[f"{name}.weight"] = torch.empty(layer.static_shape, device="meta")
    return SimpleNamespace(state_dict=lambda: state)


OFFICIAL_NAMES = {
    "KSM_Global.fc.": "ksm.fc.",
    "KSM_Global.bn.": "ksm.norm.",
    "KSM_Global.relu.": "ksm.act.",
    "KSM_Local.norm.": "ksm.local_norm.",
    "KSM_Local.conv.": "ksm.local_conv.",
}
OFFICIAL_HEADS = ("kernel_fc", "channel_fc", "filter_fc", "spatial_fc")
OFFICIAL_FBM = "FBM.freq_weight_conv_list."


def _convert_official_layer(state: dict[str, Tensor], layer: FDLayer) -> dict[str, Tensor]:
    """Renames the official state of one layer; what has no counterpart keeps its name."""
    out = {}
    spectrum = state.pop("dft_weight").squeeze(0)
    rows, columns = layer.fdw.rows, layer.fdw.columns
    # The official parameter is S / (min(Cin, Cout) // 2); ours is the Parseval-scaled S / sqrt(R*C).
    factor = min(layer.static_shape[:2]) // 2 / (rows * columns) ** 0.5
    out["fdw.spectrum"] = spectrum * factor * column_scale(columns, dtype=spectrum.dtype)[:, None]
    for kind in ("weight", "bias"):
        heads = [state.pop(f"KSM_Global.{head}.{kind}", None) for head in OFFICIAL_HEADS]
        heads = [head.flatten(1) if kind == "weight" else head for head in heads if head is not None]
        if heads:
            out[f"ksm.heads.{kind}"] = torch.cat(heads)
        gates = [state.pop(key) for key in sorted(state) if key.startswith(OFFICIAL_FBM) and key.endswith(kind)]
        if gates:
            out[f"fbm.{kind}"] = torch.cat(gates)
    for key, value in state.items():
        prefix = next((p for p in OFFICIAL_NAMES if key.startswith(p)), "")
        out[OFFICIAL_NAMES.get(prefix, "") + key[len(prefix) :]] = value
    if "ksm.fc.weight" in out:
        out["ksm.fc.weight"] = out["ksm.fc.weight"].flatten(1)
    return out


def convert_official_state_dict(state_dict: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """Turns a checkpoint of a method's official repository into a state dict for this package's model.

    FDConv's were trained with masks on a 64x64 grid: build the model with `mask_grid=64`. Those of ODConv,
    KernelWarehouse and DCD, of timm's CondConv and of the usual DY-Conv have the names of their reference code. DCD's
    whole models have a dynamic classifier, which ours have not: leave out its keys.

    Args:
        state_dict: Official backbone or detector checkpoint (keys below `backbone.`), with or without the wrappers
            `state_dict`, `model` and `module.`; layers that are static there are converted.
        model: The model or a lone layer.

    Returns:
        A state dict for `model`. A detector's checkpoint has no classifier, so it fits with `num_classes=0`.

    Raises:
        ValueError: If keys fit nothing in the model, or FDConv layers lack keys; of the former three are named.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
    state = convert_layers(state, model)
    missing, wrong_shapes = [], []
    for name, layer in named_fd_layers(model):
        prefix = f"{name}." if name else ""
        if f"{prefix}dft_weight" not in state:
            continue
        if not layer.fdw.official_order:
            raise ValueError(
                f"{name or 'the layer'} has mask_grid=None: build models for official checkpoints with mask_grid=64"
            )
        shape, expected = tuple(state[f"{prefix}dft_weight"].shape), (1, *layer.fdw.spectrum.shape)
        if shape != expected:
            wrong_shapes.append(f"{prefix}dft_weight {shape} instead of {expected}")
            continue
        keys = [key for key in state if key.startswith(prefix)]
        converted = _convert_official_layer({key.removeprefix(prefix): state.pop(key) for key in keys}, layer)
        state.update({f"{prefix}{key}": value for key, value in converted.items()})
        needed = [key for key in layer.state_dict() if not key.endswith(OPTIONAL)]
        missing += [f"{prefix}{key}" for key in needed if key not in converted]
    if wrong_shapes:
        shown = first_three(wrong_shapes, "; ")
        raise ValueError(f"{len(wrong_shapes)} official spectra do not fit the model: {shown}")
    if missing:
        raise ValueError(f"the official state dict lacks {len(missing)} keys of FDConv layers: {', '.join(missing)}")
    return convert_static_state_dict(state, model)
