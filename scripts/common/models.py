"""Models for the command line: names and wildcards, static twins, checkpoints that must fit."""

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import clean_state_dict, get_pretrained_cfg, is_model_pretrained
from torch import Tensor, nn

from fdconv_zoo import FDConv2d, FDLinear, PretrainedError, convert_static_state_dict, static_name
from fdconv_zoo.download import WAYS_OUT


def expand_names(patterns: Iterable[str], weights_needed: bool) -> list[str]:
    """Resolve wildcards and refuse what timm does not know.

    Args:
        patterns: Model names (timm's `hf-hub:` and `local-dir:` ones too) and wildcards; a wildcard with a tag goes
            over pretrained weights, one without over the models that have any.
        weights_needed: Refuse models without pretrained weights.

    Raises:
        ValueError: A name or a wildcard fits no model; names close matches.
    """
    names: list[str] = []
    for pattern in patterns:
        if re.search(r"[*?\[]", pattern):
            found = timm.list_models(pattern, pretrained=True, include_tags="." in pattern)
            if not found:
                raise ValueError(f"no model with pretrained weights matches {pattern}")
            names += found
        elif ":" in pattern:
            names.append(pattern)
        elif not timm.is_model(pattern) or ("." in pattern and pattern not in timm.list_models(include_tags=True)):
            close = difflib.get_close_matches(pattern, [*timm.list_models(), *timm.list_pretrained()], n=4)
            raise ValueError(f"unknown model {pattern}" + (f", did you mean {', '.join(close)}?" if close else ""))
        elif weights_needed and not is_model_pretrained(pattern):
            raise ValueError(f"{pattern} has no pretrained weights: give --checkpoint")
        else:
            names.append(pattern)
    return list(dict.fromkeys(names))


def add_static_twins(names: Sequence[str]) -> list[str]:
    """Return the names, each FDConv model's static base behind it; a name without a tag stands for its default tag.

    Raises:
        ValueError: None of them is an FDConv model.
    """
    listed: list[str] = []
    for name in names:
        listed.append(name)
        architecture = name.partition(".")[0]
        if architecture.endswith("_fdconv"):
            config = get_pretrained_cfg(name)
            listed.append(static_name(f"{architecture}.{config.tag}" if config and config.tag else name))
    if len(listed) == len(names):
        raise ValueError(f"none of {', '.join(names)} is an FDConv model, to be compared with a static one")
    return list(dict.fromkeys(listed))


def read_checkpoint(path: Path, use_ema: bool = False) -> dict[str, Tensor]:
    """Return the weights in a file, out of the wrappings of timm's checkpoints, DDP and torch.compile.

    timm's own `load_state_dict` would take the trained weights without a word where the averaged ones are missing.

    Args:
        path: A .safetensors file, or one that `torch.load` reads with `weights_only`.
        use_ema: Take the averaged weights that timm's trainer keeps beside the trained ones.

    Raises:
        ValueError: The file can't be read, or holds no averaged weights.
    """
    try:
        if path.suffix == ".safetensors":
            checkpoint = safetensors.torch.load_file(path)
        else:
            # timm's trainer stores its arguments as a Namespace
            with torch.serialization.safe_globals([argparse.Namespace]):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, pickle, zipfile and torch each raise their own
        raise ValueError(f"cannot read checkpoint {path}: {str(error).splitlines()[0]}") from error
    wanted = ("state_dict_ema", "model_ema") if use_ema else ("state_dict", "model")
    key = next((key for key in wanted if key in checkpoint), None)
    if use_ema and key is None:
        raise ValueError(f"checkpoint {path} holds no averaged weights: leave out --use-ema")
    return clean_state_dict(checkpoint[key] if key else checkpoint)


def describe_misfits(state_dict: dict[str, Tensor], model: nn.Module) -> str:
    """Say which keys keep weights from loading into a model, the first three of a kind; empty if they fit."""
    own = model.state_dict()
    kinds = {
        # checkpoints from before torch 0.4.1 have no num_batches_tracked
        "missing keys": [key for key in own if key not in state_dict and not key.endswith("num_batches_tracked")],
        "unexpected keys": [key for key in state_dict if key not in own],
        "other shapes": [
            f"{key} {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own
            if key in state_dict and state_dict[key].shape != own[key].shape
        ],
    }
    return "; ".join(
        f"{kind} ({len(keys)}): {', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''}"
        for kind, keys in kinds.items()
        if keys
    )


def load_checkpoint(model: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Load weights into a model; a static model's are moved into the Fourier domain for an FDConv model.

    Raises:
        ValueError: They do not fit; names the keys, or the options of the layers that they were saved with.
    """
    misfits = describe_misfits(state_dict, model)
    if misfits and any(isinstance(module, FDConv2d | FDLinear) for module in model.modules()):
        state_dict = convert_static_state_dict(state_dict, model)
        misfits = describe_misfits(state_dict, model)
    if misfits:
        raise ValueError(f"the checkpoint does not fit: {misfits}")
    try:
        model.load_state_dict(state_dict, strict=False)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint does not fit: {error}") from None


def build_model(
    name: str, *, checkpoint: dict[str, Tensor] | None = None, pretrained: bool = True, **kwargs: Any
) -> nn.Module:
    """Create a model with a checkpoint's weights, or pretrained ones.

    Args:
        name: timm's, of an FDConv or a static model.
        checkpoint: Weights instead of pretrained ones.
        pretrained: False for weights as they are initialised, if there is no checkpoint.
        kwargs: Of the model; None stands for its own.

    Raises:
        ValueError: The checkpoint does not fit.
        RuntimeError: There are no pretrained weights to be had; says where to take them from.
    """
    if checkpoint is not None:
        model = timm.create_model(name, **kwargs)
        load_checkpoint(model, checkpoint)
        return model
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, PretrainedError) as error:  # OSError: the Hub's client, for models that are timm's own
        raise RuntimeError(
            f"no pretrained weights: {str(error).replace(WAYS_OUT, '')} Without a network: --checkpoint FILE, a mirror "
            "(HF_ENDPOINT) or a filled cache (HF_HUB_CACHE), see `python -m hub.mirror --help`"
        ) from error
