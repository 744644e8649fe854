"""Modules to ONNX graphs, without PyTorch's second trace where none is needed.

`torch.onnx.export` captures a module and then traces what it captured once more, operation by operation, to decompose
what has no translation and what works in place: half of its time, spent on sizes that are not known. Of the operations
in FDConv's layers and in most convolutional networks only a few have none; they are written as others that have one,
and those in place as those that are not, where no one else sees what they change. Then nothing is left to decompose. A
module with other operations goes the whole way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

aten = torch.ops.aten

# The same values in a tensor of its own; of one dtype, if their inputs are.
IN_PLACE = {
    aten.add_.Tensor: aten.add.Tensor,
    aten.hardsigmoid_.default: aten.hardsigmoid.default,
    aten.hardswish_.default: aten.hardswish.default,
    aten.hardtanh_.default: aten.hardtanh.default,
    aten.leaky_relu_.default: aten.leaky_relu.default,
    aten.mul_.Tensor: aten.mul.Tensor,
    aten.relu_.default: aten.relu.default,
    aten.sigmoid_.default: aten.sigmoid.default,
    aten.silu_.default: aten.silu.default,
}
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout}
# PyTorch's own, about what it captured.
REMARKS = {aten._assert_tensor_metadata.default, aten.promote_types.default}


def export_graph(module: nn.Module, inputs: tuple[Any, ...], sizes: tuple[Any, ...], opset: int | None) -> Any:
    """A module as `onnx_ir.Model`.

    Args:
        module: In eval mode.
        inputs: Examples.
        sizes: The dimensions of each that are free, as `torch.export` takes them.
        opset: Version of ONNX's operators; None for PyTorch's choice.
    """
    program = captured(module, inputs, sizes)
    if rewrite(program.graph):
        try:
            with mock.patch.object(program, "run_decompositions", return_value=program):
                return translated(program, opset)
        except torch.onnx.OnnxExporterError:  # an operation without a translation; the program is half changed
            program = captured(module, inputs, sizes)
    return translated(program, opset)


def captured(module: nn.Module, inputs: tuple[Any, ...], sizes: tuple[Any, ...]) -> ExportedProgram:
    """A module as PyTorch captures it."""
    with (
        # As torch.onnx.export has it while it captures itself: layers choose by this.
        mock.patch.object(torch.onnx, "is_in_onnx_export", return_value=True),
        mock.patch.object(F, "batch_norm", batch_norm),
        tracing_options(),
    ):
        return torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False)


def translated(program: ExportedProgram, opset: int | None) -> Any:
    """A captured program as `onnx_ir.Model`."""
    with tracing_options():
        # Runtimes optimise the graph when they load it; PyTorch's optimiser takes time quadratic in its size.
        return torch.onnx.export(program, opset_version=opset, verbose=False, optimize=False).model


@contextmanager
def tracing_options() -> Iterator[None]:
    """PyTorch's settings while it traces."""
    with (
        # A free size that is 1 in the example stays free.
        torch.fx.experimental._config.patch(backed_size_oblivious=True),
        # Fake tensors with free sizes are hardly ever met twice, and looking them up takes longer than making them.
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
    ):
        yield


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm` as ONNX's operator, where that is the same."""
    tensors = input, weight, bias, running_mean, running_var
    if training or any(tensor is None or tensor.dtype != input.dtype for tensor in tensors):
        return torch.batch_norm(
            input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled=False
        )
    return torch.onnx.ops.symbolic(
        "BatchNormalization", tensors, {"epsilon": eps}, dtype=input.dtype, shape=input.shape
    )


def rewrite(graph: fx.Graph) -> bool:
    """Writes operations of a captured graph that have no translation, or work in place, as others of the same values.

    Returns:
        Whether it did, and left none in place. Otherwise the graph is as it was: no copy may be left out where a tensor
        changes later.
    """
    if not all(map(is_unseen, filter(is_in_place, graph.nodes))):
        return False
    for node in graph.nodes:
        if node.target in REMARKS and not node.users:
            graph.erase_node(node)
        elif node.target in CASTS and node.meta["val"].dtype != node.args[0].meta["val"].dtype:
            node.target, node.kwargs = aten._to_copy.default, {"dtype": node.meta["val"].dtype}
            node.args = node.args[:1]
        elif node.target in CASTS or node.target == aten.detach_.default:
            drop(node)
        elif node.target == aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = aten.mean.dim, (node.args[0], [-2, -1], True)
        elif node.target in IN_PLACE:
            node.target = IN_PLACE[node.target]
    return True


def is_in_place(node: fx.Node) -> bool:
    """Whether an operation changes a tensor that it is given; detaching one does not."""
    is_operator = isinstance(node.target, torch._ops.OpOverload)
    return is_operator and node.target._schema.is_mutable and node.target != aten.detach_.default


def is_unseen(node: fx.Node) -> bool:
    """Whether an operation in place may as well make a tensor of its own.

    It may where what it changes was made by an operation that shares no memory, for this one alone, and where all
    inputs have one dtype: in place a result keeps its dtype, whatever is added.
    """
    changed = node.args[0]
    if node.target not in IN_PLACE or list(changed.users) != [node]:
        return False
    # A list, as schemas do not tell: a dropout's promises a new tensor, and in eval mode it is its input.
    new = {aten.conv2d.default, torch.ops.onnx_symbolic._symbolic.default, *IN_PLACE, *IN_PLACE.values()}
    dtypes = {value.dtype for value in (n.meta.get("val") for n in node.all_input_nodes) if isinstance(value, Tensor)}
    return changed.target in new and len(dtypes) == 1


def drop(node: fx.Node) -> None:
    """Takes a node that does nothing out, but for an output, which is looked up by its name."""
    if any(user.op == "output" for user in node.users):
        node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}
    else:
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)
