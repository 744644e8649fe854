"""What the arithmetic of FDConv is a function of, by name: tensors, geometry, and choices of how to compute.

Handed over whole, so that a new input has one place. Named tuples pass through torch.jit and torch.export.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..fourier import GainMap


class Gates(NamedTuple):
    """What KSM makes from a sample's pooled input (Sec. 3.2); without its gates of the weight, all but `bands` is None.

    Attributes:
        bands: Gain of each frequency group (B, n).
        channels: Gate of each input channel (B, Cin).
        filters: Gate of each filter (B, Cout).
        positions: Gate of each kernel position (B, kh*kw), None where the kernel has one.
        local_input: What the dense gate is made from, the normalised pooled input (B, Cin).
        local_weight: Convolution weight (Cout*kh*kw, 1, t) along its channels that makes the dense gate's logits.
    """

    bands: Tensor
    channels: Tensor | None
    filters: Tensor | None
    positions: Tensor | None
    local_input: Tensor | None
    local_weight: Tensor | None


class Spectrum(NamedTuple):
    """What FDW makes weights from (Sec. 3.1).

    Attributes:
        coefficients: Parseval-scaled half spectrum (R, C//2+1, 2), in the dtype of the parameters.
        gain_map: Which gain each coefficient takes.
        bank: The weights of each group (n, Cout*kh*kw, Cin) in the dtype to convolve in, or None; where it is given,
            the operators mix it instead of transforming each sample's spectrum.
        bank_version: Version of the coefficients that a kept bank was made from; it is not used where they changed.
            -1 for a bank that was made in this call.
    """

    coefficients: Tensor
    gain_map: GainMap
    bank: Tensor | None = None
    bank_version: int = -1


class Inputs(NamedTuple):
    """The tensors that a dynamic convolution is a function of.

    Attributes:
        x: Input (B, Cin, H, W) in the dtype to convolve in.
        gates: Gates of each sample, in the dtype of the spectrum.
        spectrum: The weight that all samples share.
    """

    x: Tensor
    gates: Gates
    spectrum: Spectrum


class Gradients(NamedTuple):
    """Gradients of :class:`Inputs`, None for those that are None or not needed.

    Attributes:
        x: Of the input.
        gates: Of the gates.
        coefficients: Of the spectrum.
        bank: Of the spectrum's bank.
    """

    x: Tensor | None
    gates: Gates
    coefficients: Tensor | None
    bank: Tensor | None = None


class Geometry(NamedTuple):
    """Geometry of a convolution.

    Attributes:
        kernel_size: (kh, kw).
        stride: Vertical and horizontal stride.
        padding: Zeros (left, right, top, bottom).
        dilation: Vertical and horizontal dilation.
    """

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    dilation: tuple[int, int]

    @classmethod
    def of(
        cls, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
    ) -> "Geometry":
        """From lists, which are what an operator is handed."""
        return cls(*map(tuple, (kernel_size, stride, padding, dilation)))

    def output_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the output of a map; below 1 where the padded map is smaller than the kernel."""
        (kh, kw), (down, right), (dh, dw) = self.kernel_size, self.stride, self.dilation
        left, far, top, bottom = self.padding
        rows = (height + top + bottom - dh * (kh - 1) - 1) // down + 1
        return rows, (width + left + far - dw * (kw - 1) - 1) // right + 1

    def checked_output_size(self, height: int, width: int) -> tuple[int, int]:
        """:meth:`output_size`, at least 1.

        Raises:
            ValueError: If the padded map is smaller than the kernel.
        """
        size = self.output_size(height, width)
        if min(size) < 1:
            raise ValueError(
                f"input of {height}, {width} pixels with padding {self.padding} (left, right, top, bottom) is less "
                f"than kernel {self.kernel_size}"
            )
        return size


class VolumeGeometry(NamedTuple):
    """Geometry of a convolution of volumes.

    Attributes:
        kernel_size: (kd, kh, kw).
        stride: Stride along depth, height and width.
        padding: Zeros (left, right, top, bottom, front, back).
        dilation: Dilation along depth, height and width.
    """

    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int, int, int, int]
    dilation: tuple[int, int, int]


class Limits(NamedTuple):
    """Sizes that steer how a kind of device computes, measured on it.

    Attributes:
        chunk: Weight elements of one chunk of samples. On a CPU the chunk should stay in the cache (L3), yet share
            Python's time among samples; elsewhere it should fill the device.
        bank: Largest bank of group weights (num_bands x weight) that is mixed instead of transforming each sample's
            spectrum.
        places: From this many output places a grouped convolution costs less than a matrix product; below, a
            convolution's preparations for weights that are new every time cost more.
        packed: Weight elements from which packing the spectrum pays for its small operations; None for never.
        block: Elements of a block of elementwise work, to stay in a core's cache; None for no blocks.
        matrix: Up to this many places a map's bands are gated by one matrix; low-passes of small maps are many tiny
            products.
    """

    chunk: int
    bank: int
    places: int
    packed: int | None
    block: int | None
    matrix: int


class Plan(NamedTuple):
    """How one call of the eager implementation computes.

    Attributes:
        channels_last: Memory format of the output and of the input's gradient.
        size: Height and width of the output.
        chunk: Samples of a chunk.
        use_bank: With more samples than groups, transform each group once and mix the results: it is linear.
        by_groups: Convolve by one grouped convolution instead of a matrix product.
        gate_input: Apply the element gate to the input's patches, where they are fewer than the weights.
        packed: Transform a packed spectrum of half the columns.
        block: Elements of a block of elementwise work, or None.
    """

    channels_last: bool
    size: tuple[int, int]
    chunk: int
    use_bank: bool
    by_groups: bool
    gate_input: bool
    packed: bool
    block: int | None

    @classmethod
    def make(cls, inputs: Inputs, geometry: Geometry, limits: Limits, channels_last: bool) -> "Plan":
        """Chooses by size.

        Args:
            inputs: Those of the call.
            geometry: Geometry of the convolution.
            limits: Those of the device.
            channels_last: Memory format of the layer's input.

        Raises:
            ValueError: If the padded input is smaller than the kernel.
        """
        x, coefficients, (batch, num_bands) = inputs.x, inputs.spectrum.coefficients, inputs.gates.bands.shape
        rows, columns = len(coefficients), x.shape[1] * geometry.kernel_size[1]
        size = geometry.checked_output_size(x.shape[2], x.shape[3])
        places, elements = size[0] * size[1], rows * columns
        chunk = max(1, limits.chunk // elements)
        by_groups = geometry.kernel_size != (1, 1) and places >= limits.places
        few_places = places * geometry.kernel_size[0] <= rows
        return cls(
            channels_last=channels_last,
            size=size,
            chunk=math.ceil(batch / math.ceil(batch / chunk)),  # chunks of one size
            use_bank=batch > num_bands and num_bands * elements <= limits.bank,
            by_groups=by_groups,
            gate_input=not by_groups and x.dtype == coefficients.dtype and few_places,
            packed=limits.packed is not None and columns % 2 == 0 and elements >= limits.packed,
            block=limits.block,
        )


def element_gate(gates: Gates, kernel_size: tuple[int, int]) -> Tensor | None:
    """Position times channel gate, in the layout of a filter's part of the weight matrix (B, kh*Cin*kw), or None."""
    channels, positions = gates.channels, gates.positions
    if channels is None or positions is None:
        return channels
    return (positions.view(-1, kernel_size[0], 1, kernel_size[1]) * channels[:, None, :, None]).flatten(1)
