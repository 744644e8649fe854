"""What runs a model in deployment, beside eager PyTorch: a pass of each, for the clock."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from common.models import takes_other_sizes
from common.onnx_file import free_dimensions, open_onnxruntime, open_openvino, write_onnx

# A difference relative to the largest output that no order of operations makes.
TOLERANCE = 1e-3
ENGINES = ("eager", "compile", "aotinductor", "onnxruntime", "openvino")


@torch.no_grad()
def deploy(model: nn.Module, images: Tensor, threads: int, engines: list[str]) -> dict[str, Callable[[], object]]:
    """Passes of a model in eval mode over the images, by engine.

    Files are made for any batch and image size, as `export.py` makes them; AOTInductor's for this one, as
    `torch.compile` does.

    Raises:
        RuntimeError: An engine computes something else than the model.
    """
    runs: dict[str, Callable[[Tensor], object]] = {}
    example = images if len(images) > 1 else images.expand(2, -1, -1, -1)  # a batch of one would be a fixed one
    with tempfile.TemporaryDirectory() as folder:
        if "aotinductor" in engines:
            program = torch.export.export(model, (images,))
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/model.pt2")
            runs["aotinductor"] = torch.no_grad()(torch._inductor.aoti_load_package(package))
        if {"onnxruntime", "openvino"} & set(engines):
            file = Path(folder) / "model.onnx"
            write_onnx(model, example, file, free_dimensions(batch=True, size=takes_other_sizes(model, images)))
            for name, load in (("onnxruntime", open_onnxruntime), ("openvino", open_openvino)):
                if name in engines:
                    runs[name] = load(file, threads)
    expected = model(images)
    for name, run in runs.items():
        output = run(images)
        output = output if isinstance(output, Tensor) else output[0]
        difference = ((output - expected).abs().max() / expected.abs().max()).item()
        if not difference <= TOLERANCE:
            raise RuntimeError(f"{name} differs from the model by {difference:.1e} of the largest output")
    return {name: partial(run, images) for name, run in runs.items()}
