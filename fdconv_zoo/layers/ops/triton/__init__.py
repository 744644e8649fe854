"""The operators on a GPU: Triton kernels, and the few products and transforms between them.

Nothing here is imported before an operator is called on a GPU: importing Triton takes a third of a second.
"""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

# With TRITON_INTERPRET=1 Triton computes on CPUs, slowly: how the kernels are tested without a GPU.
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"
IS_INSTALLED = find_spec("triton") is not None
# Height and width up to which a map fits the registers of a program that gates its bands; in float32 larger ones spill.
LARGEST_SIDE = {torch.bfloat16: 64, torch.float16: 64, torch.float32: 32}
# Of a device's free memory, what one bank may take.
BANK_SHARE = 1 / 8


def is_supported(x: Tensor, exact_dtype: torch.dtype) -> bool:
    """Whether the kernels compute for an input, given the dtype of gates and transforms."""
    half_or_single = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return IS_INSTALLED and x.device.type == DEVICE and half_or_single and exact_dtype == torch.float32


def filters(x: Tensor, mask_grid: int | None) -> bool:
    """Whether the kernels gate the bands of a map: by the paper's masks, where the map fits a program."""
    return mask_grid is None and is_supported(x, torch.float32) and max(x.shape[2:]) <= LARGEST_SIDE[x.dtype]


@torch.compiler.assume_constant_result
def free_memory(device: torch.device) -> int:
    """Bytes that a device could still give, those in PyTorch's cache among them; what is compiled takes it as fixed.

    Without bounds while a CUDA graph is captured, when the device may not be asked: what fitted before it fits again.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or torch.cuda.is_current_stream_capturing():
        return 1 << 62
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def bank_fits(elements: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a bank of so many elements takes at most `BANK_SHARE` of the device's free memory."""
    return elements * dtype.itemsize <= BANK_SHARE * free_memory(device)
