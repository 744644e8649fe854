"""The static weight of an FDConv layer, to look at: what `layer.weight` is.

An FDConv layer makes a weight for each sample; the weight where every gate is 1 is only a part of what it computes.
Code written for nn.Conv2d reads `weight` for its shape or its norm, which is right here too, but also to build a new
static layer from it (fused BatchNorm, merged branches, torch's fast path of a transformer), which would drop FDConv
without a word. A :class:`StaticWeight` can tell the two apart.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .base import parametrised_error
from .fourier import from_spectrum, matrix_to_weight, weight_to_matrix

# Answered from the tensor itself, without the transform that makes its numbers.
_METADATA = {
    "shape", "size", "dim", "ndim", "ndimension", "numel", "nelement", "stride", "element_size", "itemsize", "nbytes",
    "layout", "dtype", "device", "get_device", "requires_grad", "grad_fn", "names", "is_contiguous",
    "is_floating_point", "is_complex", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized", "is_nested",
    "__len__", "__hash__",
}  # fmt: skip
# What shares its memory with the weight, and what keeps every filter's numbers in its row besides.
_ALIASES = {"detach", "data", "view", "reshape", "view_as", "reshape_as", "flatten", "contiguous", "to"}
_SAME = _ALIASES | {"clone", "type", "float", "double", "half", "bfloat16", "cpu", "cuda"}
_PRODUCTS = {"mul", "multiply", "mul_", "multiply_"}
_QUOTIENTS = {"div", "divide", "true_divide", "div_", "divide_", "true_divide_"}
_MATMULS = {"mm", "matmul"}


class StaticWeight(Tensor):
    """The static weight, shaped as that of nn.Conv2d or nn.Linear, without memory of its own.

    - Shape, device and dtype cost nothing. Numbers made from it alone (norms, statistics, numpy) are those of the
      static weight, and have its gradient.
    - Scaled filter by filter it may be assigned to `layer.weight`: the layer then scales its output so, which is how
      BatchNorm is absorbed exactly (torch.nn.utils.fuse_conv_bn_eval, ultralytics' fuse).
    - Filling it with numbers (torch.nn.init) fills the static weight, and its `requires_grad` is that of the spectrum.
    - It is no leaf, so that no optimiser takes it, and `grad` is computed from the spectrum's, to look at.
    - Anything else that would take it for the layer's whole weight is refused.

    Args:
        layer: The FDConv layer.
        made: What was computed from the static weight, or None for the weight itself.
        scale: Factor of each filter (Cout,) by which `made` differs from the weight; None if it differs otherwise.
        alias: Whether what is written to `made` is written to the weight, as torch would.
        viewed: The numbers of the whole weight that `made` is a part of, or in another order: it can't be written to.

    Raises:
        RuntimeError: On anything else; it says what to call instead.
    """

    @staticmethod
    def __new__(
        cls: type["StaticWeight"],
        layer: nn.Module,
        made: Tensor | None = None,
        scale: Tensor | None = None,
        alias: bool = True,
        viewed: Tensor | None = None,
    ) -> "StaticWeight":
        like, shape = (layer.fdw.spectrum, layer.static_shape) if made is None else (made, made.shape)
        return Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )

    def __init__(
        self,
        layer: nn.Module,
        made: Tensor | None = None,
        scale: Tensor | None = None,
        alias: bool = True,
        viewed: Tensor | None = None,
    ) -> None:
        self.layer = layer
        self.made = made
        self.scale = scale
        self.alias = alias
        self.viewed = viewed

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name, is_setter = _name(func)
        if name in _METADATA and not is_setter:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        weight = next(leaf for leaf in tensors if isinstance(leaf, cls))
        if name == "is_leaf":
            return False
        if name == "grad" and not is_setter:
            return None if weight.made is not None else weight.layer.static_gradient()
        if is_setter or name == "requires_grad_":
            return weight._set(name, args[1] if len(args) > 1 else True)
        others = [leaf for leaf in tensors if leaf is not weight]
        scale = weight._scaled(name, args, others[0]) if len(others) == 1 else None
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
            return weight._write(func, args, kwargs, scale, bool(others))
        if isinstance(kwargs.get("out"), cls):
            raise weight._refusal(f"{name} with out=")
        values = weight._values()
        args, kwargs = tree_map(
            lambda leaf: values if leaf is weight else leaf._values() if isinstance(leaf, cls) else leaf, (args, kwargs)
        )
        result = func(*args, **kwargs)
        if hasattr(result, "setflags"):  # numpy's array, of a copy
            result.setflags(write=False)
        if scale is not None:
            return cls(weight.layer, result, scale, alias=False)
        if name.endswith("_like") or name.startswith("new_"):
            return result
        if others and any(_is_real(leaf) for leaf in tree_leaves(result)):
            raise weight._refusal(name)
        return tree_map(lambda leaf: weight._keep(name, leaf, values), result)

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Whatever came past __torch_function__."""
        weight = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, cls))
        raise weight._refusal(str(func))

    def _refusal(self, name: str) -> RuntimeError:
        return RuntimeError(
            f"{name} on the static weight of a {type(self.layer).__name__}: a static layer made from it would drop "
            "FDConv, of which it is only the part where every gate is 1. layer.absorb_batch_norm(norm) absorbs "
            "BatchNorm, layer.static_twin() makes a static layer, layer.set_static(weight, bias) sets this weight"
        )

    def _values(self) -> Tensor:
        """The numbers, an ordinary tensor."""
        return self.layer.static_weight() if self.made is None else self.made

    def _keep(self, name: str, leaf: Any, values: Tensor) -> Any:
        """What a function of the weight alone returns: as it is where it is no weight any more."""
        if not _is_real(leaf):
            return leaf
        viewed = self.viewed
        if viewed is None and self.alias and name not in _ALIASES and _shares_memory(leaf, values):
            viewed = values
        if leaf.dim() <= 1 and leaf.numel() < self.numel():
            # Numbers to look at, which may meet any other tensor.
            return leaf if viewed is None or not _shares_memory(leaf, viewed) else leaf.as_subclass(StaticPart)
        same = name in _SAME and len(leaf) == self.layer.static_shape[0] and leaf.numel() == self.numel()
        scale = self._scale_so_far() if same and viewed is None else None
        return StaticWeight(self.layer, leaf, scale, self.alias and name in _ALIASES and viewed is None, viewed)

    def _scale_so_far(self) -> Tensor | None:
        if self.made is not None:
            return self.scale
        return torch.ones(self.layer.static_shape[0], device=self.device, dtype=self.dtype)

    def _scaled(self, name: str, args: tuple[Any, ...], factor: Tensor) -> Tensor | None:
        """Factor of each filter (Cout,) after a function of the weight and `factor`, if it only scales filters."""
        so_far, filters = self._scale_so_far(), self.layer.static_shape[0]
        if so_far is None or isinstance(factor, StaticWeight):
            return None
        if name in _MATMULS and args[1] is self and self.dim() == 2 and factor.shape == (filters, filters):
            diagonal = factor.diagonal()  # older versions of ultralytics scale so
            return so_far * diagonal if torch.equal(factor, torch.diag(diagonal)) else None
        if factor.dim() != self.dim() or factor.numel() != len(factor) or len(factor) not in (1, filters):
            return None
        if name in _PRODUCTS:
            return so_far * factor.flatten()
        return so_far / factor.flatten() if name in _QUOTIENTS and args[0] is self else None

    def _set(self, name: str, value: Any) -> "StaticWeight":
        if name in ("requires_grad", "requires_grad_"):
            if self.made is None:
                self.layer.fdw.spectrum.requires_grad_(value)
        elif name == "data" and self.made is None:
            self.layer.weight = value
        else:
            raise self._refusal(f"setting {name}")
        return self

    def _write(
        self, func: Callable[..., Any], args: Any, kwargs: Any, scale: Tensor | None, has_others: bool
    ) -> "StaticWeight":
        """Scales filters, or fills the weight with numbers (torch.nn.init)."""
        if (args[0] if args else next(iter(kwargs.values()))) is not self or (has_others and scale is None):
            raise self._refusal(_name(func)[0])
        if self.viewed is not None and _shares_memory(self.made, self.viewed):
            raise self._refusal(f"{_name(func)[0]} on a part or a reordered view, which would be lost,")
        made = self._values().detach().clone()
        args, kwargs = tree_map(lambda leaf: made if leaf is self else leaf, (args, kwargs))
        func(*args, **kwargs)
        if not self.alias:
            self.scale = scale
        elif scale is not None:
            self.layer.weight = StaticWeight(self.layer, made, scale / self._scale_so_far())
        else:
            self.layer.fill_static(made.view(self.layer.static_shape))
        if self.made is not None:
            self.made = made
        return self


