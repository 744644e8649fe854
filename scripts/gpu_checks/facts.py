"""What the device is, and what it does at most: the figures that all others are held against."""

import importlib
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from shutil import which

import torch

from gpu_checks.clock import median_seconds
from gpu_checks.setup import Row, Setup, dtype_name


def run(setup: Setup) -> Iterator[Row]:
    """Device and versions, the rate of a copy, the rates of matrix products."""
    yield setup.attempt("device", lambda: device_facts(setup))
    yield setup.attempt("versions", versions)
    yield setup.attempt("copy", lambda: copy_rate(setup))
    for dtype in (torch.bfloat16, torch.float32):
        yield setup.attempt(f"product {dtype_name(dtype)}", lambda dtype=dtype: product_rate(setup, dtype))


def versions() -> Row:
    """Versions of the packages that the figures depend on, of those that are there."""
    names = [name for name in ("torch", "triton", "timm", "torchvision", "numpy") if find_spec(name)]
    found = {name: importlib.import_module(name).__version__ for name in names}
    return {"python": platform.python_version(), **found, "cuda": torch.version.cuda, "cores": os.cpu_count()}


def device_facts(setup: Setup) -> Row:
    """Name, memory, multiprocessors, driver."""
    if not setup.on_gpu:
        return {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(setup.device)
    free, total = torch.cuda.mem_get_info(setup.device)
    row = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "cudnn": torch.backends.cudnn.version(),
    }
    if which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
        row["driver, clock, power"] = done.stdout.strip()
    return {**row, "summary": f"{properties.name}, {total / 2**30:.0f} GiB"}


def copy_rate(setup: Setup) -> Row:
    """Bytes read and written a second by a copy within the device."""
    source = torch.ones(1 << (20 if setup.small else 30), dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / median_seconds(lambda: target.copy_(source), setup)
    return {"bytes_per_second": rate, "summary": f"{rate / 1e12:.3g} TB/s"}


def product_rate(setup: Setup, dtype: torch.dtype) -> Row:
    """Operations a second of a product of square matrices; float32 as PyTorch is set up."""
    size = 64 if setup.small else 8192
    a, b = (setup.randn(size, size, dtype=dtype) for _ in range(2))
    rate = 2 * size**3 / median_seconds(lambda: a @ b, setup)
    precision = torch.get_float32_matmul_precision()
    return {"flops_per_second": rate, "float32_precision": precision, "summary": f"{rate / 1e12:.3g} TFLOP/s"}
