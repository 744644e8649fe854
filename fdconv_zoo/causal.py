"""Whether a module is causal, as far as it or what holds it tells: by attributes, names, masks and sources."""

import ast
import re
import textwrap

import torch
from torch import Tensor, nn

from .sources import forward_source, read_source

CAUSAL_NAME = re.compile("causal|chomp", re.IGNORECASE)
MASK_NAME = re.compile(r"^(?!.*(padding|memory)).*(mask|causal|triu|tril)", re.IGNORECASE)


def _is_causal_mask(mask: Tensor) -> bool:
    """Whether a buffer is a square with one value above the diagonal and another one on and below it."""
    if mask.is_meta or mask.dim() < 2 or mask.shape[-1] < 4 or mask.numel() != mask.shape[-1] ** 2:
        return False
    square = mask.detach().reshape(mask.shape[-1], -1)
    if square.shape[0] != square.shape[1] or square[0, 0] != square[1, 0] or square[0, 0] == square[0, 1]:
        return False
    above = torch.ones_like(square, dtype=torch.bool).triu(1)
    return bool((square[above] == square[0, 1]).all() and (square[~above] == square[0, 0]).all())


def asks_for_causal(kind: type[nn.Module]) -> bool:
    """Whether a class's forward asks for causal attention, by its source."""
    source = forward_source(kind) or ""
    return "is_causal=True" in source.replace(kind.forward.__doc__ or "", "")


def is_causal(module: nn.Module, asking: set[type[nn.Module]]) -> bool:
    """Whether a module says that it is causal: by Hugging Face's attributes, its name, its mask or its source.

    Args:
        module: Any module.
        asking: Classes for which :func:`asks_for_causal` holds.
    """
    kind = type(module)
    says = getattr(module, "is_causal", None)
    # A decoder of Hugging Face's that says nothing else; attention to an encoder says False.
    is_decoder = kind.__module__.startswith("transformers") and getattr(module, "is_decoder", False)
    if says is True or (is_decoder is True and says is None) or kind in asking:
        return True
    return bool(CAUSAL_NAME.search(kind.__name__)) or any(map(_is_causal_mask, module.buffers(recurse=False)))


def may_be_masked(model: nn.Module, name: str) -> bool:
    """Whether a causal mask may reach an nn.TransformerDecoderLayer when it is called.

    That is for the caller to say. Known not to are decoders, like those of detectors, that a module of one's own calls
    without one, by its source.

    Args:
        model: What holds the layer.
        name: Its name in the model.
    """
    part = name
    while True:
        kind = type(model.get_submodule(name))
        if not kind.forward.__module__.startswith("torch."):
            return _may_hand_masks(kind, part)
        if not name:
            return True
        name, _, part = name.rpartition(".")


def _may_hand_masks(kind: type[nn.Module], part: str) -> bool:
    """Whether a class's methods name a mask, other than for padding or memory, or call a part with arguments unseen.

    Args:
        kind: The class.
        part: Name of what it holds; called by a bare name, as in a loop, it may be anything.
    """
    source = read_source(kind)
    if source is None:
        return True
    try:
        (body,) = ast.parse(textwrap.dedent(source)).body
    except SyntaxError:
        return True
    methods = [node for node in body.body if isinstance(node, ast.FunctionDef) and node.name != "__init__"]
    for node in (node for method in methods for node in ast.walk(method)):
        names = [getattr(node, key, None) for key in ("id", "attr", "arg")]
        if any(isinstance(name, str) and MASK_NAME.search(name) for name in names):
            return True
        if isinstance(node, ast.Call) and _called(node.func) in (part, "forward", None):
            starred = any(isinstance(arg, ast.Starred) for arg in node.args)
            if starred or len(node.args) > 2 or any(keyword.arg is None for keyword in node.keywords):
                return True
    return False


def _called(function: ast.expr) -> str | None:
    """The attribute of `self` (or of whatever) by which something is called, or None for a bare name."""
    attribute = None
    while isinstance(function, ast.Attribute | ast.Subscript | ast.Call):
        attribute = getattr(function, "attr", attribute)
        function = function.func if isinstance(function, ast.Call) else function.value
    return attribute
