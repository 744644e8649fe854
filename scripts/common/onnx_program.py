"""Modules to ONNX graphs, without PyTorch's second trace where none is needed.

`torch.onnx.export` captures a module and then traces what it captured once more, operation by operation, to decompose
what has no translation: half of its time, spent on sizes that are not known. Of the operations in FDConv's layers and
in most convolutional networks only a few have none; they are written as others that have one, which leaves nothing to
decompose. A module with more of them goes the whole way.
"""

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

aten = torch.ops.aten

# Their results share no memory with their inputs. A schema does not tell: in eval mode a dropout's do, against its own.
NEW = {aten.add.Tensor, aten.conv2d.default, aten.hardtanh.default, aten.relu.default, aten.silu.default}
CASTS = {aten.to.dtype, aten.to.device, aten.to.dtype_layout}
# Torch's own notes on what it captured.
NOTES = {aten._assert_tensor_metadata.default, aten.promote_types.default}


def export_graph(module: nn.Module, inputs: tuple[Any, ...], sizes: tuple[Any, ...], opset: int | None) -> Any:
    """A module as `onnx_ir.Model`.

    Args:
        module: In eval mode.
        inputs: Examples.
        sizes: The dimensions of each that are free, as `torch.export` takes them.
        opset: Version of ONNX's operators; None for PyTorch's choice.
    """
    with (
        # As torch.onnx.export has it while it captures itself: layers choose by this.
        mock.patch.object(torch.onnx, "is_in_onnx_export", return_value=True),
        # A free size that is 1 in the example stays free.
        torch.fx.experimental._config.patch(backed_size_oblivious=True),
        # Fake tensors with free sizes are hardly ever met twice, and looking them up takes longer than making them.
        torch._dynamo.config.patch(fake_tensor_cache_enabled=False),
        mock.patch.object(F, "batch_norm", batch_norm),
    ):
        program = torch.export.export(module, inputs, dynamic_shapes=sizes, strict=False)
        rewrite(program.graph)
        if not any(changes_its_input(node) for node in program.graph.nodes):
            try:
                with mock.patch.object(program, "run_decompositions", return_value=program):
                    return translated(program, opset)
            except torch.onnx.OnnxExporterError:  # an operation that has to be decomposed
                pass
        return translated(program, opset)


def translated(program: ExportedProgram, opset: int | None) -> Any:
    """A captured program as `onnx_ir.Model`."""
    # Runtimes optimise the graph when they load it; PyTorch's optimiser takes time quadratic in its size.
    return torch.onnx.export(program, opset_version=opset, verbose=False, optimize=False).model


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


def rewrite(graph: fx.Graph) -> None:
    """Writes operations of a captured graph that have no translation as others of the same values that have one."""
    for node in graph.nodes:
        if node.target in NOTES and not node.users:
            graph.erase_node(node)
        elif node.target in CASTS and node.meta["val"].dtype != node.args[0].meta["val"].dtype:
            node.target, node.kwargs = aten._to_copy.default, {"dtype": node.meta["val"].dtype}
            node.args = node.args[:1]
        elif node.target in CASTS or node.target == aten.detach_.default:
            drop(node)
        elif node.target == aten.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:
            node.target, node.args = aten.mean.dim, (node.args[0], [2, 3], True)
        elif changes_its_input(node):
            change_a_copy(node)


def drop(node: fx.Node) -> None:
    """Takes a node that does nothing out, but for an output, which is looked up by its name."""
    if any(user.op == "output" for user in node.users):
        node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}
    else:
        node.replace_all_uses_with(node.args[0])
        node.graph.erase_node(node)


def changes_its_input(node: fx.Node) -> bool:
    """Whether an operation works in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def change_a_copy(node: fx.Node) -> None:
    """An operation in place as the one that is not, where nobody else sees the tensor that it changes."""
    changed = node.args[0]
    if changed.target not in NEW and changed.target != torch.ops.onnx_symbolic._symbolic.default:
        return
    name, _, overload = node.target.__name__.partition(".")
    operator = getattr(aten, name.removesuffix("_"), None)
    # In place a result keeps its dtype, whatever is added.
    dtypes = {value.dtype for value in (n.meta.get("val") for n in node.all_input_nodes) if isinstance(value, Tensor)}
    if list(changed.users) == [node] and len(dtypes) == 1 and operator and overload in operator.overloads():
        node.target = getattr(operator, overload)
