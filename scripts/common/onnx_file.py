"""ONNX files: written with their constants once, held to the standard, and opened by two runtimes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    from onnx_ir.passes.common import (
        ClearMetadataAndDocStringPass,
        CommonSubexpressionEliminationPass,
        DeduplicateHashedInitializersPass,
        LiftConstantsToInitializersPass,
    )

    program = torch.onnx.export(
        model, (x,), dynamo=True, dynamic_shapes=(dict(free),), input_names=["input"], opset_version=opset,
        verbose=False,
        # Runtimes optimise the graph when they load it; PyTorch's optimiser takes time quadratic in its size.
        optimize=False,
    )  # fmt: skip
    # Layers of one size have the same tables and matrices, and compute the same from the image's size. Nodes carry the
    # lines of code that they are from, with the paths of this machine.
    for improve in (
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        DeduplicateHashedInitializersPass(),
        CommonSubexpressionEliminationPass(),
        ClearMetadataAndDocStringPass(),
    ):
        improve(program.model)
    program.save(path, external_data=False)
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
    options.log_severity_level = 3  # errors; it warns of every constant that it folds
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
