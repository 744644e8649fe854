"""ONNX files: written with their constants once, held to the standard, and opened by two runtimes."""

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.onnx_layers import add_layers, as_nodes, kinds_of
from common.onnx_program import export_graph

Run = Callable[[Tensor], list[Tensor]]
# Inputs that ONNX wants to be vectors, by operator; the checker lets numbers pass, ONNX Runtime too.
VECTORS = {"Expand": (1,), "Reshape": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Slice": (1, 2, 3, 4), "Pad": (1,)}


def free_dimensions(batch: bool, size: bool) -> dict[int, Any]:
    """Dimensions of images (B, C, H, W) that an exported file leaves free, as `torch.export` takes them.

    Args:
        batch: Takes any number of images.
        size: Takes images of any height and width.
    """
    return dict.fromkeys([0] * batch + [2, 3] * size, torch.export.Dim.DYNAMIC)


def check_packages(*names: str) -> None:
    """Refuse to write ONNX files where something that it takes is not installed.

    Args:
        *names: Packages that are needed besides.

    Raises:
        ValueError: Says what to install.
    """
    for name in ("onnx", "onnxscript", "onnx_ir", *names):
        try:
            import_module(name)
        except ImportError as error:
            raise ValueError(f"ONNX files need {error.name}: pip install -e '.[onnx]'") from error
    if not hasattr(torch.onnx, "ops"):
        raise ValueError(f"torch {torch.__version__} can't write these ONNX files: pip install 'torch>=2.8'")


def write_onnx(model: nn.Module, x: Tensor, path: Path, free: Mapping[int, Any], opset: int | None = None) -> None:
    """Export a model in eval mode and check that the file is what ONNX allows.

    Args:
        model: The model.
        x: An example of its input.
        path: Of the file, which holds the weights too.
        free: Dimensions of the input that are not those of the example, as `torch.onnx.export` takes them.
        opset: Version of ONNX's operators; None for PyTorch's choice.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError: The file breaks the standard.
    """
    import onnx_ir
    from onnx_ir.passes.common import (
        ClearMetadataAndDocStringPass,
        CommonSubexpressionEliminationPass,
        DeduplicateHashedInitializersPass,
        LiftConstantsToInitializersPass,
    )

    export = partial(export_graph, opset=opset)
    kinds = kinds_of(model, x, free)
    with as_nodes([(model.get_submodule(name), kind) for name, kind in kinds.items()]):
        graph = export(model, (x,), (dict(free),))
    graph.graph.inputs[0].name = "input"
    add_layers(graph, list(dict.fromkeys(kinds.values())), x.dtype, free, export)
    # Layers of one size have the same tables and matrices, and compute the same from the image's size. Nodes carry the
    # lines of code that they are from, with the paths of this machine.
    for improve in (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateHashedInitializersPass(),
        CommonSubexpressionEliminationPass(),
        ClearMetadataAndDocStringPass(),
    ):
        improve(graph)
    onnx_ir.save(graph, path)
    check_onnx(path)


def check_onnx(path: Path) -> None:
    """Hold a file to ONNX's standard: its checker with full inference of shapes, and what that lets pass.

    Raises:
        onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError: Names the node.
    """
    import onnx

    onnx.checker.check_model(path, full_check=True)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True).graph
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)}
    ranks |= {constant.name: len(constant.dims) for constant in graph.initializer}
    for node in graph.node:
        for place in VECTORS.get(node.op_type, ()):
            name = node.input[place] if place < len(node.input) else ""
            if ranks.get(name, 1) != 1:
                raise ValueError(f"{node.op_type} {node.name} takes {name} of {ranks[name]} dimensions, not a vector")


def open_onnxruntime(path: Path, threads: int = 0) -> Run:
    """The file as a function, computed by ONNX Runtime on the CPU; 0 threads are its choice."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns of every constant that it folds; its errors are raised
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(output) for output in session.run(None, {"input": x.numpy()})]


def open_openvino(path: Path, threads: int = 0) -> Run:
    """The file as a function, computed by OpenVINO on the CPU in the file's own precision; 0 threads are its choice."""
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    # Its generated kernels compute the attention of windows of four tokens wrong (2026.4.1), a static Swin's too.
    settings["SNIPPETS_MODE"] = "DISABLE"
    if threads:
        settings["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    return lambda x: [torch.from_numpy(output) for output in compiled(x.numpy(), share_inputs=False).values()]
