"""FDConv1d: frequency dynamic convolution of sequences, that of maps one pixel wide."""

from timm.layers import register_notrace_module
from torch import Tensor, nn

from .fbm import FBM1d
from .fdconvnd import FDConvNd
from .ops.types import Geometry


@register_notrace_module
class FDConv1d(FDConvNd):
    """Frequency dynamic convolution, in place of nn.Conv1d: :class:`FDConv2d` with a kernel of k by 1.

    FBM gates the bands of the sequence by convolutions of 3. Arguments are those of :class:`FDConvNd`.

    Shape:
        (B, Cin, L) to (B, Cout, Lout) as nn.Conv1d; the dtype is that of the input.
    """

    static_class = nn.Conv1d
    fbm_class = FBM1d

    def _compute(self, x: Tensor, by_kernels: bool) -> Tensor:
        """Convolves x (B, Cin, L) with a weight of its own for each sample."""
        self._check_input(x)
        return self._convolve(x.unsqueeze(-1), False, by_kernels).squeeze(-1)

    def _geometry(self) -> Geometry:
        before, after = self.pads[0], self.pads[1]
        return Geometry(self.kernel_shape, (self.stride[0], 1), (0, 0, before, after), (self.dilation[0], 1))

    @property
    def static_shape(self) -> tuple[int, int, int]:
        """Shape (Cout, Cin, k) of the static weight."""
        return self.out_channels, self.in_channels, self.kernel_size[0]
