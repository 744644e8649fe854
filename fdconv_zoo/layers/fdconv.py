"""FDConv2d and FDLinear: frequency dynamic convolution in place of nn.Conv2d and nn.Linear.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

FDW makes a weight for each sample, KSM gates its elements, FBM gates the frequency bands of the input. A layer made
from a static one computes the same function until it is trained.
"""

from collections.abc import Callable
from operator import attrgetter
from typing import Any, ClassVar

import torch
from timm.layers import register_notrace_module, to_2tuple
from timm.models.metaformer import StarReLU
from torch import Tensor, nn

from .band_options import BandOptions
from .base import DynamicConvolution, DynamicLayer, parametrised_error
from .fbm import FBM
from .fdw import FDW, GainMaps
from .fourier import to_spectrum, weight_to_matrix
from .ksm import KSM
from .layout import to_channels_last
from .ops import dynamic_conv2d
from .ops.types import Gates, Geometry, Inputs, Spectrum
from .options import check_types, refuse_official_names
from .padding import explicit_pads
from .static_weight import HasStaticWeight

# Parameters that are zero where every gate is 1.
ZERO_AT_REST = ("ksm.heads.weight", "ksm.heads.bias", "ksm.local_conv.weight", "fbm.weight", "fbm.bias")


class _FDLayer(HasStaticWeight, DynamicLayer):
    """What FDConv2d and FDLinear share: FDW, KSM and FBM, and the convolution of a (B, Cin, H, W) map with them.

    They set `stride`, `dilation` and `pads`, the zeros (left, right, top, bottom).

    Attributes:
        fbm_class: FBM of their maps.
    """

    method = "FDConv"
    held = ("fdw.spectrum", "bias")
    tied: ClassVar[dict[str, str]] = {"weight": "fdw.spectrum", "bias": "bias"}
    unset: ClassVar[dict[str, Any]] = {"init_weights": False}
    fbm_class: ClassVar[type[FBM]] = FBM
    fused: bool = True  # of pickles from before it was there

    @property
    def reads_bank(self) -> bool:
        """Whether a GPU's kernels would read a kept bank of it."""
        return self.fused

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Python's own error would not tell our name of it.
        refuse_official_names(cls.__name__, kwargs)
        return super().__new__(cls)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        *,
        bias: bool,
        num_bands: int,
        reduction: float,
        cutoffs: tuple[float, ...],
        mask_grid: int | None,
        has_options: bool,
        ksm: bool,
        fbm: bool,
        norm_layer: str | Callable[..., nn.Module],
        act_layer: str | Callable[..., nn.Module],
        recompute: bool,
        fused: bool,
        init_weights: bool,
        gain_maps: GainMaps | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        check_types(num_bands, reduction, cutoffs, mask_grid)
        if min(in_channels, out_channels, *kernel_size) < 1 or reduction <= 0:
            raise ValueError(
                f"{in_channels} to {out_channels} channels, kernel_size={kernel_size}, reduction={reduction}, but all "
                "must be above 0"
            )
        self.kernel_shape = kernel_size
        self.recompute = recompute
        self.fused = fused
        factory = {"device": device, "dtype": dtype}
        self.fdw = FDW(
            rows=out_channels * kernel_size[0],
            columns=in_channels * kernel_size[1],
            num_bands=num_bands,
            official_order=mask_grid is not None,
            kernel_size=kernel_size,
            init_weights=init_weights,
            gain_maps=gain_maps,
            **factory,
        )
        self.ksm = KSM(
            in_channels,
            out_channels,
            kernel_size,
            num_bands=num_bands,
            reduction=reduction,
            modulate_weight=ksm,
            norm_layer=norm_layer,
            act_layer=act_layer,
            **factory,
        )
        has_bands = fbm and kernel_size != (1, 1)
        self.fbm = self.fbm_class(in_channels, cutoffs, mask_grid, fused=fused, **factory) if has_bands else None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_channels, **factory)) if bias else None)
        self.band_options = BandOptions(self.fdw, self.fbm, device) if has_options else None
        if init_weights:
            self._reset_bias()

    @torch.jit.ignore
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialises the static weight and the bias as nn.Conv2d and nn.Linear do, and every gate at 1."""
        self._check_gates()
        self.fdw.reset_parameters()
        self.filter_scale = None
        self._reset_bias()
        self.reset_modulation()

    @torch.no_grad()
    def _reset_bias(self) -> None:
        if self.bias is not None:
            bound = self.fdw.fan_in**-0.5
            self.bias.uniform_(-bound, bound)

    @torch.jit.ignore
    def reset_modulation(self) -> None:
        """Sets every gate back to 1: the layer computes its static weight's function again.

        Raises:
            ValueError: A parametrization or a pruning makes what must be zero for that.
        """
        self._check_gates()
        self.ksm.reset_parameters()
        if self.fbm is not None:
            self.fbm.reset_parameters()

    def _check_gates(self) -> None:
        # By the objects, not by names, which wrappers of a part (torch.compile, checkpoint_wrapper) change.
        computed = [
            name for name in ZERO_AT_REST
            if attrgetter(name.rpartition(".")[0])(self) is not None
            and not isinstance(attrgetter(name)(self), nn.Parameter)
        ]  # fmt: skip
        if computed:
            raise parametrised_error(", ".join(computed))

    @torch.jit.ignore
    def start_from_scratch(self) -> None:
        """Leaves the layer as it is: the paper draws the static weight as any, with every gate at 1."""

    @torch.jit.ignore
    def static_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """The spectrum of a static weight, shaped as that of nn.Conv2d or nn.Linear, the bias, and gates of 1."""
        matrix = weight_to_matrix(weight.reshape(*self.static_shape[:2], *self.kernel_shape))
        state = {"fdw.spectrum": to_spectrum(matrix)}
        state |= {name: torch.zeros_like(p) for name, p in self.named_parameters() if name in ZERO_AT_REST}
        return state if bias is None else {**state, "bias": bias}

    @torch.jit.ignore
    @torch.no_grad()
    def set_static(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes over the static weight, shaped as that of nn.Conv2d or nn.Linear, and bias; every gate is set to 1.

        Raises:
            ValueError: On a weight of another shape, a bias for a layer without one, none for one with, or gates that a
                parametrization or a pruning makes.
        """
        self._check_gates()
        if (bias is None) != (self.bias is None):
            given = "None" if bias is None else "a tensor"
            raise ValueError(f"a bias that is {given}, but the layer has bias={self.bias is not None}")
        self.fill_static(weight)
        if self.bias is not None:
            self.bias.copy_(bias)
        self.reset_modulation()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Tells FDW of pickles from before it knew the kernel."""
        super().__setstate__(state)
        self.fdw.kernel_size = self.kernel_shape

    def _geometry(self) -> Geometry:
        return Geometry(self.kernel_shape, self.stride, self.pads, self.dilation)

    def _gates(self, x: Tensor, places: list[int], spectrum: Spectrum, by_kernels: bool) -> Gates:
        """Gates of each sample of x, whose mean is that over the dimensions `places`."""
        exact_dtype = torch.promote_types(spectrum.coefficients.dtype, torch.float32)
        if not torch.jit.is_scripting() and x.shape[0] > 0 and 0 in x.shape[2:]:
            return self._gates_of_nothing(x, exact_dtype)
        return self.ksm(x.mean(places, dtype=exact_dtype), by_kernels and self.fused)

    @torch.jit.unused
    def _gates_of_nothing(self, x: Tensor, dtype: torch.dtype) -> Gates:
        """Gates of samples that have no place and so no mean: no statistics are to be made of them."""
        norm = self.ksm.norm
        mode = norm.training
        norm.eval()
        try:
            return self.ksm(x.new_zeros(x.shape[0], x.shape[1], dtype=dtype))
        finally:
            norm.train(mode)

    def _convolve(self, x: Tensor, channels_last: bool, by_kernels: bool) -> Tensor:
        geometry, spectrum = self._geometry(), self.fdw()
        gates = self._gates(x, [2, 3], spectrum, by_kernels)
        if self.fbm is not None:
            x = self.fbm(x)
        inputs, scale, bias = Inputs(x, gates, spectrum), self.filter_scale, self.bias
        if scale is None:
            return dynamic_conv2d(inputs, geometry, bias, channels_last, self.recompute, self.fused)
        out = dynamic_conv2d(inputs, geometry, None, channels_last, self.recompute, self.fused)
        out = out * scale.to(out.dtype)[:, None, None]
        return out if bias is None else out + bias.to(out.dtype)[:, None, None]


@register_notrace_module  # sizes steer how it computes: a leaf of FX graphs
class FDConv2d(_FDLayer, DynamicConvolution):
    """Frequency dynamic convolution, in place of nn.Conv2d.

    Args:
        in_channels: Input channels Cin.
        out_channels: Filters Cout.
        kernel_size: Height and width, or one number for both.
        stride: Vertical and horizontal stride, or one number for both.
        padding: Zeros above/below and left/right, one number for both, "same" or "valid".
        dilation: Vertical and horizontal dilation, or one number for both.
        groups: Only 1 is possible.
        bias: Adds a learnt bias.
        num_bands: Frequency groups n of the FDW.
        reduction: Ratio of KSM's hidden channels to Cin; at least 16 are kept.
        cutoffs: FBM's band limits in cycles per pixel, falling. Used where the kernel is larger than 1.
        mask_grid: None for the paper's band masks; 64 for checkpoints trained with the official code: its masks, and
            its order of coefficients of equal radius.
        ksm: False leaves out the gates of KSM and keeps the gains of the frequency groups.
        fbm: False leaves out FBM.
        norm_layer: Normalisation in KSM, or timm's name of it. BatchNorm takes its running statistics for a batch of
            one in training.
        act_layer: Activation in KSM, or timm's name of it.
        recompute: Makes each sample's weight again in the backward pass instead of keeping it.
        fused: False computes on a GPU as elsewhere, with PyTorch's operations instead of Triton's kernels.
        init_weights: False leaves static weight and bias to be set.
        gain_maps: Gain maps of other layers, to copy this one's from or to add it to: a map takes long to make.
        device: Device of the parameters.
        dtype: Dtype of the parameters; spectra are computed in float32 at least.

    Shape:
        (B, Cin, H, W) to (B, Cout, Hout, Wout) as nn.Conv2d; the dtype is that of the input.

    Raises:
        ValueError: On groups other than 1, a `num_bands` or `cutoffs` out of range, or an input of the wrong shape.
        TypeError: On an option that is no number where one is wanted, or the official code's `kernel_num`.
    """

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
        num_bands: int = 64,
        reduction: float = 1 / 16,
        cutoffs: tuple[float, ...] = (1 / 4, 1 / 8, 1 / 16),
        mask_grid: int | None = None,
        ksm: bool = True,
        fbm: bool = True,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: str | Callable[..., nn.Module] = StarReLU,
        recompute: bool = True,
        fused: bool = True,
        init_weights: bool = True,
        gain_maps: GainMaps | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if groups != 1:
            raise ValueError(f"groups={groups}, but FDConv2d has one weight matrix for all channels: only groups=1")
        super().__init__(
            in_channels,
            out_channels,
            to_2tuple(kernel_size),
            bias=bias,
            num_bands=num_bands,
            reduction=reduction,
            cutoffs=cutoffs,
            mask_grid=mask_grid,
            has_options=True,
            ksm=ksm,
            fbm=fbm,
            norm_layer=norm_layer,
            act_layer=act_layer,
            recompute=recompute,
            fused=fused,
            init_weights=init_weights,
            gain_maps=gain_maps,
            device=device,
            dtype=dtype,
        )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = to_2tuple(kernel_size)
        self.stride = to_2tuple(stride)
        self.padding = padding if isinstance(padding, str) else to_2tuple(padding)
        self.dilation = to_2tuple(dilation)
        self.groups = groups
        self.pads = explicit_pads(self.padding, self.kernel_size, self.stride, self.dilation)

    def _compute(self, x: Tensor, by_kernels: bool) -> Tensor:
        """Convolves x (B, Cin, H, W) with a weight of its own for each sample."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"input of shape {list(x.shape)}, but FDConv2d takes (B, {self.in_channels}, H, W)")
        if not x.is_floating_point():
            raise ValueError(f"input of dtype {x.dtype}, but FDConv2d takes floating-point numbers")
        # As is_channels_last tells it, without its call in each layer's pass.
        channels_last = x.stride(1) == 1 and not x.is_contiguous()
        out = self._convolve(x, channels_last, by_kernels)
        return to_channels_last(out) if channels_last else out

    @property
    def static_shape(self) -> tuple[int, int, int, int]:
        """Shape (Cout, Cin, kh, kw) of the static weight."""
        return self.out_channels, self.in_channels, self.kernel_size[0], self.kernel_size[1]


