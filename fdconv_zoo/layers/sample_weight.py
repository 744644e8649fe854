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
from .transform import Transform, row_blocks


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
        if size >= len(self.x):
            yield self
            return
        for start in range(0, len(self.x), size):
            rows = slice(start, start + size)
            batched = (None if tensor is None else tensor[rows] for tensor in self[:5])
            yield Inputs(*batched, self.spectrum, self.local_weight)


@dataclass
class SampleWeight:
    """The weights of a chunk of samples, and what the backward pass needs of the forward pass that made them.

    Attributes:
        gated: FDW's weight matrices (B, R, C) times the dense gate without its factor of 2.
        gate: The dense gate, kept for the backward pass, or None.
        taps: Its taps (B, kw*t, Cin*kw), or None.
    """

    gated: Tensor
    gate: Tensor | None
    taps: Tensor | None

    @classmethod
    def make(cls, inputs: Inputs, transform: Transform, bank: Tensor | None, keep: bool) -> "SampleWeight":
        """Makes the weights, in blocks of rows.

        Args:
            inputs: Those of the chunk.
            transform: That of the layer.
            bank: Weight matrix of each group (n, R, C) to mix instead of transforming the spectrum, or None.
            keep: Keeps what the backward pass needs.
        """
        bands, element, batch, columns = inputs.bands, inputs.element, len(inputs.bands), transform.columns
        if bank is None:
            gated = transform(bands)
        else:
            gated = (bands @ bank.flatten(1)).view(batch, -1, columns)
        if inputs.local_weight is None:
            return cls(gated, None, None)
        taps = channel_taps(inputs.local_input, inputs.local_weight.shape[2], columns // inputs.local_input.shape[1])
        filters = filters_of(inputs.local_weight, gated.shape[1], batch)
        gate = torch.empty_like(gated) if keep else None
        for block in row_blocks(gated, element.shape[1] // columns):
            part = torch.bmm(filters[:, block], taps).sigmoid_()
            gated[:, block].mul_(part)
            if keep:
                gate[:, block] = part
        return cls(gated, gate, taps)

    def backward(
        self,
        grad: Tensor,
        grad_element: Tensor | None,
        inputs: Inputs,
        transform: Transform,
        bank: Tensor | None,
        kernel_width: int,
        grad_source: Tensor | None,
        grad_filters: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Gradients of bands, element gate, scale and local input; the other two are added in place.

        Args:
            grad: Gradient (B, R, C) of the weight that convolves, over the scale. It is used up.
            grad_element: Gradient of the element gate where it gated the input, or None: it gated the weight.
            inputs: As for :meth:`make`.
            transform: As for :meth:`make`.
            bank: As for :meth:`make`.
            kernel_width: kw.
            grad_source: Gradient of the spectrum or the bank to add to, or None.
            grad_filters: Gradient of the local weight to add to, as (R, kw*t), or None.
        """
        bands, element = inputs.bands, inputs.element
        grad_scale = grad_local_input = None
        if element is not None:
            if grad_element is None:
                by_filter = grad.view(len(grad), -1, element.shape[1])
                products = by_filter * self.gated.view_as(by_filter)
                grad_element = torch.bmm(inputs.scale[:, None], products).squeeze(1)
                by_filter *= element[:, None]
            grad_scale, grad_taps = self._ungate(grad, inputs, grad_filters)
            grad_local_input = channel_taps_adjoint(grad_taps, kernel_width)
        if bank is None:
            grad_bands = transform.adjoint(grad, bands, grad_source)
        else:
            flat = grad.flatten(1)
            grad_bands = flat @ bank.flatten(1).mT
            if grad_source is not None:
                grad_source += (bands.mT @ flat).view_as(bank)
        return grad_bands, grad_element, grad_scale, grad_local_input

    def _ungate(self, grad: Tensor, inputs: Inputs, grad_filters: Tensor) -> tuple[Tensor, Tensor]:
        """Makes `grad` that of FDW's weight matrices, and returns the gradients of scale and taps."""
        batch, rows, columns = grad.shape
        kernel_height = rows // inputs.scale.shape[1]
        grad_scale, grad_taps = torch.empty_like(inputs.scale), torch.zeros_like(self.taps)
        row_scale = inputs.scale.repeat_interleave(kernel_height, dim=1).unsqueeze(2)
        scaled_filters = filters_of(inputs.local_weight, rows, batch) * row_scale
        for block in row_blocks(grad, kernel_height):
            part, gate, scale = grad[:, block], self.gate[:, block], row_scale[:, block]
            products = part * self.gated[:, block]
            outputs = slice(block.start // kernel_height, block.stop // kernel_height)
            grad_scale[:, outputs] = products.view(batch, -1, kernel_height * columns).sum(2)
            logits = products.addcmul_(products, gate, value=-1)  # the sigmoid's slope times its gradient over scale
            grad_filters[block].add_((torch.bmm(logits, self.taps.mT) * scale).sum(0))
            grad_taps += torch.bmm(scaled_filters[:, block].mT, logits)
            part.mul_(gate).mul_(scale)
        return grad_scale, grad_taps


def filters_of(local_weight: Tensor, rows: int, batch: int) -> Tensor:
    """The dense gate's convolution weight (Cout*kh*kw, 1, t) as the left-hand side (B, R, kw*t) of its product."""
    return local_weight.view(1, rows, -1).expand(batch, -1, -1)
