"""What an operator costs, for torch's FlopCounterMode, which does not look into operators."""

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode


class Meta(NamedTuple):
    """What a tensor's part in the cost depends on.

    Attributes:
        size: Its shape.
        stride: Its strides.
        dtype: Its dtype.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


def describe(value: Any) -> Any:
    """An argument as what can be hashed: a tensor as :class:`Meta`, a list as a frozen one."""
    if isinstance(value, Tensor):
        return Meta(tuple(value.shape), value.stride(), value.dtype)
    return ("list", *value) if isinstance(value, list) else value


def restore(value: Any) -> Any:
    """The argument that :func:`describe` described, tensors on the meta device, on which nothing is computed."""
    if isinstance(value, Meta):
        return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device="meta")
    return list(value[1:]) if isinstance(value, tuple) and value[:1] == ("list",) else value


def flops_of(
    kernel: Callable[..., Any], formulas: Mapping[Any, Callable[..., int]] | None = None
) -> Callable[..., int]:
    """Formula that counts what an implementation does with tensors on the meta device.

    Networks repeat their layers: each set of shapes is counted once.

    Args:
        kernel: Implementation of the operator.
        formulas: For operators that torch does not count, such as Fourier transforms.
    """

    @lru_cache(maxsize=4096)
    def count_once(*args: Any, **kwargs: Any) -> int:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=dict(formulas or {})) as counter:
            kernel(*map(restore, args), **{name: restore(value) for name, value in kwargs.items()})
        return counter.get_total_flops()

    def count(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        return count_once(*map(describe, args), **{name: describe(value) for name, value in kwargs.items()})

    return count
