"""Static layers, models and state dicts into the Fourier domain; official FDConv checkpoints into this package's names.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 4)
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layers import FDConv2d, FDLinear, to_spectrum
from .layers.fdw import GainMaps
from .layers.fourier import column_scale, weight_to_matrix
from .reparameterize import keep_unfused

_logger = logging.getLogger(__name__)

FDLayer = FDConv2d | FDLinear
Include = Callable[[str, nn.Module], bool]

# A layer with fewer channels on either side stays static, as in the paper's models.
MIN_CHANNELS = 17
STEMS = {"stem", "conv1", "conv_stem", "patch_embed"}
SHORTCUTS = {"downsample", "shortcut", "proj"}
CLASSIFIERS = {"head", "heads", "head_dist", "classifier", "fc", "AuxLogits", "aux_classifier"}
MLPS = {"mlp", "ffn", "block"}
SQUEEZE_EXCITE = ("SqueezeExcit", "SEModule", "SEBlock", "EffectiveSE")


@dataclass(frozen=True)
class LayerReport:
    """What becomes of one convolution or linear layer.

    Attributes:
        name: Name of the layer in the model.
        shape: Shape of its static weight.
        reason: Why it stays static; empty where it is (to be) an FDConv layer.
    """

    name: str
    shape: tuple[int, ...]
    reason: str

    @property
    def replaced(self) -> bool:
        return not self.reason

    def __str__(self) -> str:
        return f"{self.name}: {'x'.join(map(str, self.shape))} {self.reason or 'FDConv'}"


def named_fd_layers(model: nn.Module) -> Iterator[tuple[str, FDLayer]]:
    """Names and modules of the FDConv layers of a model; a lone layer has the empty name."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, FDConv2d | FDLinear):
            yield name, module


def static_reason(name: str, layer: nn.Module, parent: nn.Module | None = None) -> str:
    """Why a convolution or linear layer stays static (Sec. 4), or an empty string if it is replaced.

    Replaced are the convolutions of a network's blocks and the linear layers of its MLPs.

    Args:
        name: Name of the layer in the model.
        layer: The layer.
        parent: The module that holds it.
    """
    parts = name.split(".")
    if min(layer.weight.shape[:2]) < MIN_CHANNELS and getattr(layer, "groups", 1) == 1:
        return f"narrow: fewer than {MIN_CHANNELS} channels"
    if parts[0] in CLASSIFIERS:
        return "classifier"
    if type(layer) not in (nn.Conv2d, nn.Linear):
        return f"a subclass ({type(layer).__name__}) that computes something else"
    if parts[0] in STEMS and len(parts) <= 2:
        return "stem"
    if isinstance(layer, nn.Linear):
        return "" if MLPS.intersection(parts) else "linear layer outside an MLP"
    if SHORTCUTS.intersection(parts):
        return "shortcut or downsampling between stages"
    if layer.groups > 1:
        return f"groups={layer.groups}"
    if layer.padding_mode != "zeros":
        return f"padding_mode={layer.padding_mode!r}"
    if layer.kernel_size == layer.stride != (1, 1):
        return "patch embedding or downsampling between stages"
    if type(parent).__name__.startswith(SQUEEZE_EXCITE):
        return "squeeze and excitation"
    return ""


def _static_layers(model: nn.Module, include: Include | None) -> Iterator[tuple[str, nn.Module, str]]:
    inside = tuple(f"{name}." if name else "" for name, _ in named_fd_layers(model))
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Conv2d | nn.Linear) and not name.startswith(inside):
            reason = static_reason(name, module, model.get_submodule(name.rpartition(".")[0]))
            if not reason and include is not None and not include(name, module):
                reason = "not included"
            yield name, module, reason


def summary(model: nn.Module, include: Include | None = None) -> list[LayerReport]:
    """What :func:`convert_to_fdconv` replaces in a model, or has replaced, and what it leaves and why.

    Args:
        model: A static or a converted model.
        include: As for :func:`convert_to_fdconv`.

    Returns:
        A report for each convolution and linear layer.
    """
    reports = [LayerReport(name, layer.static_shape, "") for name, layer in named_fd_layers(model)]
    reports += [LayerReport(name, tuple(m.weight.shape), reason) for name, m, reason in _static_layers(model, include)]
    return reports


def layer_options(layer_class: type[nn.Module]) -> set[str]:
    """Keyword arguments of a layer that its static source does not decide."""
    parameters = inspect.signature(layer_class).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"init_weights", "gain_maps", "device", "dtype"}


