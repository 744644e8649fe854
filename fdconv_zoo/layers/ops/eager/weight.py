"""The samples' weights, spectrum to gated weight, with a backward pass by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

All elementwise work is done in blocks of rows that stay in a CPU's cache.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Gates, Plan, Spectrum
from .transform import Transform, row_blocks


class Made(NamedTuple):
    """Weights, and what the backward pass needs of how they were made.

    Attributes:
        gated: FDW's weight matrices (B, R, C) times the dense gate without its factor of 2.
        gate: The dense gate (B, R, C), or None if there is none or it was not asked for.
    """

    gated: Tensor
    gate: Tensor | None

    def of(self, samples: slice) -> "Made":
        """Those of some samples."""
        return Made(self.gated[samples], None if self.gate is None else self.gate[samples])


def channel_taps(pooled: Tensor, num_taps: int, kernel_width: int) -> Tensor:
    """Neighbours of each channel (B, kw*t, Cin*kw), the right-hand side of the product for the dense gate's logits.

    Args:
        pooled: Normalised pooled input (B, Cin).
        num_taps: Taps t of the convolution along the channel axis, odd.
        kernel_width: kw. Each kernel column has filters of its own; zeros keep them apart.
    """
    batch, channels = pooled.shape
    neighbours = F.pad(pooled, (num_taps // 2, num_taps // 2)).unfold(1, channels, 1)
    taps = pooled.new_zeros(batch, kernel_width, num_taps, channels, kernel_width)
    taps.diagonal(dim1=1, dim2=4).copy_(neighbours.unsqueeze(-1))
    return taps.view(batch, kernel_width * num_taps, channels * kernel_width)


def channel_taps_adjoint(grad: Tensor, kernel_width: int) -> Tensor:
    """Gradient (B, Cin) of the input of :func:`channel_taps`, given that of its output (B, kw*t, Cin*kw)."""
    batch, rows, columns = grad.shape
    taps, channels = rows // kernel_width, columns // kernel_width
    grad = grad.view(batch, kernel_width, taps, channels, kernel_width).diagonal(dim1=1, dim2=4).sum(-1)
    padded = grad.new_zeros(batch, channels + taps - 1)
    for t in range(taps):
        padded[:, t : t + channels].add_(grad[:, t])
    return padded[:, taps // 2 : taps // 2 + channels].clone(memory_format=torch.contiguous_format)


@dataclass
class WeightGradients:
    """Gradients of what weights are made from; those of the batch are written sample by sample, the others summed.

    Attributes:
        bands: Of the gains (B, n).
        filters: Of the filter gate (B, Cout), or None.
        local_input: Of the dense gate's input (B, Cin), or None.
        local_weight: Of the dense gate's weight, as (R, kw*t), or None.
        coefficients: Of the spectrum (R, C//2+1, 2), or None.
        bank: Of the bank (n, R, C), from which that of the spectrum comes at the end, or None.
    """

    bands: Tensor
    filters: Tensor | None
    local_input: Tensor | None
    local_weight: Tensor | None
    coefficients: Tensor | None
    bank: Tensor | None


class SampleWeights:
    """Makes the weights of samples, a chunk at a time, and takes their gradients back.

    Args:
        gates: Gates of all samples.
        spectrum: Spectrum of the weight.
        kernel_size: (kh, kw).
        columns: Columns C of the weight matrix.
        plan: Plan of the call.
    """

    def __init__(
        self, gates: Gates, spectrum: Spectrum, kernel_size: tuple[int, int], columns: int, plan: Plan
    ) -> None:
        self.gates, self.plan, (self.kernel_height, self.kernel_width) = gates, plan, kernel_size
        self.transform = Transform(spectrum, columns, plan)
        self.filters = None
        if gates.local_weight is not None:
            self.filters = gates.local_weight.reshape(1, len(spectrum.coefficients), -1)

    @cached_property
    def group_gains(self) -> Tensor:
        """Gains (n, n) that pick one frequency group each."""
        coefficients = self.transform.spectrum.coefficients
        return torch.eye(self.gates.bands.shape[1], device=coefficients.device, dtype=coefficients.dtype)

    @cached_property
    def bank(self) -> Tensor:
        """Weight matrix (n, R, C) of each group, to be mixed instead of transforming each sample's spectrum."""
        return self.transform(self.group_gains)

    def _taps(self, samples: slice) -> Tensor | None:
        """:func:`channel_taps` of some samples, or None without a dense gate."""
        if self.filters is None:
            return None
        return channel_taps(self.gates.local_input[samples], self.gates.local_weight.shape[2], self.kernel_width)

    def make(self, samples: slice, keep_gate: bool, into: Made | None = None) -> Made:
        """Makes the weights of some samples, in blocks of rows.

        Args:
            samples: The samples.
            keep_gate: Return the dense gate too.
            into: Where to write what is made, or None for memory of their own.
        """
        bands, taps = self.gates.bands[samples], self._taps(samples)
        if self.plan.use_bank:
            gated = (bands @ self.bank.flatten(1)).view(len(bands), -1, self.transform.columns)
        else:
            gated = self.transform(bands)
        if taps is None:
            return Made(gated if into is None else into.gated.copy_(gated), None)
        filters = self.filters.expand(len(bands), -1, -1)
        if into is None:
            into = Made(gated, torch.empty_like(gated) if keep_gate else None)
        for block in row_blocks(gated, self.plan.block, self.kernel_height):
            part = torch.bmm(filters[:, block], taps).sigmoid_()
            torch.mul(gated[:, block], part, out=into.gated[:, block])
            if into.gate is not None:
                into.gate[:, block] = part
        return into

    def zero_gradients(self, need_spectrum: bool) -> WeightGradients:
        """Where :meth:`backward` writes and adds."""
        gates, coefficients = self.gates, self.transform.spectrum.coefficients
        has_gate = self.filters is not None
        return WeightGradients(
            bands=torch.empty_like(gates.bands),
            filters=torch.empty_like(gates.filters) if has_gate else None,
            local_input=torch.empty_like(gates.local_input) if has_gate else None,
            local_weight=torch.zeros_like(self.filters[0]) if has_gate else None,
            coefficients=torch.zeros_like(coefficients) if need_spectrum else None,
            bank=torch.zeros_like(self.bank) if need_spectrum and self.plan.use_bank else None,
        )

    def backward(self, samples: slice, made: Made, grad: Tensor, into: WeightGradients) -> None:
        """Takes back the gradients of some samples' weights.

        Args:
            samples: The samples.
            made: What :meth:`make` made of them, with the dense gate.
            grad: Gradient (B, R, C) of the weights over that of the filter gate and the dense gate's factor of 2, times
                the element gate. It is used up.
            into: Takes the gradients.
        """
        bands = self.gates.bands[samples]
        if made.gate is not None:
            into.filters[samples], grad_taps = self._ungate(samples, made, grad, into.local_weight)
            into.local_input[samples] = channel_taps_adjoint(grad_taps, self.kernel_width)
        if self.plan.use_bank:
            flat = grad.flatten(1)
            into.bands[samples] = flat @ self.bank.flatten(1).mT
            if into.bank is not None:
                into.bank += (bands.mT @ flat).view_as(self.bank)
        else:
            into.bands[samples] = self.transform.adjoint(grad, bands, into.coefficients)

    def finish(self, grads: WeightGradients) -> None:
        """Takes the gradient of the bank back to the spectrum, once all samples are through."""
        if grads.bank is not None:
            self.transform.adjoint(grads.bank, self.group_gains, grads.coefficients)

    def _ungate(self, samples: slice, made: Made, grad: Tensor, grad_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Makes `grad` that of FDW's weights, adds to `grad_weight`, returns gradients of filter gate and taps."""
        batch, _, columns = grad.shape
        taps, filter_gate = self._taps(samples), self.gates.filters[samples]
        grad_filters, grad_taps = torch.empty_like(filter_gate), torch.zeros_like(taps)
        # Of the dense gate without its factor of 2, which comes with the filter gate.
        row_scale = (2 * filter_gate).repeat_interleave(self.kernel_height, dim=1).unsqueeze(2)
        scaled_filters = self.filters.expand(batch, -1, -1) * row_scale
        for block in row_blocks(grad, self.plan.block, self.kernel_height):
            part, gate, scale = grad[:, block], made.gate[:, block], row_scale[:, block]
            products = part * made.gated[:, block]
            outputs = slice(block.start // self.kernel_height, block.stop // self.kernel_height)
            grad_filters[:, outputs] = products.view(batch, -1, self.kernel_height * columns).sum(2)
            logits = products.addcmul_(products, gate, value=-1)  # the sigmoid's slope times its gradient over scale
            grad_weight[block].add_((torch.bmm(logits, taps.mT) * scale).sum(0))
            grad_taps += torch.bmm(scaled_filters[:, block].mT, logits)
            part.mul_(gate).mul_(scale)
        return grad_filters.mul_(2), grad_taps
