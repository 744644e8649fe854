"""What a pass would launch and move on a GPU, counted without one: kernels, and bytes read and written.

Tensors are fake CUDA tensors, or CPU tensors where Triton is interpreted, since autograd has no fake GPU: shapes are
real, numbers are not. Each operation that is no view counts as a kernel that reads its inputs and writes its outputs
once; FDConv's operators count as the kernels that they launch. Bytes over a card's memory bandwidth are the least time
of a pass that is bound by memory, as most of a network's are.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarking.models import Pair
from common.tables import markdown_table
from common.traffic import Counting, Traffic
from fdconv_zoo.layers.fdw import FDW
from fdconv_zoo.layers.ops import triton


def count_traffic(
    model: nn.Module,
    input_size: tuple[int, ...],
    batch_size: int,
    dtype: torch.dtype,
    keep_banks: bool,
    train: bool = False,
) -> Traffic:
    """Counts the second pass of a model, so that what is made once and kept is not counted.

    Args:
        model: It is left on fake tensors.
        input_size: Of one image.
        batch_size: Images.
        dtype: Of parameters and images.
        keep_banks: Keep the banks of FDConv's layers between the passes.
        train: Count a pass in training and its gradients instead of a pass in eval; without the optimiser's update.
    """
    model = model.train(train).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.set_grad_enabled(train):

        def fake(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=triton.DEVICE)

        def run() -> None:
            model.zero_grad()
            output = model(images)
            if train:
                output.sum().backward()

        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(fake(parameter))
            module._buffers.update({name: fake(b) for name, b in module._buffers.items() if b is not None})
            if isinstance(module, FDW) and keep_banks:
                module.keep_bank(dtype)
        images = torch.empty(batch_size, *input_size, device=triton.DEVICE, dtype=dtype)
        run()
        with Counting("cuda") as counting:
            run()
    return counting.traffic


# Ways of a GPU: banks kept between passes, banks or transforms in each pass, PyTorch's operations alone.
WAYS = {"banks kept": True, "nothing kept": False, "not fused": False}


def traffic_table(
    pairs: Iterable[Pair], batch_size: int, dtype: torch.dtype, train: bool
) -> tuple[list[dict[str, Any]], str]:
    """Counts pairs of models, each way.

    Args:
        pairs: FDConv models and their static twins; they are left on fake tensors.
        batch_size: Images.
        dtype: Of parameters and images.
        train: Count passes in training, where no bank is kept.

    Returns:
        A row for each model and way, and a table in Markdown.
    """
    rows: list[dict[str, Any]] = []
    for pair in pairs:
        static = count_traffic(pair.static, pair.input_size, batch_size, dtype, False, train)
        for way, keep_banks in WAYS.items():
            if train and keep_banks:
                continue
            model = copy.deepcopy(pair.fdconv)
            for module in model.modules():
                if hasattr(module, "fused"):
                    module.fused = way != "not fused"
            found = count_traffic(model, pair.input_size, batch_size, dtype, keep_banks, train)
            rows.append(
                {
                    "model": pair.name,
                    "mode": "train" if train else "eval",
                    "way": way,
                    "kernels": found.kernels.total(),
                    "megabytes_a_sample": found.bytes.total() / 1e6 / batch_size,
                    "static_kernels": static.kernels.total(),
                    "static_megabytes_a_sample": static.bytes.total() / 1e6 / batch_size,
                    "ratio": found.bytes.total() / static.bytes.total(),
                    "kernels_by_operation": dict(found.kernels.most_common()),
                    "megabytes_a_sample_by_operation": {
                        name: number / 1e6 / batch_size for name, number in found.bytes.most_common()
                    },
                }
            )
    header = ["model", "way", "kernels", "MB a sample", "static kernels", "MB a sample", "ratio"]
    lines = (
        [
            row["model"],
            row["way"],
            f"{row['kernels']:,}",
            f"{row['megabytes_a_sample']:.0f}",
            f"{row['static_kernels']:,}",
            f"{row['static_megabytes_a_sample']:.0f}",
            f"{row['ratio']:.2f}",
        ]
        for row in rows
    )
    return rows, markdown_table(header, lines)