@register_notrace_module
class FDLinear(_FDLayer):
    """Frequency dynamic linear layer, in place of nn.Linear: a 1x1 :class:`FDConv2d` on channels-last input.

    It pools over all tokens of a sample, masked and later ones too: not for causal or sequence-first blocks, nor for
    padded text. Packed tokens (T, Cin) are T samples of one token, with a weight for each: give (1, T, Cin).

    Args:
        in_features: Input channels Cin.
        out_features: Output channels Cout.
        bias: Adds a learnt bias.
        num_bands: Frequency groups n of the FDW.
        reduction: Ratio of KSM's hidden channels to Cin; at least 16 are kept.
        ksm: False leaves out the gates of KSM and keeps the gains of the frequency groups.
        norm_layer: Normalisation in KSM, or timm's name of it. BatchNorm takes its running statistics for a batch of
            one in training.
        act_layer: Activation in KSM, or timm's name of it.
        recompute: Makes each sample's weight again in the backward pass instead of keeping it.
        fused: False computes on a GPU as elsewhere, with PyTorch's operations instead of Triton's kernels.
        init_weights: False leaves static weight and bias to be set.
        gain_maps: Gain maps of other layers, to copy this one's from or to add it to: a map takes long to make.
        device: Device of the parameters.
        dtype: Dtype of the parameters; spectra are computed in float32 at least.

    Shape:
        (B, ..., Cin) to (B, ..., Cout): one weight for each of the B samples, from the mean over all middle dimensions.

    Raises:
        ValueError: On a `num_bands` out of range, or an input of the wrong shape.
        TypeError: As for :class:`FDConv2d`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_bands: int = 64,
        reduction: float = 1 / 16,
        ksm: bool = True,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        act_layer: str | Callable[..., nn.Module] = StarReLU,
        recompute: bool = True,
        fused: bool = True,
        init_weights: bool = True,
        gain_maps: GainMaps | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            (1, 1),
            bias=bias,
            num_bands=num_bands,
            reduction=reduction,
            cutoffs=(),
            mask_grid=None,
            has_options=False,
            ksm=ksm,
            fbm=False,
            norm_layer=norm_layer,
            act_layer=act_layer,
            recompute=recompute,
            fused=fused,
            init_weights=init_weights,
            gain_maps=gain_maps,
            device=device,
            dtype=dtype,
        )
        self.in_features = in_features
        self.out_features = out_features
        self.stride = self.dilation = (1, 1)
        self.pads = (0, 0, 0, 0)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, weights_follow: bool = False, **kwargs: Any) -> "FDLinear":
        """Layer that computes the same function as `linear`, on its device, in its dtype and training mode.

        Args:
            linear: Source layer, unchanged.
            weights_follow: As for FDConv2d.from_conv.
            **kwargs: Keyword arguments of FDLinear.

        Raises:
            ValueError: If `linear` is of a subclass, or has a computed weight.
        """
        if type(linear) is not nn.Linear:
            raise ValueError(
                f"{type(linear).__name__} may compute something else than nn.Linear, which alone is converted"
            )
        layer = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            init_weights=False,
            device=None if linear.weight.is_meta else linear.weight.device,
            dtype=linear.weight.dtype,
            **kwargs,
        )
        layer._adopt(linear, weights_follow)
        return layer.train(linear.training)

    def _compute(self, x: Tensor, by_kernels: bool) -> Tensor:
        """Multiplies x (B, ..., Cin) by a weight of its own for each sample."""
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"input of shape {list(x.shape)}, but FDLinear takes (B, ..., {self.in_features})")
        if not x.is_floating_point():
            raise ValueError(f"input of dtype {x.dtype}, but FDLinear takes floating-point numbers")
        tokens = (x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)).transpose(1, 2).unsqueeze(-1)
        out = self._convolve(tokens, True, by_kernels)
        return out.squeeze(-1).transpose(1, 2).reshape(list(x.shape[:-1]) + [self.out_features]).contiguous()

    @property
    def static_shape(self) -> tuple[int, int]:
        """Shape (Cout, Cin) of the static weight."""
        return self.out_features, self.in_features

    @torch.jit.ignore
    def static_twin(self) -> nn.Linear:
        """nn.Linear with the weight and bias that this layer has where every gate is 1."""
        linear = nn.Linear(
            self.in_features, self.out_features,
            bias=self.bias is not None, device=self.fdw.spectrum.device, dtype=self.fdw.spectrum.dtype,
        )  # fmt: skip
        return self._copy_static_to(linear)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
