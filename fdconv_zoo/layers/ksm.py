"""Kernel Spatial Modulation (KSM): gates for every element of a sample's weight, from its pooled input.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.2)

A global branch gates input channels, filters, kernel positions and frequency groups; a local branch, one convolution
along the channel axis, gates each weight element.

What differs from the official code:
- Every head starts at zero, so every gate starts at exactly 1 (the official code misses the filter head).
- The four heads are one linear layer.
- The local branch's convolution is left to the operator, which makes the dense gate a sample at a time.
- The parts are types of their own in place of nn.Linear and nn.Conv1d, with the same state-dict keys. What others do to
  a network by type or by class name - initialise, quantise, shard, prune - is not meant for the parts of a layer: gates
  would leave 1 behind the layer's back. And each part reads its parameters in its own forward, where whoever keeps them
  elsewhere meanwhile (accelerate, FSDP) puts them in place.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers import get_act_layer, get_norm_layer
from timm.models.metaformer import StarReLU
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from .ops import can_launch
from .ops.traced import local_logits
from .ops.types import Gates


def local_kernel_size(in_channels: int) -> int:
    """Taps t of the local branch, odd: round(log2(Cin)/2 + 0.5) // 2 * 2 + 1."""
    return round(math.log2(in_channels) / 2 + 0.5) // 2 * 2 + 1


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


def star_values(act: nn.Module) -> tuple[float, float]:
    """Scale and bias that a StarReLU starts with; its defaults for others, and where there are no numbers to read."""
    if type(act) is not StarReLU or type(act.scale.data) is not Tensor or act.scale.is_meta:
        return 1.0, 0.0
    return act.scale.item(), act.bias.item()


def named_layer(
    option: str, layer: str | Callable[..., nn.Module], find: Callable[[str], Callable[..., nn.Module] | None]
) -> Callable[..., nn.Module]:
    """What makes a normalisation or an activation: given itself, or by timm's name of it.

    Raises:
        ValueError: timm has none of the name.
    """
    if not isinstance(layer, str):
        return layer
    try:
        found = find(layer)
    except KeyError:
        found = None
    if found is None:
        raise ValueError(f"{option}={layer!r}, but timm has none of that name")
    return found


class KSM(nn.Module):
    """Kernel Spatial Modulation.

    Args:
        in_channels: Input channels Cin.
        out_channels: Filters Cout.
        kernel_size: (kh, kw).
        num_bands: Frequency groups n of the FDW.
        reduction: Ratio of hidden to input channels; at least 16 channels are kept.
        modulate_weight: False leaves only the gains of the frequency groups (the paper's "FDW only").
        norm_layer: Normalisation of the hidden (B, A, 1, 1) map, or timm's name of it. A BatchNorm that trains takes
            the running statistics for a batch of one (with a warning, once) and leaves them; in TorchScript such a
            batch is an error.
        act_layer: Activation of the hidden map, or timm's name of it.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: timm has no layer of the name.
    """

    star_start: tuple[float, float] = (1.0, 0.0)  # of pickles from before it was there

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        num_bands: int = 64,
        reduction: float = 1 / 16,
        modulate_weight: bool = True,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: str | Callable[..., nn.Module] = StarReLU,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = max(int(in_channels * reduction), 16)
        positions = kernel_size[0] * kernel_size[1]
        self.kernel_size = kernel_size
        self.modulate_weight = modulate_weight
        self.sections = [num_bands]
        if modulate_weight:
            self.sections += [in_channels, out_channels] + ([positions] if positions > 1 else [])
        self.fc = Projection(in_channels, hidden, bias=False, device=device, dtype=dtype)
        self.norm = named_layer("norm_layer", norm_layer, get_norm_layer)(hidden).to(device=device, dtype=dtype)
        act = named_layer("act_layer", act_layer, get_act_layer)()
        self.star_start = star_values(act)
        self.act = act.to(device=device, dtype=dtype)
        self.heads = Projection(hidden, sum(self.sections), bias=True, device=device, dtype=dtype)
        if modulate_weight:
            self.local_norm = nn.LayerNorm(in_channels, device=device, dtype=dtype)
            num_taps, maps = local_kernel_size(in_channels), out_channels * positions
            self.local_conv = ChannelTaps(maps, num_taps, device=device, dtype=dtype)
        else:
            self.local_norm = self.local_conv = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random hidden layer, everything after it at zero: all gates start at exactly 1."""
        self.fc.draw()
        for module in (self.norm, self.act, self.local_norm):
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        if type(self.act) is StarReLU:  # timm's has no method for it
            nn.init.constant_(self.act.scale, self.star_start[0])
            nn.init.constant_(self.act.bias, self.star_start[1])
        self.heads.zero()
        if self.local_conv is not None:
            self.local_conv.zero()

    def forward(self, pooled: Tensor, by_kernels: bool = False) -> Gates:
        """Computes the gates of each sample, all but the dense one, whose input and weight stand for it.

        Args:
            pooled: Mean of the input over space (B, Cin); the gates have its dtype.
            by_kernels: Let a GPU's kernel compute where there is one for it.
        """
        projected = self.fc(pooled)
        if by_kernels:
            gates = self._gates_by_kernel(projected)
        else:
            gates = self._gates(projected)
        gates = gates.to(pooled.dtype)
        if self.local_norm is None or self.local_conv is None:
            return Gates(gates, None, None, None, None, None)
        local_input = self.local_norm(pooled.to(projected.dtype)).to(pooled.dtype)
        local_weight = self.local_conv(pooled)
        positions: Tensor | None = None
        if len(self.sections) == 3:
            bands, channels, filters = gates.split(self.sections, dim=1)
        else:
            bands, channels, filters, positions = gates.split(self.sections, dim=1)
        return Gates(bands, channels, filters, positions, local_input, local_weight)

    def _gates(self, projected: Tensor) -> Tensor:
        """Gates of all sections (B, sum of sections) from the hidden layer (B, A) before its normalisation."""
        hidden = projected[:, :, None, None]
        if torch.jit.is_scripting():
            hidden = self.norm(hidden)
        else:
            hidden = normalise(self.norm, hidden)
        return 2 * torch.sigmoid(self.heads(self.act(hidden).flatten(1)))

    @torch.jit.unused
    def _gates_by_kernel(self, projected: Tensor) -> Tensor:
        """:meth:`_gates` in one launch where no gradient is wanted and the parts are the default ones."""
        norm, act = self.norm, self.act
        is_default = type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats and type(act) is StarReLU
        if not is_default or norm.training or is_hooked(norm, act, self.heads) or not can_launch(projected):
            return self._gates(projected)
        from .ops.triton.gates import gates_of_hidden

        return gates_of_hidden(
            projected, self.heads.weight, self.heads.bias, mean=norm.running_mean, variance=norm.running_var,
            norm_weight=norm.weight, norm_bias=norm.bias, epsilon=norm.eps, star_scale=act.scale, star_bias=act.bias,
        )  # fmt: skip

    @torch.jit.ignore
    def dense_gate(self, gates: Gates) -> Tensor | None:
        """Gate of each weight element (B, Cout*kh, Cin*kw), in the layout of the weight matrix, or None without it."""
        if gates.local_input is None:
            return None
        return 2 * torch.sigmoid(local_logits(gates.local_input, gates.local_weight, self.kernel_size[1]))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over the static layers of pickles from before KSM had parts of its own."""
        super().__setstate__(state)
        for name, part in list(self._modules.items()):
            if isinstance(part, nn.Linear):
                own = Projection(part.in_features, part.out_features, part.bias is not None, device="meta")
                own.bias = part.bias
            elif isinstance(part, nn.Conv1d):
                own = ChannelTaps(part.out_channels, part.kernel_size[0], device="meta")
            else:
                continue
            own.weight = part.weight
            self._modules[name] = own.train(part.training)


