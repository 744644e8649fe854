"""Weights from files: out of the wrappings of trainers, into models that they must fit."""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models import clean_state_dict
from torch import Tensor, nn

from common.optim import classifier_names
from fdconv_zoo import convert_static_state_dict
from fdconv_zoo.checkpoint import describe_misfits, strip_prefixes
from fdconv_zoo.choice import named_dynamic_layers

AVERAGED = ("state_dict_ema", "model_ema", "ema_state_dict", "ema")
POINTER = b"version https://git-lfs"  # what git leaves in place of a large file that was not fetched


def read_checkpoint(path: Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the weights in a file, out of the wrappings of train.py's states, timm's checkpoints and others.

    timm's own `load_state_dict` would take the trained weights without a word where the averaged ones are missing.

    Args:
        path: A .safetensors file, or one that `torch.load` reads with `weights_only`.
        use_ema: Take the averaged weights that a trainer keeps beside the trained ones; a file of averaged weights
            alone needs no asking.

    Raises:
        ValueError: The file can't be read, or holds no weights, or no averaged ones.
    """
    try:
        if path.suffix == ".safetensors":
            checkpoint: Any = safetensors.torch.load_file(path)
        else:
            # timm's trainer stores its arguments as a Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zipfile and torch each raise their own
        raise ValueError(f"cannot read checkpoint {path}: {_unreadable(path, error)}") from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"checkpoint {path} holds a {type(checkpoint).__name__}, no weights by name")
    if isinstance(checkpoint.get("weights"), Mapping) and "last" in checkpoint["weights"]:  # last.state.pt of train.py
        states = checkpoint["weights"]
        checkpoint = {"state_dict": states["last"]} | (
            {"state_dict_ema": states["last_ema"]} if "last_ema" in states else {}
        )
    wanted = AVERAGED if use_ema else ("state_dict", "model", "weights", *AVERAGED)
    key = next((key for key in wanted if isinstance(checkpoint.get(key), Mapping)), None)
    if use_ema and key is None:
        raise ValueError(f"checkpoint {path} holds no averaged weights: leave out --use-ema")
    weights = clean_state_dict(checkpoint[key] if key else checkpoint)
    tensors = {name: value for name, value in weights.items() if isinstance(value, Tensor)}
    if not tensors:
        there = ", ".join(str(name) for name in list(weights)[:3])
        raise ValueError(f"checkpoint {path} holds no weights, only {there or 'nothing'}: is it a training state?")
    return tensors


def _unreadable(path: Path, error: Exception) -> str:
    """Why a file holds no weights that can be read, as far as it can be told."""
    if isinstance(error, OSError):
        return str(error)
    with path.open("rb") as file:
        start = file.read(len(POINTER))
    if start == POINTER:
        return "it is a Git LFS pointer: fetch the file itself with git lfs pull"
    if not start:
        return "it is empty"
    if "Weights only load failed" in str(error):
        return "it is a pickle of more than tensors, such as a whole model: save its state_dict() instead"
    return f"neither torch nor safetensors knows it ({type(error).__name__}: {str(error).splitlines()[0]})"


def fit_checkpoint(model: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for the model: prefixes of wrappers stripped, a static model's weights converted for a dynamic one.

    Raises:
        ValueError: It does not fit; names some keys and the likely cause.
    """
    state = strip_prefixes(state_dict, model)
    misfits = describe_misfits(state, model)
    layers = dict(named_dynamic_layers(model))
    static = {f"{name}.weight": math.prod(layer.static_shape) for name, layer in layers.items()}
    # Several biases have another name than the static one.
    static |= {f"{name}.bias": layer.static_shape[0] for name, layer in layers.items() if layer.held[1] != "bias"}
    if misfits and static:
        own = model.state_dict()
        odd = {
            key: value
            for key, value in state.items()
            if key not in own and (key not in static or value.numel() != static[key])
        }
        rest = {key: value for key, value in state.items() if key not in odd}
        state = convert_static_state_dict(rest, model) | odd
        misfits = describe_misfits(state, model)
    if misfits:
        classes = _other_classes(state, model)
        advice = f". Give --num-classes {classes}" if classes else ""
        raise ValueError(f"the checkpoint does not fit: {misfits}{advice}")
    return state


def _other_classes(state: Mapping[str, Tensor], model: nn.Module) -> int | None:
    """The number of classes of weights that fit but for a classifier of others; else None."""
    classifiers = tuple(f"{name}." for name in classifier_names(model))
    own = {key: value for key, value in model.state_dict().items() if key.startswith(classifiers) and key in state}
    if not own or describe_misfits({**state, **own}, model):
        return None
    name = next(iter(own))
    return None if len(state[name]) == len(own[name]) else len(state[name])


def load_checkpoint(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights into a model; a static model's are moved into the Fourier domain for an FDConv model.

    Raises:
        ValueError: They do not fit; names some keys and the likely cause, or the options they were saved with.
    """
    try:
        model.load_state_dict(fit_checkpoint(model, state_dict), strict=False)
    except RuntimeError as error:  # of layers that were saved with other options
        raise ValueError(f"the checkpoint does not fit: {error}") from None