def _place(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def convert_to_fdconv(model: nn.Module, include: Include | None = None, **kwargs: Any) -> nn.Module:
    """Replaces the layers of a model that the paper replaces, in place; the model computes the same function as before.

    Replaced are the convolutions of the blocks and the linear layers of the MLPs; stems, shortcuts, classifiers,
    grouped and narrow layers stay (:func:`summary` lists them with the reason).

    Args:
        model: Any timm or torchvision CNN or transformer.
        include: `include(name, module) -> bool` narrows what is replaced.
        **kwargs: Keyword arguments of FDConv2d and FDLinear; the latter has no `cutoffs`, `mask_grid` and `fbm`.

    Returns:
        The model.

    Raises:
        ValueError: If a keyword belongs to neither layer, or nothing was replaced.
    """
    known = layer_options(FDConv2d)
    if set(kwargs) - known:
        raise ValueError(
            f"FDConv2d and FDLinear have no keyword argument {', '.join(sorted(set(kwargs) - known))} to choose here, "
            f"but {', '.join(sorted(known))}"
        )
    linear_kwargs = {key: value for key, value in kwargs.items() if key in layer_options(FDLinear)}
    replaced: dict[nn.Module, FDLayer] = {}
    gain_maps: GainMaps = {}
    layers = list(_static_layers(model, include))
    for name, module, reason in layers:
        if not reason and module not in replaced:
            try:
                if isinstance(module, nn.Conv2d):
                    replaced[module] = FDConv2d.from_conv(module, gain_maps=gain_maps, **kwargs)
                else:
                    replaced[module] = FDLinear.from_linear(module, gain_maps=gain_maps, **linear_kwargs)
            except ValueError as error:
                raise ValueError(f"{name or 'the layer'}: {error}") from None
    if not replaced:
        raise ValueError(
            f"nothing to replace in {type(model).__name__}: "
            + ("; ".join(f"{name}: {reason}" for name, _, reason in layers) or "it has no convolution or linear layer")
        )
    if model in replaced:
        return replaced[model]
    for name, module, reason in layers:
        if not reason:
            _place(model, name, replaced[module])
            keep_unfused(model, name)
    _logger.info(f"{len(replaced)} of {len(layers)} layers are FDConv now; summary(model) lists them")
    return model


def init_static(model: nn.Module, initialize: Callable[[], None]) -> None:
    """Runs a static initialisation on a converted model: its FDConv layers get the weights their static twins would.

    Args:
        model: A converted model; its layers keep their identity, and their gates go back to 1.
        initialize: Initialises `model`, in which FDConv layers stand as nn.Conv2d and nn.Linear meanwhile.
    """
    layers = dict(named_fd_layers(model))
    twins = {name: layer.static_twin() for name, layer in layers.items()}
    for name, twin in twins.items():
        _place(model, name, twin)
    try:
        initialize()
    finally:
        for name, layer in layers.items():
            _place(model, name, layer)
    for name, layer in layers.items():
        layer.set_static(twins[name].weight, twins[name].bias)


def _raise_on_unfit(unfit: list[str], what: str) -> None:
    if unfit:
        raise ValueError(f"{len(unfit)} keys of the {what} state dict fit nothing in the model: {', '.join(unfit)}")


def convert_static_state_dict(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Turns the state dict of a static model into one for its FDConv counterpart, which computes the same function.

    Keys that are in the Fourier domain already stay as they are, so converting twice changes nothing.

    Args:
        state_dict: Weights of the static model, or of the FDConv one.
        model: The FDConv model or a lone FDConv layer. Gates that the state dict lacks are those of `model`.

    Returns:
        A state dict for `model`.

    Raises:
        ValueError: If keys fit nothing in the model, or a static weight has another shape; they are listed.
    """
    own = model.state_dict()
    out = dict(state_dict)
    wrong_shapes = []
    for name, layer in named_fd_layers(model):
        prefix = f"{name}." if name else ""
        weight = out.pop(f"{prefix}weight", None)
        if weight is not None:
            # A pointwise convolution and a linear layer may take each other's weight.
            shape, expected = tuple(weight.shape), layer.static_shape
            if (*shape, 1, 1)[: max(4, len(shape))] != (*expected, 1, 1)[:4]:
                wrong_shapes.append(f"{prefix}weight {shape} instead of {expected}")
                continue
            out[f"{prefix}fdw.spectrum"] = to_spectrum(weight_to_matrix(weight.view((*expected, 1, 1)[:4])))
        if f"{prefix}fdw.spectrum" in out:
            for key in layer.state_dict(prefix=prefix):
                if key not in (f"{prefix}bias", f"{prefix}filter_scale"):
                    out.setdefault(key, own[key].clone())
    if wrong_shapes:
        raise ValueError(f"{len(wrong_shapes)} static weights do not fit the model: {'; '.join(wrong_shapes)}")
    _raise_on_unfit([key for key in out if key not in own], "static")
    return out


def filter_pretrained(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """As :func:`convert_static_state_dict`, leaving the classifier to timm, which drops it where classes differ."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    classifier = {key: value for key, value in state_dict.items() if key.startswith(prefixes)}
    rest = {key: value for key, value in state_dict.items() if key not in classifier}
    return convert_static_state_dict(rest, model) | classifier


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
    """Turns a checkpoint of the official FDConv repository into a state dict for this package's model.

    Such checkpoints were trained with masks on a 64x64 grid: build the model with `mask_grid=64`.

    Args:
        state_dict: Official backbone or detector checkpoint (keys below `backbone.`), with or without the wrappers
            `state_dict`, `model` and `module.`; layers that are static there are moved into the Fourier domain.
        model: The FDConv model or a lone FDConv layer.

    Returns:
        A state dict for `model`. A detector's checkpoint has no classifier, so it fits with `num_classes=0`.

    Raises:
        ValueError: If keys fit nothing in the model, or FDConv layers lack keys; they are listed.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(state_dict.get(wrapper), Mapping):
            state_dict = state_dict[wrapper]
    state = {key.removeprefix("module."): value for key, value in state_dict.items()}
    if any(key.startswith("backbone.") for key in state):
        state = {key.removeprefix("backbone."): v for key, v in state.items() if key.startswith("backbone.")}
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
        needed = [key for key in layer.state_dict() if not key.endswith(("num_batches_tracked", "band_options.values"))]
        missing += [f"{prefix}{key}" for key in needed if key not in converted]
    if wrong_shapes:
        raise ValueError(f"{len(wrong_shapes)} official spectra do not fit the model: {'; '.join(wrong_shapes)}")
    if missing:
        raise ValueError(f"the official state dict lacks {len(missing)} keys of FDConv layers: {', '.join(missing)}")
    return convert_static_state_dict(state, model)