def normalise(norm: nn.Module, hidden: Tensor) -> Tensor:
    """The hidden map (B, A, 1, 1) normalised: a sample alone has no statistics, so by BatchNorm's running ones."""
    is_lone = isinstance(norm, _BatchNorm) and norm.training and hidden.shape[0] == 1
    if not is_lone or norm.running_mean is None or is_synchronised(norm):
        return call_norm(norm, hidden)
    warn_of_lone_sample()
    norm.training = False
    try:
        return call_norm(norm, hidden)
    finally:
        norm.training = True


def call_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Calls a norm, in the dtype of BatchNorm's statistics where its parameters have another.

    FSDP2's mixed precision casts parameters and no buffers, and PyTorch's BatchNorm takes one dtype for both.
    """
    mean, weight = getattr(norm, "running_mean", None), getattr(norm, "weight", None)
    if mean is None or weight is None or mean.dtype == weight.dtype or is_hooked(norm):
        return norm(hidden)
    parameters = {name: parameter.to(mean.dtype) for name, parameter in norm.named_parameters()}
    return functional_call(norm, parameters, hidden.to(mean.dtype))


def is_hooked(*parts: nn.Module) -> bool:
    """Whether someone acts when a part is called: its parameters may be elsewhere until then (FSDP, accelerate)."""
    return any(part._forward_pre_hooks or part._forward_hooks or "forward" in vars(part) for part in parts)


def is_synchronised(norm: nn.Module) -> bool:
    """Whether the statistics are those of several processes' samples."""
    if not isinstance(norm, nn.SyncBatchNorm) or not dist.is_available() or not dist.is_initialized():
        return False
    return dist.get_world_size(norm.process_group) > 1


@cache
def _warn_once() -> None:
    warnings.warn(
        "a batch of one sample in training: KSM's BatchNorm, which has one value a channel and sample, normalises it "
        "by its running statistics and leaves those as they are. Where every batch is such, they never leave 0 and 1: "
        "build the layers with another norm_layer, e.g. norm_layer=functools.partial(nn.GroupNorm, 1) (ksm_norm_layer "
        "of the zoo's models). Where only an epoch's last batch is: drop_last=True of the DataLoader. update_bn wants "
        "batches of two or more. Said once",
        stacklevel=2,
    )


@torch.compiler.assume_constant_result  # the compiler calls it, once, and goes on
def warn_of_lone_sample() -> None:
    """Says once a process what becomes of a batch of one in training."""
    _warn_once()
