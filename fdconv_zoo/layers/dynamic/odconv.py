"""ODConv: an average of kernels for each sample, gated along filters, input channels and kernel positions.

Paper: Omni-Dimensional Dynamic Convolution, ICLR 2022, https://arxiv.org/abs/2209.07947

    weight_i[o,c,u,v] = f_io c_ic s_iuv sum_n a_in W_n[o,c,u,v]

The gates here are 2 sigmoid(.), where the paper has sigmoid(.), and an official bank is divided when it is loaded: the
same function, whose gates start at 1 and do not slow its training.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ksm import Projection
from .conv2d import DynamicConv2d, add_bias, pooled
from .parts import Annealed, Hidden


class ODGates(NamedTuple):
    """What the attention makes from a sample's pooled input.

    Attributes:
        channels: Gate of each input channel (B, Cin).
        filters: Gate of each filter (B, Cout); None in a depthwise layer.
        positions: Gate of each kernel position (B, kh*kw), None where the kernel has one.
        kernels: Share of each kernel (B, K), None where there is one.
    """

    channels: Tensor
    filters: Tensor | None
    positions: Tensor | None
    kernels: Tensor | None


class ODAttention(Annealed):
    """Attention of one hidden layer with a head for each dimension; the heads are one linear map.

    Args:
        in_channels: Input channels Cin.
        num_filters: Filters Cout, or 0 for no gate of filters.
        positions: Kernel positions kh*kw, or 0 for no gate of positions.
        num_kernels: Kernels K, or 0 for no shares of kernels.
        reduction: Ratio of hidden to input channels; at least 16 are kept.
        norm_layer: Normalisation of the hidden map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    rest, lowest, highest = 1.0, 1e-3, 1e6

    def __init__(
        self,
        in_channels: int,
        num_filters: int,
        positions: int,
        num_kernels: int,
        reduction: float,
        norm_layer: str | Callable[..., nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        self.sections = [in_channels, num_filters, positions, num_kernels]
        self.hidden = Hidden(in_channels, reduction, norm_layer, device=device, dtype=dtype)
        self.heads = Projection(self.hidden.channels, sum(self.sections), bias=True, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the hidden layer, and each head by its own fan_out; biases are zero."""
        self.hidden.reset_parameters()
        nn.init.zeros_(self.heads.bias)
        with torch.no_grad():
            for head in self.heads.weight.split(self.sections):
                if len(head):
                    nn.init.kaiming_normal_(head, mode="fan_out", nonlinearity="relu")

    @property
    def num_gates(self) -> int:
        """Numbers of the heads that make gates, and not shares of kernels; they come first."""
        return sum(self.sections[:3])

    def forward(self, pooled: Tensor) -> ODGates:
        """The gates, and the shares of the kernels, from the pooled input (B, Cin)."""
        logits = self.heads(self.hidden(pooled)) / self.temperature
        channels, filters, positions, kernels = logits.split(self.sections, dim=1)
        # Bound to names: TorchScript knows of those alone that they are not None.
        filter_gate: Tensor | None = None
        position_gate: Tensor | None = None
        shares: Tensor | None = None
        if self.sections[1] > 0:
            filter_gate = 2 * torch.sigmoid(filters)
        if self.sections[2] > 0:
            position_gate = 2 * torch.sigmoid(positions)
        if self.sections[3] > 0:
            shares = torch.softmax(kernels, dim=1)
        return ODGates(2 * torch.sigmoid(channels), filter_gate, position_gate, shares)


@register_notrace_module
class ODConv2d(DynamicConv2d):
    """Omni-dimensional dynamic convolution, in place of nn.Conv2d.

    Args:
        in_channels: As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`, and so on up to `groups`.
        bias: Adds a learnt bias, which the paper's layer has not.
        num_kernels: Kernels K; with one there are gates only.
        reduction: Ratio of the attention's hidden channels to Cin; at least 16 are kept.
        norm_layer: Normalisation in the attention, or timm's name of it. BatchNorm takes its running statistics for a
            batch of one.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape, Raises:
        As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`.
    """

    method = "ODConv"
    held = ("kernels", "bias")

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
        num_kernels: int = 4,
        reduction: float = 1 / 16,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups)
        if num_kernels < 1:
            raise ValueError(f"num_kernels={num_kernels}, but it must be at least 1")
        factory = {"device": device, "dtype": dtype}
        positions = self.kernel_size[0] * self.kernel_size[1]
        depthwise = groups > 1 and groups == in_channels == out_channels
        self.attention = ODAttention(
            in_channels,
            num_filters=0 if depthwise else out_channels,
            positions=positions if positions > 1 else 0,
            num_kernels=num_kernels if num_kernels > 1 else 0,
            reduction=reduction,
            norm_layer=norm_layer,
            **factory,
        )
        self.kernels = nn.Parameter(torch.empty(num_kernels, *self.static_shape, **factory))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, **factory)) if bias else None)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws each kernel and the attention as the paper's code does; the bias is zero."""
        self.attention.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        with torch.no_grad():
            for kernel in self.kernels:
                nn.init.kaiming_normal_(kernel, mode="fan_out", nonlinearity="relu")

    @torch.jit.ignore
    def static_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The static weight in every kernel, and the heads of the gates at zero, where every gate is 1."""
        state = {"kernels": weight.repeat(len(self.kernels), 1, 1, 1, 1)}
        heads = {
            f"attention.heads.{name}": head.detach().clone() for name, head in self.attention.heads.named_parameters()
        }
        for head in heads.values():
            head[: self.attention.num_gates] = 0
        return {**state, **heads} if bias is None else {**state, **heads, "bias": bias}

    @torch.jit.ignore
    def static_weight(self) -> Tensor:
        """Mean of the kernels (Cout, Cin/groups, kh, kw)."""
        return self.kernels.mean(0)

    @torch.jit.ignore
    def bank(self) -> Tensor:
        """The kernels (K, Cout, Cin/groups, kh, kw)."""
        return self.kernels

    def _convolve(self, x: Tensor) -> Tensor:
        gates = self.attention(pooled(x))
        filters, positions, shares = gates.filters, gates.positions, gates.kernels
        x = x * gates.channels.to(x.dtype)[:, :, None, None]
        if shares is None and positions is None:
            # One kernel for all samples.
            left, right, top, bottom = self.pads
            x = F.pad(x, [left, right, top, bottom]) if max(self.pads) > 0 else x
            kernel = self.kernels[0].to(x.dtype)
            out = F.conv2d(x, kernel, stride=self.stride, dilation=self.dilation, groups=self.groups)
        else:
            if shares is None:
                shares = torch.ones(x.shape[0], 1, device=x.device, dtype=x.dtype)
            out = self._mix(x, shares.unsqueeze(1), self.kernels, positions)
        if filters is not None:
            out = out * filters.to(out.dtype)[:, :, None, None]
        return add_bias(out, self.bias)
