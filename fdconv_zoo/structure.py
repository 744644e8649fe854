"""What a layer is for, from the modules around it: MLPs, attention over channels, the network in its wrappers.

Names are the authors'; what holds a layer, what it is beside and which channels it joins is the network.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from typing import NamedTuple

from torch import nn

from .layers import FDLinear
from .layers.base import DynamicLayer
from .sources import forward_source

# A layer with fewer channels on either side stays static, as in the paper's models.
MIN_CHANNELS = 17
ACTIVATION = re.compile(r"relu|gelu|glu|silu|swish|mish|elu|tanh|softplus|activation", re.IGNORECASE)
ACTIVATION_ATTRIBUTE = re.compile(r"^(act|activation|nonlinearity|\w*_act|\w*act_fn|activation_fn)$")
# Names of what joins stages beside the blocks' branches.
SHORTCUTS = {"downsample", "shortcut", "proj"}
POOLING = re.compile(r"Adaptive(Avg|Max)?Pool|GlobalAvgPool|GlobalPool")
GATE = re.compile(r"sigmoid|softmax", re.IGNORECASE)
# In a forward's source: the mean or maximum over a map; a gate.
POOLS = re.compile(r"\.mean\(|\.amax\(|adaptive_\w+_pool")
GATES = re.compile(r"sigmoid\(|softmax\(", re.IGNORECASE)
CONVOLUTION = nn.modules.conv._ConvNd
LAYERS = (CONVOLUTION, nn.Linear, DynamicLayer)


def _holds_layers(module: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> bool:
    return any(isinstance(part, kinds) for part in module.modules())


def _is_activation(module: nn.Module) -> bool:
    return bool(ACTIVATION.search(type(module).__name__)) and not _holds_layers(module)


def _has_activation(block: nn.Module) -> bool:
    """Whether a block holds an activation, as a module or as a function (GEGLU has it in its method)."""
    if any(_is_activation(child) for child in block.children()) or ACTIVATION.search(type(block).__name__):
        return True
    return any(ACTIVATION_ATTRIBUTE.match(name) and callable(value) for name, value in vars(block).items())


def _width(layer: nn.Module) -> tuple[int, int]:
    """Input and output channels."""
    if isinstance(layer, nn.Linear | FDLinear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _joins(first: nn.Module, second: nn.Module) -> bool:
    """Whether one layer's output fits the next one's input, also through a gate that halves it."""
    return _width(first)[1] in (_width(second)[0], 2 * _width(second)[0])


def _only_linear(module: nn.Module) -> nn.Module | None:
    """The linear layer that a child is, or holds directly and alone."""
    if isinstance(module, nn.Linear | FDLinear):
        return module
    held = [part for part in module.modules() if isinstance(part, LAYERS) and part is not module]
    direct = [child for child in module.children() if isinstance(child, nn.Linear | FDLinear)]
    return direct[0] if len(direct) == 1 and len(held) == 1 else None


def _chains(block: nn.Module) -> Iterator[list[nn.Module]]:
    """Linear layers of a block that are around an activation, first to last."""
    children = list(block.children())
    linears = [child for child in children if isinstance(child, nn.Linear | FDLinear)]
    if isinstance(block, nn.Sequential):
        chain: list[nn.Module] = []
        activated = False
        for child in children:
            if isinstance(child, nn.Linear | FDLinear):
                if chain and not (activated and _joins(chain[-1], child)):
                    yield chain
                    chain = []
                chain.append(child)
                activated = False
            activated |= _is_activation(child)
        yield chain
    elif len(linears) > 1 and _has_activation(block):
        *firsts, last = linears
        # One layer, or a value and its gate. Attention with a kernel function has queries, keys and values.
        if len(firsts) < 3 and _joins(firsts[0], last) and _width(firsts[0]) == _width(firsts[-1]):
            yield linears
    # Layers in blocks of their own: Hugging Face's intermediate and output, diffusers' GEGLU before a linear layer.
    holders = [child for child in children if _holds_layers(child)]
    for first, second in pairwise(holders):
        pair = [_only_linear(first), _only_linear(second)]
        if None not in pair and first is not pair[0] and _has_activation(first) and _joins(*pair):
            # As wide as the block they may be beside each other: queries and keys, heads.
            if isinstance(block, nn.Sequential) or _width(pair[0])[1] > _width(pair[0])[0]:
                yield pair


def find_mlps(model: nn.Module) -> tuple[set[nn.Module], set[nn.Module]]:
    """Linear layers of MLPs: two around an activation, or more, from some width through no smaller one and back.

    Returns:
        Those of MLPs, and those of what is built like one on fewer channels than a feature map has (a position's
        coordinates, say): the first linear layer's width tells.
    """
    mlps: set[nn.Module] = set()
    narrow: set[nn.Module] = set()
    for block in model.modules():
        for chain in _chains(block):
            if len(chain) > 1:
                (width, hidden), out = _width(chain[0]), _width(chain[-1])[1]
                if width < MIN_CHANNELS:
                    narrow.update(chain)
                elif width == out and hidden >= width:
                    mlps.update(chain)
    return mlps, narrow


class Pooled(NamedTuple):
    """Layers that see a map pooled to one place, or make it for the pooling.

    Attributes:
        attention: Whose output weights a map: squeeze and excitation and its kin, branches that begin with the pooling.
        classifiers: Whose output is the network's: convolutions after the last layers' pooling, or the last one before.
    """

    attention: set[nn.Module]
    classifiers: set[nn.Module]


def find_pooled(model: nn.Module) -> Pooled:
    """Layers around global poolings, by what becomes of their output."""
    found = Pooled(set(), set())
    for name, block in model.named_modules():
        parent = model.get_submodule(name.rpartition(".")[0])
        holders = [child for child in block.children() if _holds_layers(child)]
        # A sequence around two is the whole branch; around more, a network that pools for its classifier.
        if len(holders) == 2 or not isinstance(block, nn.Sequential):
            is_attention = _gates(block) and (_pools(block) or _pools(parent))
            may_be = _pools_or_gates(block) or _pools_or_gates(parent)
            for pair in pairwise(holders):
                layers = [[part for part in child.modules() if isinstance(part, LAYERS)] for child in pair]
                if is_attention and all(_returns(first, second) for first, second in product(*layers)):
                    found.attention.update(*layers)
                elif may_be and _returns(*pair) and _width(pair[0])[1] < _width(pair[0])[0]:
                    found.attention.update(pair)
        _sort_pooled(block, found)
    return found


def _returns(first: nn.Module, second: nn.Module) -> bool:
    """Whether two pointwise layers go through no more channels and back, or to several times as many (for branches)."""
    if not (_is_pointwise(first) and _is_pointwise(second)):
        return False
    (width, hidden), (joint, out) = _width(first), _width(second)
    return joint == hidden <= width and out % width == 0


def _pools_or_gates(block: nn.Module) -> bool:
    """Whether a block itself pools a map to one place or has a gate, as a module or in its forward's source.

    Networks in networks (two pointwise convolutions on a map) do neither. True where the source can't be read.
    """
    return forward_source(type(block)) is None or _pools(block) or _gates(block)


def _pools(block: nn.Module) -> bool:
    source = forward_source(type(block)) or ""
    return any(map(_pools_globally, block.children())) or bool(POOLS.search(source))


def _gates(block: nn.Module) -> bool:
    source = forward_source(type(block)) or ""
    return any(GATE.search(type(child).__name__) for child in block.children()) or bool(GATES.search(source))


def _pools_globally(module: nn.Module) -> bool:
    size = getattr(module, "output_size", 1)
    return bool(POOLING.search(type(module).__name__)) and size in (1, (1,), (1, 1), (1, 1, 1), [1, 1])


def _sort_pooled(block: nn.Module, found: Pooled) -> None:
    """Sorts the convolutions beside a global pooling in a sequence of modules, or after a network's."""
    is_sequence = isinstance(block, nn.Sequential)
    pooled = False
    before: list[nn.Module] = []
    after: list[nn.Module] = []
    for name, child in block.named_children():
        if pooled:
            after.append(child)
        elif _holds_layers(child):
            before.append(child)
        pooled |= (is_sequence or name == "global_pool") and _pools_globally(child)
    if not pooled:
        return
    convolutions = [child for child in after if isinstance(child, CONVOLUTION)]
    is_gate = bool(after) and bool(GATE.search(type(after[-1]).__name__))
    (found.classifiers if before and not is_gate else found.attention).update(convolutions)
    # A network without fully connected layers: its last convolution has a channel for each class.
    if is_sequence and before and not any(map(_holds_layers, after)) and _is_pointwise(before[-1]):
        found.classifiers.add(before[-1])


