"""KSM's own little modules, in place of nn.Linear and nn.Conv1d, whose state-dict keys they have.

What others do to a network by type or by class name - initialise, quantise, shard, prune - is not meant for the parts
of a layer: gates would leave 1 behind the layer's back. And each reads its parameters in its own forward, where whoever
keeps them elsewhere meanwhile (accelerate, FSDP) puts them in place.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Projection(nn.Module):
    """A matrix product, in the parameters' dtype.

    Args:
        in_features: Input channels.
        out_features: Output channels.
        bias: Adds a learnt bias.
        device: Device of the parameters.
        dtype: Dtype of the parameters, which are left to be set.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None

    def draw(self) -> None:
        """Draws the weight as nn.Linear does."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def zero(self) -> None:
        """Sets weight and bias to zero."""
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Projects x (B, in_features)."""
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class ChannelTaps(nn.Module):
    """The weight (maps, 1, taps) of the local branch's convolution, with which the operator makes the dense gate.

    Args:
        maps: Maps Cout*kh*kw that it makes of the channel axis.
        num_taps: Taps t, odd.
        device: Device of the parameter.
        dtype: Dtype of the parameter, which is left to be set.
    """

    def __init__(
        self,
        maps: int,
        num_taps: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(maps, 1, num_taps, device=device, dtype=dtype))

    def zero(self) -> None:
        """Sets the weight to zero."""
        nn.init.zeros_(self.weight)

    def forward(self, like: Tensor) -> Tensor:
        """A copy of the weight in the dtype of `like`: FSDP2 frees the parameter's memory after this."""
        return self.weight.to(like.dtype, copy=True)

    def extra_repr(self) -> str:
        return f"maps={self.weight.shape[0]}, taps={self.weight.shape[2]}"
