"""Kernels that a pass launches and bytes that they move, counted from the arguments and results of its operations."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fdconv_zoo.layers.ops.registry import OPERATORS

# Neither launched nor moved anything.
FREE = ("prim.", "empty", "promote", "sym_", "_unsafe_view", "_local_scalar")


class Traffic(NamedTuple):
    """Kernels and bytes of one pass, by the name of the operation."""

    kernels: Counter[str]
    bytes: Counter[str]


def size(tree: Any) -> int:
    """Bytes of the tensors in a tree of arguments."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def storages(tree: Any) -> set[int]:
    """Identities of the memory that the tensors in a tree of arguments lie in."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


class Counting(TorchDispatchMode):
    """Counts what is dispatched while it is active: each operation that is no view reads and writes once.

    FDConv's operators count as what they launch on a device.

    Args:
        device_type: Of the tensors, `cuda` for fake ones too.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.traffic = Traffic(Counter(), Counter())
        self.launched = {
            getattr(torch.ops.fdconv_zoo, name).default: operator.kernels.get(device_type, operator.kernels["default"])
            for name, operator in OPERATORS.items()
        }

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in self.launched:
            with self:
                return self.launched[function](*args, **kwargs)
        out, name = function(*args, **kwargs), str(function)
        # Operations that may copy (to, contiguous, reshape) are views by their schema.
        if any(word in name for word in FREE) or (function.is_view and storages(out) <= storages((args, kwargs))):
            return out
        in_place = name.split(".")[1].endswith("_")
        self.traffic.kernels[name] += 1
        self.traffic.bytes[name] += size((args, kwargs)) + (0 if in_place else size(out))
        return out


def traffic_of(run: Callable[[], object], device_type: str) -> Traffic:
    """What one call launches and moves."""
    with Counting(device_type) as counting:
        run()
    return counting.traffic
