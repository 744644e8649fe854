"""FDConv3d: frequency dynamic convolution of volumes, in plain operations."""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from .fbm import FBM3d
from .fdconvnd import FDConvNd
from .ops import dynamic_conv3d
from .ops.types import Inputs, VolumeGeometry


@register_notrace_module
class FDConv3d(FDConvNd):
    """Frequency dynamic convolution, in place of nn.Conv3d. The paper has none: this is our reading of it for volumes.

    The weight matrix has Cout*kd rows and Cin*kh*kw columns; FBM's bands are boxes of three sides, its gates made by
    convolutions of 3x3x3. Arguments are those of :class:`FDConvNd`. Weights are kept for the backward pass.

    Shape:
        (B, Cin, D, H, W) to (B, Cout, Dout, Hout, Wout) as nn.Conv3d; the dtype is that of the input.
    """

    static_class = nn.Conv3d
    fbm_class = FBM3d
    reads_bank = False

    def _compute(self, x: Tensor, by_kernels: bool) -> Tensor:
        """Convolves x (B, Cin, D, H, W) with a weight of its own for each sample."""
        self._check_input(x)
        return self._convolve(x, False, by_kernels)

    def _convolve(self, x: Tensor, channels_last: bool, by_kernels: bool) -> Tensor:
        spectrum = self.fdw()
        gates = self._gates(x, [2, 3, 4], spectrum, by_kernels)
        if self.fbm is not None:
            x = self.fbm(x)
        geometry = VolumeGeometry(self.kernel_size, self.stride, self.pads, self.dilation)
        out = dynamic_conv3d(Inputs(x, gates, spectrum), geometry)
        scale, bias = self.filter_scale, self.bias
        if scale is not None:
            out = out * scale.to(out.dtype)[:, None, None, None]
        return out if bias is None else out + bias.to(out.dtype)[:, None, None, None]

    @property
    def static_shape(self) -> tuple[int, int, int, int, int]:
        """Shape (Cout, Cin, kd, kh, kw) of the static weight."""
        kd, kh, kw = self.kernel_size
        return self.out_channels, self.in_channels, kd, kh, kw
