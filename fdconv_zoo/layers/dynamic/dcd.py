"""DCD: dynamic convolution decomposition, W(x) = Lambda(x) W0 + P Phi(x) Q^T.

Paper: Revisiting Dynamic Convolution via Matrix Decomposition, ICLR 2021, https://arxiv.org/abs/2103.08756

The weight is never assembled: the dynamic part works on features.

    v = F p;  v = v hs(G v);  Phi = F_Phi v;  Lambda = hs(F_Lambda v)
    z = BN1(Q x);  z = BN2(Phi z) + z;  y = P z + Lambda (W0 * x)
"""

import math

import torch
import torch.nn.functional as F
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ksm import Projection
from ..ops.types import Geometry
from .conv2d import DynamicConv2d, add_bias
from .parts import Kernel


def _hard_gate(logits: Tensor) -> Tensor:
    """From 0 to 2, and 1 where the logit is 0."""
    return F.relu6(logits + 3) / 3


class DCDAttention(nn.Module):
    """What fuses channels and scales filters, from a sample's pooled input.

    Args:
        in_features: Numbers of the pooled input.
        hidden: Numbers s of the hidden layer.
        latent: Dimensions d of the latent space.
        out_channels: Filters Cout.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int,
        latent: int,
        out_channels: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.latent = latent
        factory = {"bias": False, "device": device, "dtype": dtype}
        self.fc = Projection(in_features, hidden, **factory)
        self.gate = Projection(hidden, hidden, **factory)
        self.phi = Projection(hidden, latent * latent, **factory)
        self.scale = Projection(hidden, out_channels, **factory)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the linear maps as nn.Linear does."""
        for part in (self.fc, self.gate, self.phi, self.scale):
            part.draw()

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Fusion (B, d, d) and scale of each filter (B, Cout), from the pooled input (B, in_features)."""
        hidden = self.fc(pooled)
        hidden = hidden * _hard_gate(self.gate(hidden))
        return self.phi(hidden).view(-1, self.latent, self.latent), _hard_gate(self.scale(hidden))


@register_notrace_module
class DCDConv2d(DynamicConv2d):
    """Decomposed dynamic convolution, in place of nn.Conv2d.

    Args:
        in_channels: As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`, and so on up to `groups`.
        groups: Only 1 is possible.
        bias: Adds a learnt bias, which the paper's layer has not.
        pool: Height and width of the pooled input: 1 as in bottlenecks, or 2 as in BasicBlocks.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`.

    Raises:
        ValueError: On groups other than 1, or a padding that does not keep the map's size at stride 1.
    """

    method = "DCD"
    held = ("conv.weight", "bias")

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
        pool: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups)
        if groups != 1:
            raise ValueError(f"groups={groups}, but DCDConv2d's latent space has no groups: only groups=1")
        if pool < 1:
            raise ValueError(f"pool={pool}, but it must be at least 1")
        extents = [dilated * (size - 1) for dilated, size in zip(self.dilation, self.kernel_size, strict=True)]
        if self.pads != (extents[1] / 2, extents[1] / 2, extents[0] / 2, extents[0] / 2):
            raise ValueError(
                f"padding={padding} with kernel_size={kernel_size} and dilation={dilation}, but the map of DCDConv2d's "
                "pointwise part must be as large: padding = dilation * (kernel_size - 1) / 2"
            )
        factory = {"device": device, "dtype": dtype}
        features = in_channels * pool**2
        latent = int(math.sqrt(features))
        hidden = max(features, latent**2) // 16
        self.pool = pool
        self.attention = DCDAttention(
            features, max(hidden, 4) if pool > 1 else hidden or 4, latent, out_channels, **factory
        )
        self.conv = Kernel(in_channels, out_channels, self.kernel_size, **factory)
        self.q = Kernel(in_channels, latent, (1, 1), **factory)
        self.p = Kernel(latent, out_channels, (1, 1), **factory)
        self.bn1 = nn.BatchNorm2d(latent, **factory)
        self.bn2 = nn.BatchNorm2d(latent, **factory)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, **factory)) if bias else None)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws convolutions and attention as the paper's code does; the bias is zero."""
        self.attention.reset_parameters()
        for norm in (self.bn1, self.bn2):
            norm.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for part in (self.conv, self.q, self.p):
            filters, _, height, width = part.weight.shape
            nn.init.normal_(part.weight, std=math.sqrt(2 / (height * width * filters)))

    @torch.jit.ignore
    def static_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The static weight, nothing out of the latent space, and every scale at 1."""
        state = {
            "conv.weight": weight.view(self.static_shape),
            "p.weight": torch.zeros_like(self.p.weight),
            "attention.scale.weight": torch.zeros_like(self.attention.scale.weight),
        }
        return state if bias is None else {**state, "bias": bias}

    @torch.jit.ignore
    def static_weight(self) -> Tensor:
        """The static kernel W0 (Cout, Cin, kh, kw)."""
        return self.conv.weight

    def _convolve(self, x: Tensor) -> Tensor:
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        pooled = F.adaptive_avg_pool2d(exact, self.pool).flatten(1) if self.pool > 1 else exact.mean([2, 3])
        fusion, scale = self.attention(pooled)
        latent = self.bn1(self.q(x, Geometry((1, 1), self.stride, (0, 0, 0, 0), (1, 1))))
        fused = torch.bmm(fusion.to(latent.dtype), latent.flatten(2)).view_as(latent)
        latent = self.bn2(fused) + latent
        out = self.conv(x, self._geometry()) * scale.to(x.dtype)[:, :, None, None]
        out = out + self.p(latent.to(x.dtype), Geometry((1, 1), (1, 1), (0, 0, 0, 0), (1, 1)))
        return add_bias(out, self.bias)


class DCDClassifier(nn.Module):
    """DCD's dynamic classifier, in place of nn.Linear: the pooled input is the input itself.

    Args:
        in_features: Inputs C.
        out_features: Classes.
        latent: Dimensions of the latent space and of the hidden layer.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        (B, C) to (B, classes).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        latent: int = 32,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.attention = DCDAttention(in_features, latent, latent, out_features, **factory)
        self.cls = nn.Linear(in_features, out_features, **factory)
        self.cls_q = Projection(in_features, latent, bias=False, **factory)
        self.cls_p = Projection(latent, out_features, bias=False, **factory)
        self.bn1 = nn.BatchNorm1d(latent, **factory)
        self.bn2 = nn.BatchNorm1d(latent, **factory)
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws all linear maps as nn.Linear does, and sets the norms as they start."""
        for part in (self.attention, self.cls, self.bn1, self.bn2):
            part.reset_parameters()
        self.cls_q.draw()
        self.cls_p.draw()

    def forward(self, x: Tensor) -> Tensor:
        """Takes (B, C) to logits (B, classes)."""
        fusion, scale = self.attention(x)
        latent = self.bn1(self.cls_q(x))
        latent = self.bn2(torch.bmm(fusion, latent.unsqueeze(2)).squeeze(2)) + latent
        return self.cls_p(latent) + scale * self.cls(x)
