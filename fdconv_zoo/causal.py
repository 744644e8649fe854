"""Whether a module is causal, as far as it or what holds it tells: by attributes, names, masks and sources."""

import ast
import re
import textwrap
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .sources import forward_source, read_source

CAUSAL_NAME = re.compile("causal|chomp", re.IGNORECASE)
LIBRARIES = {"torch", "torchvision", "timm", "transformers", "diffusers"}
# What makes a triangular mask, and what is worth a look whether it does.
MASK_MAKER = re.compile(r"^(triu|tril)_?$|subsequent_mask|causal\w*mask|look_?ahead\w*mask")
MASKING = re.compile(r"triu|tril|subsequent_mask|causal|look_?ahead|scaled_dot_product_attention")
# A loss, say, may take the upper triangle of a matrix for other reasons.
ATTENDING = re.compile(r"softmax|mask|attn|attention", re.IGNORECASE)
PADDINGS = (
    nn.modules.padding._ConstantPadNd,
    nn.modules.padding._ReflectionPadNd,
    nn.modules.padding._ReplicationPadNd,
)
MASK_NAME = re.compile(r"^(?!.*(padding|memory)).*(mask|causal|triu|tril)", re.IGNORECASE)


def _is_causal_mask(mask: Tensor) -> bool:
    """Whether a tensor is squares (..., L, L) with one value above the diagonal that is nowhere on or below it.

    That value forbids (-inf and the like), or what is on and below goes by the distance alone, be it one value.
    """
    length = mask.shape[-1] if mask.dim() > 1 else 0
    if mask.layout != torch.strided or mask.is_complex() or mask.is_quantized:
        return False
    if mask.is_meta or length < 4 or mask.shape[-2] != length or not mask.numel():
        return False
    squares = mask.detach().reshape(-1, length, length)
    value, above = squares[0, 0, 1], torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    if not (squares[:, above] == value).all() or (squares[:, ~above] == value).any():
        return False
    return bool(value < -1e3 or (squares[:, 1:, 1:] == squares[:, :-1, :-1]).all())


def asks_for_causal(kind: type[nn.Module]) -> bool:
    """Whether a class makes causal masks or asks for causal attention, by its source."""
    asked = "is_causal=True" in (forward_source(kind) or "").replace(kind.forward.__doc__ or "", "")
    return asked or any(map(_makes_masks, filter(_is_own, kind.__mro__)))


def _is_own(kind: type) -> bool:
    """Whether a class is of no library that says by attributes or arguments what is causal."""
    return issubclass(kind, nn.Module) and kind.__module__.partition(".")[0] not in LIBRARIES


def _makes_masks(kind: type[nn.Module]) -> bool:
    source = read_source(kind) or ""
    if not (MASKING.search(source) and ATTENDING.search(source)):
        return False
    return any(isinstance(node, ast.Call) and _asks(node) for node in _nodes(source))


def _nodes(source: str) -> Iterator[ast.AST]:
    """What a source is made of; nothing where it is a part of an expression."""
    try:
        yield from ast.walk(ast.parse(textwrap.dedent(source)))
    except SyntaxError:
        return


def _name_of(call: ast.Call) -> str:
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def _asks(call: ast.Call) -> bool:
    name = _name_of(call)
    if MASK_MAKER.search(name):
        return True
    asking = [keyword.value for keyword in call.keywords if keyword.arg in ("is_causal", "causal")]
    if name == "scaled_dot_product_attention":
        asking += call.args[5:6]
    return any(isinstance(value, ast.Constant) and value.value is True for value in asking)


def _pads_before(module: nn.Module) -> bool:
    """Whether a sequence is padded before its first token alone, or cut after the last, around convolutions."""
    if isinstance(module, PADDINGS):
        return len(module.padding) == 2 and module.padding[0] > 0 and module.padding[1] == 0
    convolutions = [child for child in module.children() if isinstance(child, nn.Conv1d)]
    if not convolutions or any(map(_sees_its_whole_kernel_before, convolutions)):
        return bool(convolutions)
    return any(map(_pads_or_cuts, _nodes(forward_source(type(module)) or "")))


def _sees_its_whole_kernel_before(layer: nn.Conv1d) -> bool:
    """Whether a convolution pads by all but one tap, as where what is too long is cut off after the last token."""
    reach = layer.dilation[0] * (layer.kernel_size[0] - 1)
    return layer.padding[0] == reach > 0


def _pads_or_cuts(node: ast.AST) -> bool:
    """Whether something is pad(x, (before, 0)) or x[..., :-before], whatever `before` is."""
    if isinstance(node, ast.Subscript):
        last = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) and node.slice.elts else None
        return isinstance(last, ast.Slice) and last.lower is None and isinstance(last.upper, ast.UnaryOp)
    if not (isinstance(node, ast.Call) and _name_of(node) == "pad"):
        return False
    sides = [*node.args[1:2], *(keyword.value for keyword in node.keywords if keyword.arg == "pad")]
    pads = sides[0].elts if sides and isinstance(sides[0], ast.Tuple | ast.List) else []
    return len(pads) == 2 and [isinstance(pad, ast.Constant) and pad.value == 0 for pad in pads] == [False, True]


def is_causal(module: nn.Module, asking: set[type[nn.Module]]) -> bool:
    """Whether a module says that it is causal: by attributes, its name, its mask, its padding or its source.

    Args:
        module: Any module.
        asking: Classes for which :func:`asks_for_causal` holds.
    """
    kind = type(module)
    says = getattr(module, "is_causal", None)
    # A decoder of Hugging Face's that says nothing else; attention to an encoder says False.
    is_decoder = kind.__module__.startswith("transformers") and getattr(module, "is_decoder", False)
    if says is True or (is_decoder is True and says is None) or getattr(module, "causal", None) is True:
        return True
    if kind in asking or CAUSAL_NAME.search(kind.__name__) or _pads_before(module):
        return True
    kept = (value for value in vars(module).values() if isinstance(value, Tensor))
    return any(map(_is_causal_mask, (*module.buffers(recurse=False), *kept)))


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