def _name(func: Callable[..., Any]) -> tuple[str, bool]:
    """Name of a function or attribute of torch's, and whether it sets that attribute."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        return getattr(func.__self__, "__name__", ""), name != "__get__"
    return name, False


def _is_real(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (RuntimeError, NotImplementedError):  # torch.func's tensors have no storage
        return False


class _ToLookAt(Tensor):
    """Numbers computed for a reader, who can't write to what they were computed from."""

    _refusal: ClassVar[str]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, is_setter = _name(func)
        writes = is_setter or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        if writes and (not args or isinstance(args[0], _ToLookAt)):
            raise RuntimeError(f"{name} on {cls._refusal}")
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class StaticPart(_ToLookAt):
    """A few numbers of a static weight.

    Raises:
        RuntimeError: Where it is written to.
    """

    _refusal = (
        "a few numbers of a static weight, which are computed and would be lost: layer.set_static(weight, bias) sets it"
    )


class StaticGradient(_ToLookAt):
    """The gradient with respect to a static weight, computed from the spectrum's: to look at, not to clip or to zero.

    Raises:
        RuntimeError: Where it is written to.
    """

    _refusal = (
        "the gradient of a static weight, which is computed from layer.fdw.spectrum.grad: write to that, as the "
        "optimiser of model.parameters() does"
    )


