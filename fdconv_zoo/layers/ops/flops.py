"""What an operator costs, for torch's FlopCounterMode, which does not look into operators."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


def flops_of(
    kernel: Callable[..., Any], formulas: Mapping[Any, Callable[..., int]] | None = None
) -> Callable[..., int]:
    """Formula that counts what an implementation does with tensors on the meta device, on which it costs nothing.

    Args:
        kernel: Implementation of the operator.
        formulas: For operators that torch does not count, such as Fourier transforms.
    """

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        args = [value.to("meta") if isinstance(value, Tensor) else value for value in args]
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict(formulas or {})) as counter:
            kernel(*args, **kwargs)
        return counter.get_total_flops()

    return count
