"""FDConv layers of one kind go through PyTorch's exporter to ONNX once.

A layer's weight takes some hundred operations on sizes that are not known, and the exporter goes through each of them
several times; a ResNet-50 has 48 layers of 19 kinds. So the model is exported with a node for each layer, one layer of
each kind beside it, and the nodes are replaced by what their kind came out as: the file has ONNX's own operators alone.
FBM takes about as many as the rest of its layer and is the same for any channels, so it is a node within the layers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.layers.fbm import FBM
from fdconv_zoo.layers.ksm import is_hooked

if TYPE_CHECKING:
    import onnx_ir as ir

Layer = FDConv2d | FDLinear | FBM

DOMAIN = "fdconv_zoo.layers"
# What every module has: tensors, parts and hooks, which are looked at by themselves, and the mode, which is eval.
USUAL = vars(nn.Module()).keys()
# Kinds that go through the exporter side by side: a pass has a cost of its own, and one that rises with its free sizes.
TOGETHER = 10
# Of a module with inputs and their free dimensions.
Export = Callable[[nn.Module, tuple[Any, ...], tuple[Any, ...]], "ir.Model"]


class Kind(NamedTuple):
    """Layers, or FBMs of layers, that are one function of input, parameters and buffers.

    Attributes:
        name: Of its node.
        layer: One of them.
        shape: Of an input of that one.
    """

    name: str
    layer: Layer
    shape: tuple[int, ...]


class AsFunctions(nn.Module):
    """One layer of each kind as a function of its input and its parameters and buffers, side by side."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        super().__init__()
        self.kinds = tuple(kinds)  # hidden: no parameter of theirs is part of the export

    def forward(self, inputs: list[Tensor], states: list[list[Tensor]]) -> list[Tensor]:
        """An output for each kind."""
        outputs = []
        for kind, x, state in zip(self.kinds, inputs, states, strict=True):
            named = dict(zip(state_of(kind.layer), state, strict=True))
            outputs.append(torch.func.functional_call(kind.layer, named, (x,)))
        return outputs


def state_of(layer: nn.Module, recurse: bool = True) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(layer.named_parameters(recurse=recurse)) | dict(layer.named_buffers(recurse=recurse))


def output_shape(layer: Layer, x: Tensor) -> tuple[Any, ...]:
    """Shape of a layer's output, in sizes that may be symbols."""
    if isinstance(layer, FBM):
        return tuple(x.shape)
    if isinstance(layer, FDLinear):
        return *x.shape[:-1], layer.out_features
    return x.shape[0], layer.out_channels, *layer._geometry().output_size(x.shape[2], x.shape[3])


def as_node(layer: Layer, name: str, x: Tensor) -> Tensor:
    """A layer as one node of the graph that is exported."""
    tensors = (x, *state_of(layer).values())
    shape = output_shape(layer, x)
    return torch.onnx.ops.symbolic(f"{DOMAIN}::{name}", tensors, dtype=x.dtype, shape=shape, version=1)


def kinds_of(model: nn.Module, x: Tensor, free: Mapping[int, Any]) -> dict[str, Kind]:
    """The kind of each layer of a model that the images reach, by the layer's name.

    A layer that someone hooked, or that maps of several sizes reach which are not free, has none: the exporter takes it
    as it stands.

    Args:
        model: The model.
        x: Images.
        free: Dimensions of the images that are free.
    """
    layers = {
        name: layer
        for name, layer in named_fd_layers(model)
        if type(layer) in (FDConv2d, FDLinear) and not is_hooked(*layer.modules())
    }
    if not layers:
        return {}
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, name=name: shapes[name].append(tuple(args[0].shape)))
        for name, layer in layers.items()
    ]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    kinds = grouped({layer: shapes[name] for name, layer in layers.items()}, free, "Layer")
    return {name: kinds[layer] for name, layer in layers.items() if layer in kinds}


def fbm_kinds(kinds: Iterable[Kind], free: Mapping[int, Any]) -> list[tuple[nn.Module, Kind]]:
    """The kind of each FBM of layers, likewise.

    Args:
        kinds: Those of the layers.
        free: Dimensions of the images that are free.
    """
    shapes: dict[Layer, list[tuple[int, ...]]] = {}
    for kind in kinds:
        if type(kind.layer.fbm) is FBM:
            shapes.setdefault(kind.layer.fbm, []).append(kind.shape)
    return list(grouped(shapes, free, "FBM").items())