class HasStaticWeight(nn.Module):
    """The static weight of an FDConv layer, and BatchNorm absorbed into its filters.

    A BatchNorm that follows scales whole filters. A scaled spectrum would not do: its groups are gated across filters.

    Attributes:
        filter_scale: Factor of each filter (Cout,) from absorbed BatchNorm, or None.
    """

    __jit_unused_properties__ = ("weight",)
    filter_scale: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("filter_scale", None)

    @property
    def weight(self) -> StaticWeight:
        """The static weight, to look at."""
        return StaticWeight(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "weight":
            super().__setattr__(name, value)
        elif isinstance(value, StaticWeight) and value.layer is self and value.scale is not None:
            self._scale_filters(value.scale)
        else:
            raise RuntimeError(
                f"{type(self).__name__}.weight can be assigned itself, its filters scaled, and nothing else: "
                "layer.set_static(weight, bias) sets the static weight and bias"
            )

    @torch.jit.ignore
    def static_weight(self) -> Tensor:
        """What the layer computes with where every gate is 1, shaped as the weight of nn.Conv2d or nn.Linear."""
        weight = matrix_to_weight(self.fdw.matrix(), self.kernel_shape).view(self.static_shape)
        if self.filter_scale is None:
            return weight
        return weight * self.filter_scale.view(-1, *[1] * (weight.dim() - 1))

    @torch.jit.ignore
    @torch.no_grad()
    def static_gradient(self) -> StaticGradient | None:
        """Gradient with respect to the static weight, in its shape, or None before the spectrum has one.

        The spectrum is an isometry of the weight (Parseval), and so is the one gradient of the other.
        """
        if self.fdw.spectrum.grad is None:
            return None
        matrix = from_spectrum(self.fdw.spectrum.grad, self.fdw.columns)
        gradient = matrix_to_weight(matrix, self.kernel_shape).view(self.static_shape)
        if self.filter_scale is not None:
            gradient = gradient / self.filter_scale.view(-1, *[1] * (gradient.dim() - 1))
        return gradient.as_subclass(StaticGradient)

    @torch.jit.ignore
    @torch.no_grad()
    def fill_static(self, weight: Tensor) -> None:
        """Takes over a static weight, shaped as that of nn.Conv2d or nn.Linear; bias and gates stay."""
        if not self.takes_shape(weight.shape):
            raise ValueError(f"a static weight of shape {list(weight.shape)} instead of {list(self.static_shape)}")
        if not isinstance(self.fdw.spectrum, nn.Parameter):
            raise parametrised_error("fdw.spectrum")
        self.fdw.set_matrix(weight_to_matrix(weight.reshape(*self.static_shape[:2], *self.kernel_shape)))
        self.filter_scale = None

    @torch.jit.ignore
    @torch.no_grad()
    def absorb_batch_norm(self, norm: nn.Module) -> None:
        """Takes over a BatchNorm that follows the layer, in eval mode: its scale and shift become the layer's.

        Args:
            norm: A BatchNorm of Cout channels.

        Raises:
            ValueError: If `norm` is in training mode, or has no statistics or other channels.
        """
        mean, variance, filters = norm.running_mean, norm.running_var, self.static_shape[0]
        if norm.training or mean is None or len(mean) != filters:
            raise ValueError(f"{norm} must be in eval mode, with statistics of {filters} channels")
        scale = (variance + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        shift = ((0 if self.bias is None else self.bias) - mean) * scale
        if norm.bias is not None:
            shift = shift + norm.bias
        self.bias = nn.Parameter(shift.to(self.fdw.spectrum.dtype), requires_grad=self.fdw.spectrum.requires_grad)
        self._scale_filters(scale)

    @torch.no_grad()
    def _scale_filters(self, scale: Tensor) -> None:
        scale = scale.to(self.fdw.spectrum.dtype, copy=True)
        self.filter_scale = scale if self.filter_scale is None else self.filter_scale * scale

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Pickles from before these were there.
        self._buffers.setdefault("filter_scale", None)
        if "band_options" not in self.__dict__:
            self._modules.setdefault("band_options", None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A state dict says whether BatchNorm was absorbed."""
        saved = state_dict.get(f"{prefix}filter_scale")
        if saved is None and f"{prefix}fdw.spectrum" in state_dict:
            self.filter_scale = None
        elif saved is not None and self.filter_scale is None:
            self.filter_scale = torch.empty_like(saved, device=self.fdw.spectrum.device)
        super()._load_from_state_dict(state_dict, prefix, *args)
