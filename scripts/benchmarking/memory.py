"""Memory of a model: what a forward pass keeps for the backward pass, and the peak while something runs."""

import ctypes
import gc
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

RESET_PEAK = Path("/proc/self/clear_refs")  # Linux: writing 5 sets VmHWM back to VmRSS
STATUS = Path("/proc/self/status")


class Peak(NamedTuple):
    """Peak of memory while something ran, in bytes.

    Attributes:
        growth: Above what was in use before: activations, gradients and working memory, without the loaded models.
        total: Of the process (resident), or of all tensors on a GPU; everything that is loaded counts.
    """

    growth: int
    total: int


def saved_for_backward(model: nn.Module, input: Tensor) -> int:
    """Return the bytes that autograd keeps between a forward pass and its backward pass.

    Every storage counts once and whole, however many views of it are saved. The model's parameters and buffers do not
    count, the input does where it is saved. The model runs in the mode it is in: its BatchNorm statistics move.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in chain(model.parameters(), model.buffers())}
    # Storages, not addresses: while they are held, no other tensor can get the same address.
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input)
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def measure_peak(run: Callable[[], None], device: torch.device) -> Peak | None:
    """Run something once and return the peak of its memory; None where the system does not tell (Linux does)."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        total = torch.cuda.max_memory_allocated(device)
        return Peak(total - before, total)
    try:
        # Freed memory that the C library holds back would be used again and not show as growth.
        ctypes.CDLL(None).malloc_trim(0)
        RESET_PEAK.write_text("5")
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):  # no such file, a sandbox that forbids it, or another C library
        run()
        return None
    run()
    total = _status_bytes("VmHWM")
    return Peak(total - before, total)
