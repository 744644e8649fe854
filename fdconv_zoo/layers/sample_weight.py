"""The weights of a chunk of samples in eager mode, spectrum to gated weight, with a backward pass by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

All elementwise work is done in blocks of rows that stay in a CPU's cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .ksm import channel_taps, channel_taps_adjoint
from .transform import adjoint_columns, adjoint_rows, row_blocks, transform_columns, transform_rows


class Inputs(NamedTuple):
    """The tensors that a dynamic convolution is a function of, or their gradients.

    Element gate, scale and the dense gate's tensors come together or not at all.

    Attributes:
        x: Input (B, Cin, H, W) in the dtype to convolve in.
        bands: Gain of each frequency group (B, n).
        element: Position times channel gate (B, kh*Cin*kw), or None.
        scale: Filter gate times the dense gate's factor of 2 (B, Cout), or None.
        local_input: Input of the dense gate (B, Cin), or None.
        spectrum: Parseval-scaled half spectrum (R, C//2+1, 2).
        local_weight: Convolution weight (Cout*kh*kw, 1, t) of the dense gate, or None.
    """

    x: Tensor
    bands: Tensor
    element: Tensor | None
    scale: Tensor | None
    local_input: Tensor | None
    spectrum: Tensor
    local_weight: Tensor | None

    def chunks(self, size: int) -> Iterator["Inputs"]:
        """Inputs of chunks of `size` samples."""
        for start in range(0, len(self.x), size):
            rows = slice(start, start + size)
            batched = (None if tensor is None else tensor[rows] for tensor in self[:5])
            yield Inputs(*batched, self.spectrum, self.local_weight)


@dataclass
class SampleWeight:
    """The weights of a chunk of samples, and what the backward pass needs of the forward pass that made them.

    Attributes:
        gated: FDW's weight matrices (B, R, C) times the dense gate without its factor of 2, and times the element gate
            where the dense gate is not kept.
        gate: The dense gate, kept for the backward pass, or None.
        taps: Its taps (B, kw*t, Cin*kw), or None.
    """

    gated: Tensor
    gate: Tensor | None
    taps: Tensor | None

    @classmethod
    def make(cls, inputs: Inputs, bank: Tensor | None, gain_index: Tensor, columns: int, keep: bool) -> "SampleWeight":
        """Makes the weights, in blocks of rows.

        Args:
            inputs: Those of the chunk.
            bank: Weight matrix of each group (n, R, C) to mix instead of transforming the spectrum, or None.
            gain_index: int32 map (R, C//2+1) of the coefficients' groups.
            columns: C.
            keep: Keeps what the backward pass needs; otherwise the element gate is applied too.
        """
        bands, element, batch = inputs.bands, inputs.element, len(inputs.bands)
        taps = gate = None
        kernel_height = 1
        if inputs.local_weight is not None:
            taps = channel_taps(
                inputs.local_input, inputs.local_weight.shape[2], columns // inputs.local_input.shape[1]
            )
            filters = filters_of(inputs.local_weight, len(gain_index), batch)
            kernel_height = element.shape[1] // columns
        if bank is None:
            lines = transform_rows(inputs.spectrum, bands, gain_index)
        gated = inputs.spectrum.new_empty(batch, len(gain_index), columns)
        if keep and taps is not None:
            gate = torch.empty_like(gated)
        for block in row_blocks(gated, kernel_height):
            if bank is None:
                plain = transform_columns(lines[:, block], columns)
            else:
                plain = (bands @ bank[:, block].flatten(1)).view(batch, -1, columns)
            if taps is None:
                gated[:, block] = plain
                continue
            part = torch.bmm(filters[:, block], taps).sigmoid_()
            if keep:
                gate[:, block] = part
            else:
                part.view(batch, -1, element.shape[1]).mul_(element[:, None])
            torch.mul(part, plain, out=gated[:, block])
        return cls(gated, gate, taps)

    def backward(
        self,
        grad: Tensor,
        inputs: Inputs,
        bank: Tensor | None,
        gain_index: Tensor,
        kernel_width: int,
        grad_source: Tensor | None,
        grad_filters: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of bands, element gate, scale and local input; the other two are added in place.

        Args:
            grad: Gradient (B, R, C) of the weight that convolves, scale[o] * gated[o, k] * element[k], over scale and
                element.
            inputs: As for :meth:`make`.
            bank: As for :meth:`make`.
            gain_index: As for :meth:`make`.
            kernel_width: kw.
            grad_source: Gradient of the spectrum or the bank to add to, or None.
            grad_filters: Gradient of the local weight to add to, as (R, kw*t), or None.
        """
        bands, element, scale, spectrum = inputs.bands, inputs.element, inputs.scale, inputs.spectrum
        batch, kernel_height = len(bands), 1
        grad_bands, grad_element, grad_scale, grad_taps = torch.zeros_like(bands), None, None, None
        if scale is not None:
            kernel_height = element.shape[1] // grad.shape[2]
            grad_element, grad_scale = torch.zeros_like(element), torch.empty_like(scale)
            filters = filters_of(inputs.local_weight, len(gain_index), batch)
            grad_taps = torch.zeros_like(self.taps)
        if bank is None:
            lines = spectrum.new_empty(*grad.shape[:2], spectrum.shape[1], dtype=spectrum.dtype.to_complex())
        for block in row_blocks(grad, kernel_height):
            part = grad[:, block]
            if scale is not None:
                outputs = slice(block.start // kernel_height, block.stop // kernel_height)
                products = (part * self.gated[:, block]).view(batch, -1, element.shape[1])
                grad_scale[:, outputs] = torch.bmm(products, element[:, :, None]).squeeze(2)
                grad_element += torch.bmm(scale[:, None, outputs], products).squeeze(1)
                part = (part.view_as(products) * scale[:, outputs, None]).mul_(element[:, None]).view_as(part)
                gate = self.gate[:, block]
                logits = torch.rsub(gate, 1).mul_(self.gated[:, block]).mul_(part)
                grad_filters[block] += torch.bmm(logits, self.taps.mT).sum(0)
                grad_taps += torch.bmm(filters[:, block].mT, logits)
                part = part * gate
            if bank is None:
                lines[:, block] = adjoint_columns(part)
                continue
            flat = part.flatten(1)
            grad_bands += flat @ bank[:, block].flatten(1).mT
            if grad_source is not None:
                grad_source[:, block] += (bands.mT @ flat).view_as(bank[:, block])
        if bank is None:
            grad_bands = adjoint_rows(lines, spectrum, bands, gain_index, grad_source)
        grad_local_input = None if grad_taps is None else channel_taps_adjoint(grad_taps, kernel_width)
        return grad_bands, grad_element, grad_scale, grad_local_input


def filters_of(local_weight: Tensor, rows: int, batch: int) -> Tensor:
    """The dense gate's convolution weight (Cout*kh*kw, 1, t) as the left-hand side (B, R, kw*t) of its product."""
    return local_weight.view(1, rows, -1).expand(batch, -1, -1)