def grouped(
    shapes: Mapping[Layer, Sequence[tuple[int, ...]]], free: Mapping[int, Any], name: str
) -> dict[nn.Module, Kind]:
    """Kinds of layers; one that inputs of several sizes reach which are not free has none.

    Args:
        shapes: Of each layer's inputs.
        free: Dimensions of the images that are free.
        name: What names of the nodes begin with.
    """
    found: dict[Any, Kind] = {}
    kinds: dict[nn.Module, Kind] = {}
    for layer, seen in shapes.items():
        sizes = {fixed(shape, free_sizes(layer, len(shape), free)) for shape in seen}
        if len(sizes) == 1:
            kind = Kind(f"{name}{len(found)}", layer, seen[0])
            kinds[layer] = found.setdefault((*sizes, facts(layer)), kind)
    return kinds


def fixed(shape: Sequence[int], free: Mapping[int, Any]) -> tuple[int | None, ...]:
    """A shape with None for each dimension that is free."""
    return tuple(None if i in free else n for i, n in enumerate(shape))


def facts(layer: nn.Module) -> str:
    """Everything that decides which function of its tensors a layer is."""
    told = []
    for name, module in layer.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in USUAL}
        state = state_of(module, recurse=False)
        tensors = [(key, fixed(t.shape, free_channels(module, t)), t.dtype) for key, t in state.items()]
        told.append((name, type(module), own, tensors))
    return repr(told)


def free_sizes(layer: nn.Module, dimensions: int, free: Mapping[int, Any]) -> dict[int, Any]:
    """Dimensions of a layer's input that are free, given those of the images."""
    channels = dimensions - 1 if isinstance(layer, FDLinear) else 1
    sizes = [i for i in range(1, dimensions) if i != channels]
    places = [0] * (0 in free) + [channels] * isinstance(layer, FBM) + sizes * (2 in free)
    return dict.fromkeys(places, torch.export.Dim.AUTO)


def free_channels(layer: nn.Module, tensor: Tensor) -> dict[int, Any]:
    """Dimensions of a layer's parameter that are free: the channels of an FBM's filters."""
    return {1: torch.export.Dim.AUTO} if isinstance(layer, FBM) and tensor.dim() > 1 else {}


@contextmanager
def as_nodes(layers: Sequence[tuple[nn.Module, Kind]]) -> Iterator[None]:
    """Layers are nodes while a model is exported."""
    for layer, kind in layers:
        layer.forward = partial(as_node, layer, kind.name)
    try:
        yield
    finally:
        for layer, _ in layers:
            del layer.forward


def add_layers(
    model: "ir.Model", kinds: Sequence[Kind], dtype: torch.dtype, free: Mapping[int, Any], export: Export
) -> None:
    """Puts the operations of each kind in place of its nodes.

    Args:
        model: Exported, with a node for each layer.
        kinds: Of all nodes.
        dtype: Of the images.
        free: Dimensions of the images that are free.
        export: Exports a module.
    """
    from onnx_ir.passes.common import InlinePass

    inner = fbm_kinds(kinds, free)
    with as_nodes(inner):
        for i in range(0, len(kinds), TOGETHER):
            add_functions(model, kinds[i : i + TOGETHER], dtype, free, export)
    add_functions(model, list(dict.fromkeys(kind for _, kind in inner)), dtype, free, export)
    InlinePass()(model)


def add_functions(
    model: "ir.Model", kinds: Sequence[Kind], dtype: torch.dtype, free: Mapping[int, Any], export: Export
) -> None:
    """Adds a function for each kind; arguments as above."""
    import onnx_ir as ir

    if not kinds:
        return
    states = [list(state_of(kind.layer).values()) for kind in kinds]
    sizes = (
        [free_sizes(kind.layer, len(kind.shape), free) for kind in kinds],
        [[free_channels(kind.layer, t) for t in state] for kind, state in zip(kinds, states, strict=True)],
    )
    inputs = [torch.zeros(kind.shape, dtype=dtype) for kind in kinds]
    graph = export(AsFunctions(kinds).eval(), (inputs, states), sizes).graph
    places = iter(graph.inputs[len(kinds) :])
    for kind, x, state, output in zip(kinds, graph.inputs, states, graph.outputs, strict=False):
        body = ir.convenience.extract(graph, [x, *islice(places, len(state))], [output])
        # A function has no initialisers, and names of sizes are those of the kinds, not of the model.
        constants = [
            ir.node("Constant", [], {"value": value.const_value}, outputs=[value], name=f"constant_{name}")
            for name, value in body.initializers.items()
        ]
        body.initializers.clear()
        body.insert_before(body[0], constants)
        for node in body:
            for value in node.outputs:
                value.shape = None
        function = ir.Function(DOMAIN, kind.name, graph=body, attributes=[])
        model.functions[function.identifier()] = function
