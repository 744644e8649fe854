"""DY-Conv: an average of kernels for each sample.

Paper: Dynamic Convolution: Attention over Convolution Kernels, CVPR 2020, https://arxiv.org/abs/1912.03458

    pi = softmax((F2 relu(F1 p) + b2) / tau),   y_i = (sum_k pi_ik W_k) * x_i + sum_k pi_ik beta_k

F1 has one channel more than Cin times the reduction, as the code in use has it; the paper has Cin / 4.
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ksm import Projection
from .conv2d import DynamicConv2d, add_bias, pooled
from .parts import Annealed, draw_by_fan_out


class DYAttention(Annealed):
    """Attention over kernels.

    Args:
        in_channels: Input channels Cin.
        num_kernels: Kernels K.
        reduction: Ratio of hidden to input channels, to which one is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    rest, lowest, highest = 1.0, 1e-3, 1e6

    def __init__(
        self,
        in_channels: int,
        num_kernels: int,
        reduction: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        hidden = num_kernels if in_channels == 3 else int(in_channels * reduction) + 1
        self.fc1 = Projection(in_channels, hidden, bias=False, device=device, dtype=dtype)
        self.fc2 = Projection(hidden, num_kernels, bias=True, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws both linear maps; the bias is zero."""
        draw_by_fan_out(self.fc1)
        draw_by_fan_out(self.fc2)

    def forward(self, pooled: Tensor) -> Tensor:
        """Shares (B, K) of the kernels, whose sum is 1, from the pooled input (B, Cin)."""
        logits = self.fc2(F.relu(self.fc1(pooled)))
        return torch.softmax(logits / self.temperature, dim=1)


@register_notrace_module
class DYConv2d(DynamicConv2d):
    """Dynamic convolution by attention over kernels, in place of nn.Conv2d.

    Args:
        in_channels: As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`, and so on up to `groups`.
        bias: Adds a learnt bias for each kernel, mixed as the kernels are.
        num_kernels: Kernels K.
        reduction: Ratio of the attention's hidden channels to Cin, to which one is added.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape, Raises:
        As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`.
    """

    method = "DY-Conv"
    held = ("kernels", "biases")

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
        reduction: float = 1 / 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups)
        if num_kernels < 1 or reduction <= 0:
            raise ValueError(f"num_kernels={num_kernels}, reduction={reduction}, but both must be above 0")
        factory = {"device": device, "dtype": dtype}
        self.attention = DYAttention(in_channels, num_kernels, reduction, **factory)
        self.kernels = nn.Parameter(torch.empty(num_kernels, *self.static_shape, **factory))
        self.register_parameter(
            "biases", nn.Parameter(torch.empty(num_kernels, out_channels, **factory)) if bias else None
        )
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws each kernel and the attention as the code in use does; biases are zero."""
        self.attention.reset_parameters()
        if self.biases is not None:
            nn.init.zeros_(self.biases)
        bound = math.sqrt(6 / math.prod(self.static_shape[1:]))  # kaiming uniform, a = 0, fan_in
        nn.init.uniform_(self.kernels, -bound, bound)

    @torch.jit.ignore
    def static_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The static weight in every kernel: whatever the attention, its sum is 1."""
        count = len(self.kernels)
        state = {"kernels": weight.repeat(count, 1, 1, 1, 1)}
        return state if bias is None else {**state, "biases": bias.repeat(count, 1)}

    @torch.jit.ignore
    def static_weight(self) -> Tensor:
        """Mean of the kernels (Cout, Cin/groups, kh, kw)."""
        return self.kernels.mean(0)

    @torch.jit.ignore
    def static_bias(self) -> Tensor | None:
        """Mean of the biases (Cout,), or None."""
        return None if self.biases is None else self.biases.mean(0)

    @torch.jit.ignore
    def bank(self) -> Tensor:
        """The kernels (K, Cout, Cin/groups, kh, kw)."""
        return self.kernels

    def _convolve(self, x: Tensor) -> Tensor:
        attention = self.attention(pooled(x))
        out = self._mix(x, attention.unsqueeze(1), self.kernels, None)
        biases = self.biases
        return out if biases is None else add_bias(out, torch.matmul(attention, biases))
