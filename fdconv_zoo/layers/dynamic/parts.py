"""Parts of the attention of dynamic convolutions.

They are types of their own in place of nn.Linear and nn.Conv2d, as KSM's are: what others do to a network by type is
not meant for the parts of a layer.
"""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import get_norm_layer
from torch import Tensor, nn

from ..ksm import Projection, named_layer, normalise
from ..ops.types import Geometry


class Annealed(nn.Module):
    """A number that a run anneals: state of the run and not of the weights, so no state dict has it.

    It is a 0-dim buffer and no Python number, for which torch.compile would compile anew at each step. By its square,
    beside it, an average of several steps' buffers is told from a number that was set or copied. So it is set by
    :meth:`set_temperature` alone: a number that is written into the buffer is taken for an average.

    Attributes:
        rest: What it is once the annealing is over, and in evaluation of loaded weights.
        highest: The largest value it may have.
        lowest: The smallest.
        temperature: The number.
        square: Its square.
    """

    rest: ClassVar[float]
    lowest: ClassVar[float]
    highest: ClassVar[float]
    temperature: Tensor
    square: Tensor

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer(
            "temperature", torch.tensor(self.rest, dtype=torch.float32, device=device), persistent=False
        )
        self.register_buffer("square", torch.tensor(self.rest**2, dtype=torch.float32, device=device), persistent=False)

    @torch.jit.ignore
    @torch.no_grad()
    def set_temperature(self, value: float) -> None:
        """Sets the number, in place.

        Raises:
            ValueError: It is out of range.
        """
        if not self.lowest <= value <= self.highest:
            raise ValueError(
                f"a temperature of {value}, but {type(self).__name__} takes {self.lowest:g} to {self.highest:g}"
            )
        self.temperature.fill_(value)
        self.square.copy_(self.temperature.square())

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Sets the number to rest (timm's and Hugging Face's protocol for what lost its buffers)."""
        self.temperature.fill_(self.rest)
        self.square.fill_(self.rest**2)

    def train(self, mode: bool = True) -> "Annealed":
        """An average of several numbers (`AveragedModel(..., use_buffers=True)`) is none of the run's: it goes to rest.

        Its weights load at rest. Averages that copy buffers, or that are given the number, keep it.
        """
        if self._is_average():
            with torch.inference_mode(False):
                self.temperature = torch.full_like(self.temperature, self.rest)
                self.square = torch.full_like(self.square, self.rest**2)
        return super().train(mode)

    def _is_average(self) -> bool:
        if any(type(part) is not Tensor or part.is_meta for part in (self.temperature, self.square)):
            return False
        # The mean of squares is above the square of the mean; single precision rounds both.
        return not math.isclose(self.temperature.item() ** 2, self.square.item(), rel_tol=1e-6)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *rest: Any
    ) -> None:
        """Loads; what no state dict has leaves the meta device with the parameters, which assignment takes from it."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if local_metadata.get("assign_to_params_buffers") and self.temperature.is_meta:
            given = [value for name, value in state_dict.items() if name.startswith(prefix) and not value.is_meta]
            if given:
                self.temperature, self.square = (torch.empty((), device=given[0].device) for _ in range(2))
                self.init_non_persistent_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Annealed":
        """Moves the module; `to_empty` from the meta device leaves no number, nor does a cast round it."""
        before = self.temperature, self.square
        super()._apply(fn, recurse)
        for name, old, rest in zip(("temperature", "square"), before, (self.rest, self.rest**2), strict=True):
            new = getattr(self, name)
            is_lost = new.is_meta or old.is_meta
            setattr(self, name, torch.full_like(new, rest, dtype=torch.float32) if is_lost else old.to(new.device))
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Adds to pickles from before it was there the square of their number."""
        super().__setstate__(state)
        if "square" not in self._buffers:
            self.register_buffer("square", self.temperature.square(), persistent=False)


class Hidden(nn.Module):
    """The hidden layer relu(norm(F p)) of a pooled input p.

    Args:
        in_channels: Input channels Cin.
        reduction: Ratio of hidden to input channels; at least 16 are kept.
        norm_layer: Normalisation of the hidden (B, A, 1, 1) map. A BatchNorm that trains takes the running statistics
            for a batch of one, as KSM's.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(
        self,
        in_channels: int,
        reduction: float,
        norm_layer: str | Callable[..., nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if reduction <= 0:
            raise ValueError(f"reduction={reduction}, but it must be above 0")
        self.channels = max(int(in_channels * reduction), 16)
        self.fc = Projection(in_channels, self.channels, bias=False, device=device, dtype=dtype)
        norm = named_layer("norm_layer", norm_layer, get_norm_layer)(self.channels)
        self.norm = norm.to(device=device, dtype=dtype)
        draw_by_fan_out(self.fc)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the linear map, and sets the norm as it starts."""
        draw_by_fan_out(self.fc)
        if hasattr(self.norm, "reset_parameters"):
            self.norm.reset_parameters()

    def forward(self, pooled: Tensor) -> Tensor:
        """Takes (B, Cin) to (B, A)."""
        hidden = self.fc(pooled)[:, :, None, None]
        if torch.jit.is_scripting():
            hidden = self.norm(hidden)
        else:
            hidden = normalise(self.norm, hidden)
        return F.relu(hidden).flatten(1)


def draw_by_fan_out(projection: Projection) -> None:
    """Draws a weight from a normal distribution of variance 2 / fan_out, and sets the bias to zero."""
    nn.init.kaiming_normal_(projection.weight, mode="fan_out", nonlinearity="relu")
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


class Kernel(nn.Module):
    """A static convolution inside a dynamic one, without bias.

    Args:
        in_channels: Input channels.
        out_channels: Filters.
        kernel_size: (kh, kw).
        device: Device of the parameter.
        dtype: Dtype of the parameter, which is left to be set.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *kernel_size, device=device, dtype=dtype))

    def forward(self, x: Tensor, geometry: Geometry) -> Tensor:
        """Convolves x (B, Cin, H, W); the padding is the same on both sides."""
        left, _, top, _ = geometry.padding
        return F.conv2d(x, self.weight.to(x.dtype), None, geometry.stride, [top, left], geometry.dilation)
