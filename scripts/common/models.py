"""Models for the command line: names and wildcards, static twins, weights from files or the Hub."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model_pretrained
from torch import Tensor, nn

from common.weights import load_checkpoint
from fdconv_zoo import PretrainedError, static_name
from fdconv_zoo.default_cfgs import is_zoo_model
from fdconv_zoo.download import WAYS_OUT
from fdconv_zoo.names import check_name


def check_image_size(model: nn.Module, size: tuple[int, int]) -> None:
    """Refuse images that a model of one size, such as a Swin Transformer, does not take.

    Args:
        model: timm's.
        size: Height and width.

    Raises:
        ValueError: Says which option makes it take them.
    """
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "strict_img_size", False) and tuple(embed.img_size) != tuple(size):
        height, width = size
        wanted = f"{height}" if height == width else f"[{height},{width}]"
        raise ValueError(
            f"the model takes {' x '.join(map(str, embed.img_size))} images, not {height} x {width}: "
            f"give --model-kwargs img_size={wanted}"
        )


@torch.inference_mode()
def takes_other_sizes(model: nn.Module, images: Tensor) -> bool:
    """Whether a model takes images of another height too; a Swin Transformer refuses by default.

    Args:
        model: In eval mode.
        images: (B, C, H, W), that it takes.
    """
    _, channels, height, width = images.shape
    try:
        model(images.new_zeros(1, channels, height + 32, width))
    except (AssertionError, RuntimeError, ValueError):
        return False
    return True


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
        else:
            check_name(pattern)
            if weights_needed and ":" not in pattern and not is_model_pretrained(pattern):
                raise ValueError(f"{pattern} has no pretrained weights: give --checkpoint")
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
        if is_zoo_model(architecture):
            config = get_pretrained_cfg(name)
            listed.append(static_name(f"{architecture}.{config.tag}" if config and config.tag else name))
    if len(listed) == len(names):
        raise ValueError(f"none of {', '.join(names)} is an FDConv model, to be compared with a static one")
    return list(dict.fromkeys(listed))


class UnavailableError(RuntimeError):
    """There are no pretrained weights to be had; says where to take them from."""


def check_pretrained_classes(name: str, num_classes: int | None) -> None:
    """Refuse pretrained weights whose classifier would be left out, and a random one be measured in its place.

    Args:
        name: timm's, of a model that takes its pretrained weights; `hf-hub:` and `local-dir:` names are not looked up.
        num_classes: Outputs that were asked for; None for the model's own, 0 for none.

    Raises:
        UnavailableError: The weights have other classes.
    """
    config = None if ":" in name else get_pretrained_cfg(name)
    if config and num_classes and num_classes != config.num_classes:
        raise UnavailableError(
            f"no pretrained weights of {num_classes} classes: {name}'s classifier has {config.num_classes}, and one of "
            "random numbers would stand for it. --checkpoint FILE has yours"
        )


def build_model(
    name: str,
    *,
    checkpoint: dict[str, Tensor] | None = None,
    pretrained: bool = True,
    option: str = "--checkpoint",
    **kwargs: Any,
) -> nn.Module:
    """Create a model with a checkpoint's weights, or pretrained ones.

    Args:
        name: timm's, of an FDConv or a static model.
        checkpoint: Weights instead of pretrained ones.
        pretrained: False for weights as they are initialised, if there is no checkpoint.
        option: The command's option for a file of weights, for errors.
        kwargs: Of the model; None stands for its own.

    Raises:
        ValueError: The checkpoint does not fit.
        UnavailableError: There are no pretrained weights to be had; says where to take them from.
    """
    if checkpoint is not None:
        model = timm.create_model(name, **kwargs)
        load_checkpoint(model, checkpoint)
        return model
    try:
        return timm.create_model(name, pretrained=pretrained, **kwargs)
    except (OSError, PretrainedError) as error:  # OSError: the Hub's client, for models that are timm's own
        raise unavailable(error, option) from error


def unavailable(error: Exception, option: str) -> UnavailableError:
    """The error for weights that are not to be had, with ways out that a command has.

    Args:
        error: Why.
        option: The command's option for a file of weights.
    """
    return UnavailableError(
        f"no pretrained weights: {str(error).replace(WAYS_OUT, '')} Without a network: {option} FILE, a mirror "
        "(HF_ENDPOINT) or a filled cache (HF_HUB_CACHE), see `python -m hub.mirror --help`"
    )
