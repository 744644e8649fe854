"""What all layers of this package share, FDConv's and those it is compared with: from and to the static layer."""

import math
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
from timm.layers import to_ntuple
from torch import Tensor, nn

from .ops import Entry
from .padding import explicit_pads

# Of a convolution, what may be set later.
GEOMETRY = ("stride", "padding", "dilation")


class DynamicLayer(Entry):
    """A layer that makes a weight for each sample, in place of a static layer.

    The static weight is what it computes with where its modulation is at rest. A layer made from a static one is so and
    computes the same function until it is trained.

    Attributes:
        method: Name of the method, for people.
        held: Names of the parameters that hold the static weight and the static bias.
        tied: Of those, by the static layer's name, the ones that other layers may share as they may share the static.
    """

    method: ClassVar[str]
    held: ClassVar[tuple[str, str]]
    tied: ClassVar[dict[str, str]] = {}
    # torch.ao's eager quantisation leaves what has none, and the parts of it.
    qconfig: ClassVar[None] = None

    @torch.jit.ignore
    def static_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """State, by key, in which the layer computes what the static layer of this weight and bias does.

        Keys that it lacks may have any value, or those of a new layer. Without bias only what the weight decides.
        """
        raise NotImplementedError

    @torch.jit.ignore
    def takes_shape(self, shape: Sequence[int]) -> bool:
        """Whether a static weight may have this shape: a pointwise convolution takes a linear layer's, and in turn."""
        expected = self.static_shape
        return (*shape, *[1] * (5 - len(shape))) == (*expected, *[1] * (5 - len(expected)))

    @torch.jit.ignore
    def put_static(
        self, state: dict[str, Tensor], prefixes: Mapping[nn.Module, str], weight: Tensor, bias: Tensor | None
    ) -> None:
        """Adds the static state to a model's state dict, which wins where it has a key already.

        Args:
            state: State dict of the model.
            prefixes: Of the keys of each layer in it.
            weight: As for :meth:`static_state`.
            bias: As for :meth:`static_state`.
        """
        for key, value in self.static_state(weight, bias).items():
            state.setdefault(f"{prefixes[self]}{key}", value)

    @torch.jit.ignore
    def static_weight(self) -> Tensor:
        """What the layer computes with where its modulation is at rest, shaped as the static layer's weight."""
        raise NotImplementedError

    @torch.jit.ignore
    def static_bias(self) -> Tensor | None:
        """The bias (Cout,) where the modulation is at rest, or None."""
        return self.bias

    @torch.jit.ignore
    def reset_modulation(self) -> None:
        """Sets the modulation back to rest: the layer computes its static weight's function again."""
        raise NotImplementedError

    @torch.jit.ignore
    @torch.no_grad()
    def set_static(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes over the static weight and bias, shaped as the static layer's; the modulation is set to rest.

        Raises:
            ValueError: On a weight of another shape, a bias for a layer without one, none for one with, or a
                parametrised weight.
        """
        if (bias is None) != (self.static_bias() is None):
            given = "None" if bias is None else "a tensor"
            raise ValueError(f"a bias that is {given}, but the layer has bias={self.static_bias() is not None}")
        if not self.takes_shape(weight.shape):
            raise ValueError(f"a static weight of shape {list(weight.shape)} instead of {list(self.static_shape)}")
        weight = weight.reshape(self.static_shape)
        own, state = self.state_dict(keep_vars=True), self.static_state(weight, bias)
        parametrised = [key for key in state if key not in own]
        if not isinstance(self.holder(), nn.Parameter):
            parametrised.append(self.held[0])
        if parametrised:
            raise parametrised_error(", ".join(dict.fromkeys(parametrised)))
        for key, value in state.items():
            own[key].copy_(value)

    @torch.jit.ignore
    @torch.no_grad()
    def start_from_scratch(self) -> None:
        """Draws the layer as its paper does; the static weight that it has was drawn as the static model draws it."""
        self.reset_parameters()

    @torch.jit.ignore
    def holder(self) -> Tensor:
        """The parameter that holds the static weight, or what a parametrization makes of others in its place."""
        return attrgetter(self.held[0])(self)

    @torch.jit.ignore
    def modulation(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters that the static layer has no counterpart of."""
        held = tuple(f"{name}." for name in self.held)
        for name, parameter in self.named_parameters():
            # What a parametrization makes a held parameter of is no modulation either.
            if not f"{name.replace('parametrizations.', '')}.".startswith(held):
                yield name, parameter

    @torch.jit.ignore
    @torch.no_grad()
    def expect_weights(self) -> None:
        """Leaves the static weight and bias to be loaded, NaN until then; the modulation is set to rest."""
        for name in self.held:
            held = attrgetter(name)(self)
            if held is not None:
                held.fill_(math.nan)
        self.reset_modulation()

    @torch.jit.ignore
    def expects_weights(self) -> bool:
        """Whether nothing has been loaded since :meth:`expect_weights`."""
        return not self.holder().is_meta and bool(self.holder().flatten()[0].isnan())

    def _adopt(self, static: nn.Module, weights_follow: bool = False) -> None:
        if computed := computed_reason(static):
            raise ValueError(f"{type(static).__name__} stays static: {computed}")
        # Parameters on the meta device may have been put there one by one, by accelerate, which wants buffers real.
        if static.weight.is_meta and not next(self.parameters()).is_meta:
            self.to("meta")
        if weights_follow:
            self.expect_weights()
        else:
            self.set_static(static.weight, static.bias)
        holders = dict(zip(self.held, (static.weight, static.bias), strict=True))
        for name, parameter in self.named_parameters():
            if name in holders:
                parameter.requires_grad_(holders[name].requires_grad)
                # Such as what says to an optimiser that a parameter does not decay.
                marks = {key: mark for key, mark in vars(holders[name]).items() if not isinstance(mark, Tensor)}
                vars(parameter).update(marks)

    @torch.no_grad()
    def _copy_static_to(self, twin: nn.Module) -> Any:
        twin.weight.copy_(self.static_weight()).requires_grad_(self.holder().requires_grad)
        if twin.bias is not None:
            twin.bias.copy_(self.static_bias()).requires_grad_(attrgetter(self.held[1])(self).requires_grad)
        return twin.train(self.training)


def parametrised_error(names: str) -> ValueError:
    """What to raise where parameters of these names can't be set."""
    return ValueError(
        f"{names} is made by a parametrization or a hook, which would undo what is set: remove it first "
        "(torch.nn.utils.parametrize.remove_parametrizations, prune.remove, remove_weight_norm)"
    )


def computed_reason(layer: nn.Module) -> str:
    """What a layer's weight is computed from by a hook, which leaves an old one there; or an empty string."""
    if "weight" in layer._parameters or hasattr(layer, "parametrizations"):
        return ""
    sources = ", ".join(layer._parameters) or "nothing"
    return f"its weight is computed from {sources} by a hook (weight_norm, spectral_norm, pruning)"


class DynamicConvolution(DynamicLayer):
    """A dynamic convolution; it has what the static one has, `in_channels` to `groups`.

    Attributes:
        static_class: The static convolution.
        unset: Keyword arguments that leave the static weight to be set.
    """

    static_class: ClassVar[type[nn.Module]] = nn.Conv2d
    unset: ClassVar[dict[str, Any]] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        """Follows a stride, padding or dilation that is set later, a number for all dimensions or one for each."""
        if name not in GEOMETRY:
            super().__setattr__(name, value)
            return
        dims = len(self.kernel_size)
        if not isinstance(value, str):
            value = to_ntuple(dims)(value)
            if len(value) != dims:
                raise ValueError(f"{name}={value}, but it is one number, or {dims}")
        if "pads" in self.__dict__:
            geometry = {each: getattr(self, each) for each in GEOMETRY} | {name: value}
            super().__setattr__("pads", explicit_pads(kernel_size=self.kernel_size, **geometry))
        super().__setattr__(name, value)

    @classmethod
    def from_conv(cls, conv: nn.Module, *, weights_follow: bool = False, **kwargs: Any) -> Any:
        """Layer that computes the same function as `conv`, on its device, in its dtype and training mode.

        Args:
            conv: Source layer, unchanged.
            weights_follow: The conv's weight and bias are not taken over: others are loaded next (NaN until then).
            **kwargs: Keyword arguments of this class.

        Raises:
            ValueError: If `conv` is of another class, has a computed weight, pads with something other than zeros, or
                can't be of this kind.
        """
        if type(conv) is not cls.static_class:
            raise ValueError(
                f"{type(conv).__name__} may compute something else than nn.{cls.static_class.__name__}, which alone is "
                f"converted to {cls.__name__}"
            )
        if conv.padding_mode != "zeros":
            raise ValueError(f"padding_mode={conv.padding_mode!r}, but {cls.__name__} pads with zeros only")
        layer = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            stride=conv.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            bias=conv.bias is not None,
            device=None if conv.weight.is_meta else conv.weight.device,
            dtype=conv.weight.dtype,
            **cls.unset,
            **kwargs,
        )
        layer._adopt(conv, weights_follow)
        return layer.train(conv.training)

    @torch.jit.ignore
    def static_twin(self) -> nn.Module:
        """Static convolution with the weight and bias that this layer has where its modulation is at rest."""
        conv = self.static_class(
            self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, dilation=self.dilation,
            groups=self.groups, bias=self.static_bias() is not None, device=self.holder().device,
            dtype=self.holder().dtype,
        )  # fmt: skip
        return self._copy_static_to(conv)

    def extra_repr(self) -> str:
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.static_bias() is not None}"
        )
