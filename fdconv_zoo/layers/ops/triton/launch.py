"""What all kernels share: sizes of their blocks, precision of their products, and their names as operators.

Each kernel is an operator of its own, called by the operators of the layers: fake tensors pass through without a GPU,
and what a kernel reads and writes can be counted from its arguments.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def next_block(count: int, least: int, most: int) -> int:
    """The power of two from `least` to `most` that a count fits in best."""
    return max(least, min(most, 1 << max(count - 1, 0).bit_length()))


def blocks_of(count: int, block: int) -> int:
    """Blocks that hold a count. Triton's own function is one for kernels too, and slow: a launch waits for Python."""
    return -(-count // block)


def strides(name: str, maps: Tensor) -> dict[str, int]:
    """Strides of maps (B, C, H, W) by the kernels' names for them."""
    batch, channel, row, column = maps.stride()
    return {f"{name}_batch": batch, f"{name}_channel": channel, f"{name}_row": row, f"{name}_column": column}


def precision_of(dtype: torch.dtype) -> str:
    """Precision of products: float32 is exact, but where torch.set_float32_matmul_precision and others allow TF32."""
    if dtype != torch.float32:
        return "tf32"
    matmul = torch.backends.cuda.matmul
    # The older function raises once the newer setting was used.
    if hasattr(matmul, "fp32_precision"):
        chosen = matmul.fp32_precision
        return "tf32" if (torch.backends.fp32_precision if chosen == "none" else chosen) == "tf32" else "ieee"
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def kernel(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that makes a launcher an operator, `fdconv_zoo::<its name>`.

    Args:
        schema: Arguments and results, as torch.library.define takes them.
        fake: Makes empty tensors in the shapes of the results.
    """

    def register(launcher: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(launcher)
        def on_its_device(first: Tensor, *others: Any) -> Any:
            # Triton launches on the current device, whatever the tensors' is.
            with torch.cuda.device_of(first):
                return launcher(first, *others)

        name = f"fdconv_zoo::{launcher.__name__}"
        # A second import of the package keeps the operators of the first.
        if not hasattr(torch.ops.fdconv_zoo, launcher.__name__):
            torch.library.define(name, schema)
            torch.library.impl(name, "default", on_its_device)
            torch.library.register_fake(name, fake)
        return getattr(torch.ops.fdconv_zoo, launcher.__name__).default

    return register
