"""Memory formats of maps (B, C, H, W), by strides and axes: vmap lets nobody ask for the format."""

from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether a map is in channels_last and not, being small, in the contiguous format too."""
    return x.stride(1) == 1 and not x.is_contiguous()


def to_channels_last(x: Tensor) -> Tensor:
    """The map in channels_last."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)
