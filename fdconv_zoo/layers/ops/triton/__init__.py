"""The operators on a GPU: Triton kernels, and the few products and transforms between them.

Nothing here is imported before an operator is called on a GPU: importing Triton takes a third of a second.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor

# With TRITON_INTERPRET=1 Triton computes on CPUs, slowly: how the kernels are tested without a GPU.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
# Tuples as arguments, and what else the kernels take of its language.
LEAST_TRITON = (3, 6)
# Distributions that bring it: Linux's own, Windows', those of PyTorch's nightlies.
DISTRIBUTIONS = ("triton", "triton-windows", "pytorch-triton", "pytorch-triton-xpu")
# Height and width up to which a map fits the registers of a program that gates its bands; in float32 larger ones spill.
LARGEST_SIDE = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
# Of a device's memory, what one bank may take: a choice by what is free would differ between a pass and its repetition
# (activation checkpointing, CUDA graphs, the ranks of a run).
BANK_SHARE = 1 / 64
# Of its free memory, what one bank that is kept between passes may take.
KEPT_SHARE = 1 / 8


def is_installed() -> bool:
    """Whether Triton is there and new enough, and PyTorch not built for AMD, where nobody tried the kernels."""
    if find_spec("triton") is None or torch.version.hip is not None:
        return False
    for name in DISTRIBUTIONS:
        try:
            return tuple(int(part) for part in version(name).split(".")[:2]) >= LEAST_TRITON
        except PackageNotFoundError:
            continue
    return False


IS_INSTALLED = is_installed()


@torch.compiler.assume_constant_result
def is_capable(device: torch.device) -> bool:
    """Whether Triton compiles for a device: compute capability 8.0, the A100's, or more."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability(device) >= (8, 0)


def computes(device: torch.device, dtype: torch.dtype, exact_dtype: torch.dtype) -> bool:
    """Whether the kernels compute for inputs of a dtype on a device, given the dtype of gates and transforms."""
    half_or_single = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if device.type != DEVICE or not half_or_single or exact_dtype != torch.float32:
        return False
    return IS_INSTALLED and (IS_INTERPRETED or is_capable(device))


def is_supported(x: Tensor, exact_dtype: torch.dtype) -> bool:
    """:func:`computes` for an input."""
    return computes(x.device, x.dtype, exact_dtype)


def filters(x: Tensor, mask_grid: int | None) -> bool:
    """Whether the kernels gate the bands of a map: by the paper's masks, where the map fits a program."""
    return mask_grid is None and is_supported(x, torch.float32) and max(x.shape[2:]) <= LARGEST_SIDE[x.dtype]


@torch.compiler.assume_constant_result
def total_memory(device: torch.device) -> int:
    """Bytes of a device's memory."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 1 << 62
    return torch.cuda.get_device_properties(device).total_memory


def bank_fits(elements: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a bank of so many elements takes at most `BANK_SHARE` of the device's memory."""
    return elements * dtype.itemsize <= BANK_SHARE * total_memory(device)


def can_keep(size: int, device: torch.device) -> bool:
    """Whether a kept bank of so many bytes takes at most `KEPT_SHARE` of a device's free memory."""
    return size <= KEPT_SHARE * free_memory(device)


def free_memory(device: torch.device) -> int:
    """Bytes that a device could still give, those in PyTorch's cache among them."""
    if device.type != "cuda":
        return 1 << 62
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
