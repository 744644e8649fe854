"""CondConv: a sum of experts for each sample.

Paper: CondConv: Conditionally Parameterized Convolutions for Efficient Inference, NeurIPS 2019,
https://arxiv.org/abs/1904.04971

    r = sigmoid(R p + b),   y_i = (sum_e r_ie W_e) * x_i + sum_e r_ie beta_e

The experts are timm's; its layer keeps every sample's kernel for the backward pass, this one none.
"""

from typing import Any

import torch
from timm.layers import CondConv2d as TimmCondConv2d
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ksm import Projection
from .conv2d import DynamicConv2d, add_bias, pooled


@register_notrace_module
class Experts(TimmCondConv2d):
    """The experts of timm's layer, which hands them over and convolves nothing."""

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """The experts (n, Cout*Cin/groups*kh*kw), and their biases (n, Cout) or None."""
        if torch.jit.is_scripting():
            return self.weight, self.bias
        else:
            if len(self._forward_hooks) > 0:
                # What hooks into the end of a module may free its parameters there (FSDP2), before they are used.
                return self.weight.clone(), None if self.bias is None else self.bias.clone()
            return self.weight, self.bias


@register_notrace_module
class CondConv2d(DynamicConv2d):
    """Conditionally parameterised convolution, in place of nn.Conv2d.

    Its state dict has the names of timm's CondConv2d, below `conv`, and of its router.

    Args:
        in_channels: As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`, and so on up to `groups`.
        bias: Adds a learnt bias for each expert, mixed as the experts are.
        num_experts: Experts n.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape, Raises:
        As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`.
    """

    method = "CondConv"
    held = ("conv.weight", "conv.bias")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        num_experts: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups)
        if num_experts < 1:
            raise ValueError(f"num_experts={num_experts}, but it must be at least 1")
        factory = {"device": device, "dtype": dtype}
        self.conv = Experts(
            in_channels, out_channels, self.kernel_size, padding=0, groups=groups, bias=bias, num_experts=num_experts,
            **factory,
        )  # fmt: skip
        self.routing_fn = Projection(in_channels, num_experts, bias=True, **factory)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws each expert as nn.Conv2d is drawn, and the router as timm does."""
        self.conv.reset_parameters()
        bound = (self.in_channels + self.conv.num_experts) ** -0.5
        nn.init.uniform_(self.routing_fn.weight, -bound, bound)
        nn.init.zeros_(self.routing_fn.bias)

    @torch.jit.ignore
    @torch.no_grad()
    def start_from_scratch(self) -> None:
        """Draws each expert at the scale of the static weight, and the router as timm does; biases are the static."""
        weight, bias = self.static_weight(), self.static_bias()
        self.reset_parameters()
        self.conv.weight.normal_().mul_(weight.std())
        if bias is not None:
            self.conv.bias.copy_(bias.expand_as(self.conv.bias))

    @torch.jit.ignore
    def static_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """Experts whose sum is twice the static weight, and a router at zero, which gives each of them a half.

        They differ by random parts without a sum, as large as what they share: equal ones would never come apart.
        """
        experts = self.conv.num_experts
        router = self.routing_fn
        state = {
            "conv.weight": spread(weight.flatten(), experts),
            "routing_fn.weight": torch.zeros_like(router.weight),
            "routing_fn.bias": torch.zeros_like(router.bias),
        }
        return state if bias is None else {**state, "conv.bias": (2 / experts * bias).repeat(experts, 1)}

    @torch.jit.ignore
    def static_weight(self) -> Tensor:
        """Half the sum of the experts (Cout, Cin/groups, kh, kw)."""
        return self.conv.weight.sum(0).view(self.static_shape) / 2

    @torch.jit.ignore
    def static_bias(self) -> Tensor | None:
        """Half the sum of the experts' biases (Cout,), or None."""
        return None if self.conv.bias is None else self.conv.bias.sum(0) / 2

    @torch.jit.ignore
    def bank(self) -> Tensor:
        """The experts (n, Cout, Cin/groups, kh, kw)."""
        return self.conv.weight.view(-1, *self.static_shape)

    def _convolve(self, x: Tensor) -> Tensor:
        routing = torch.sigmoid(self.routing_fn(pooled(x)))
        channels = self.in_channels // self.groups
        weight, bias = self.conv()
        experts = weight.view(-1, self.out_channels, channels, self.kernel_size[0], self.kernel_size[1])
        out = self._mix(x, routing.unsqueeze(1), experts, None)
        return out if bias is None else add_bias(out, torch.matmul(routing, bias))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over timm's layer of pickles from before the experts had a type of their own."""
        super().__setstate__(state)
        if type(self.conv) is TimmCondConv2d:
            self.conv.__class__ = Experts


def spread(weight: Tensor, count: int) -> Tensor:
    """Weights (count, N) whose sum is twice the given one (N,), apart by random parts whose sum is zero."""
    share = weight * (2 / count)
    apart = torch.randn(count, len(weight), device=weight.device, dtype=weight.dtype)
    apart = (apart - apart.mean(0)) * share.square().mean().sqrt()
    return share + apart
