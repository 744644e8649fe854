"""Python sources, where what a module does is to be read from them."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import nn


@lru_cache(maxsize=4096)  # a network has hundreds of modules of a dozen classes, and each reading takes a millisecond
def read_source(what: type | Callable[..., Any]) -> str | None:
    """Source of a class or function; None where it can't be read, as of what was typed in or compiled."""
    try:
        return inspect.getsource(what)
    except (OSError, TypeError, SyntaxError):
        return None


def forward_source(kind: type[nn.Module]) -> str | None:
    """Source of a class's forward, as of :func:`read_source`; empty for torch's own classes, which hide nothing."""
    return "" if kind.__module__.startswith("torch.") else read_source(kind.forward)
