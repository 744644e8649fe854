"""Blocks whose tokens FDConv must not pool: causal ones, and those that keep tokens before samples.

An FDConv layer makes one weight for a sample from the mean over all its tokens. In a causal block that lets a later
token change an earlier one; where the first dimension is tokens, it lets one sample change another.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from .structure import find_mlps

REASONS = {
    "causal": "causal: FDConv pools over all tokens, so that a later one, or padding, would change those before it",
    "sequence_first": (
        "sequence first: nn.MultiheadAttention(batch_first=False) beside them takes (tokens, batch, channels), and "
        "FDLinear takes the first dimension for samples, so that one sample would change another"
    ),
}


CAUSAL_NAME = re.compile("causal|chomp", re.IGNORECASE)


def _is_causal_mask(mask: Tensor) -> bool:
    """Whether a buffer is a square with one value above the diagonal and another one on and below it."""
    if mask.is_meta or mask.dim() < 2 or mask.shape[-1] < 4 or mask.numel() != mask.shape[-1] ** 2:
        return False
    square = mask.detach().reshape(mask.shape[-1], -1)
    if square.shape[0] != square.shape[1] or square[0, 0] != square[1, 0] or square[0, 0] == square[0, 1]:
        return False
    above = torch.ones_like(square, dtype=torch.bool).triu(1)
    return bool((square[above] == square[0, 1]).all() and (square[~above] == square[0, 0]).all())


def _asks_for_causal(kind: type[nn.Module]) -> bool:
    """Whether a class's forward asks for causal attention, by its source."""
    if kind.__module__.startswith("torch."):
        return False
    try:
        source = inspect.getsource(kind.forward)
    except (OSError, TypeError):
        return False
    return "is_causal=True" in source.replace(kind.forward.__doc__ or "", "")


def _is_causal(module: nn.Module, asking: set[type[nn.Module]]) -> bool:
    """Whether a module says that it is causal: by Hugging Face's attributes, its name, its mask or its source."""
    kind = type(module)
    is_decoder = kind.__module__.startswith("transformers") and getattr(module, "is_decoder", False)
    if getattr(module, "is_causal", False) is True or is_decoder is True or kind in asking:
        return True
    if CAUSAL_NAME.search(kind.__name__) or isinstance(module, nn.TransformerDecoderLayer):
        return True
    return any(_is_causal_mask(buffer) for buffer in module.buffers(recurse=False))


def _is_sequence_first(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) and not module.batch_first


def _blocks(model: nn.Module, matches: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Blocks around the modules that match: the module itself if it holds an MLP, what holds it if it is attention."""
    for name, module in model.named_modules():
        if matches(module):
            mlps, _ = find_mlps(module)
            yield module if mlps else model.get_submodule(name.rpartition(".")[0])


def find_unfit(model: nn.Module) -> dict[nn.Module, str]:
    """Layers for which FDConv would be wrong, and the key of the reason in `REASONS`."""
    unfit: dict[nn.Module, str] = {}
    asking = {kind for kind in {type(module) for module in model.modules()} if _asks_for_causal(kind)}
    for key, matches in (("sequence_first", _is_sequence_first), ("causal", partial(_is_causal, asking=asking))):
        kinds = (nn.Linear, nn.modules.conv._ConvNd) if key == "causal" else (nn.Linear,)
        for block in _blocks(model, matches):
            unfit.update({part: key for part in block.modules() if isinstance(part, kinds)})
    return unfit