def _is_pointwise(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear | FDLinear):
        return True
    return isinstance(layer, LAYERS) and set(layer.kernel_size) == {1} and layer.groups == 1


def network_names(model: nn.Module, kinds: tuple[type[nn.Module], ...] = LAYERS) -> list[str]:
    """Names of the networks in a model, "" for the model itself: what wrappers hold, and timm's models anywhere.

    Args:
        model: The model.
        kinds: Layers that a network is made of: a wrapper holds all of them in one child.
    """
    names = [name for name, module in model.named_modules() if hasattr(module, "pretrained_cfg")]
    name, module = "", model
    while True:
        children = [(key, child) for key, child in module.named_children() if _holds_layers(child, kinds)]
        if len(children) != 1 or isinstance(children[0][1], kinds):
            return [*names, name]
        key, module = children[0]
        name = f"{name}.{key}" if name else key


def within_network(name: str, networks: Iterable[str]) -> tuple[str, list[str]]:
    """Name of the innermost of the networks that a layer is in, and the parts of the layer's name in it."""
    network = max((n for n in networks if n and name.startswith(f"{n}.")), key=len, default="")
    return network, (name.removeprefix(f"{network}.") if network else name).split(".")


def has_stages(network: nn.Module) -> bool:
    """Whether a network holds blocks, and not only layers: what its first convolution is the stem of."""
    for child in network.children():
        for name, part in child.named_modules():
            if isinstance(part, LAYERS) and "." in name:
                return True
    return False
