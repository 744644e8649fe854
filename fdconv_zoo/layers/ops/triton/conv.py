"""The dynamic convolution on a GPU: a bank of weights, kernels, and a backward pass by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A sample's gated weight is written once and read once, in the dtype of the convolution. Where there is no bank, each
sample's spectrum is transformed, and the transform's weights are read instead of mixed.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..eager.limits import OTHER
from ..eager.transform import Transform
from ..types import Gates, Geometry, Gradients, Inputs, Plan
from .product import convolve, grad_input, grad_weight
from .weight import gated_weights, ungate

# Weight elements of the samples that are convolved at once: mixed from a bank, or transformed with some copies.
MIXED, TRANSFORMED = 1 << 28, 1 << 26
# Gates that each sample has of its own.
PER_SAMPLE = tuple(name for name in Gates._fields if name != "local_weight")


class Sources:
    """Where the samples' weights come from: the bank, or each sample's transform.

    Args:
        inputs: Those of the call.
        geometry: Geometry of the convolution.
    """

    def __init__(self, inputs: Inputs, geometry: Geometry) -> None:
        self.bank, self.gates = inputs.spectrum.bank, inputs.gates
        self.kernel_size = geometry.kernel_size
        self.columns = inputs.x.shape[1] * geometry.kernel_size[1]
        plan = Plan.make(inputs, geometry, OTHER, channels_last=False)
        self.transform = Transform(inputs.spectrum, self.columns, plan)

    def chunks(self) -> Iterator[slice]:
        """Slices of the batch."""
        elements = len(self.transform.spectrum.coefficients) * self.columns
        batch = len(self.gates.bands)
        most = max(1, (TRANSFORMED if self.bank is None else MIXED) // elements)
        step = math.ceil(batch / math.ceil(batch / most))  # chunks of one size
        return (slice(start, min(start + step, batch)) for start in range(0, batch, step))

    def of(self, samples: slice) -> Tensor:
        """The bank (n, Cout*kh*kw, Cin), or FDW's weights of samples (B, R, C)."""
        return self.transform(self.gates.bands[samples]) if self.bank is None else self.bank

    def gated(self, source: Tensor, gates: Gates, dtype: torch.dtype) -> Tensor:
        """Gated weights (B, Cout, kh*kw, Cin) of samples, given what :meth:`of` gives for them and their gates."""
        from_bank = self.bank is not None
        return gated_weights(source, **gates._asdict(), kernel_size=self.kernel_size, from_bank=from_bank, dtype=dtype)


def join(parts: list[Tensor]) -> Tensor:
    """Parts of a batch in one; a single part is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def gates_of(gates: Gates, samples: slice) -> Gates:
    """Gates of samples, laid out as the kernels read them."""
    own = {name: gate[samples] for name in PER_SAMPLE if (gate := getattr(gates, name)) is not None}
    # Columns are adjacent to the kernels; those of a slice of KSM's heads are.
    chosen = gates._replace(**{name: gate if gate.stride(1) == 1 else gate.contiguous() for name, gate in own.items()})
    if chosen.local_input is None:
        return chosen
    return chosen._replace(local_input=chosen.local_input.contiguous(), local_weight=chosen.local_weight.contiguous())


def forward(
    inputs: Inputs, geometry: Geometry, bias: Tensor | None, channels_last: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Convolves each sample with its weight (Eq. 4-7).

    Args:
        inputs: The input, its gates and the spectrum of the weight, or the bank of it.
        geometry: Geometry of the convolution, its padding the same on both sides.
        bias: Bias (Cout,), or None.
        channels_last: Memory format of the output.
        keep: Keep the weights for the backward pass.

    Returns:
        Output (B, Cout, Hout, Wout), and the weights (B, Cout, kh*kw, Cin) if they are kept.

    Raises:
        ValueError: If the padded input is smaller than the kernel.
    """
    sources = Sources(inputs, geometry)
    outputs, kept = [], []
    for samples in sources.chunks():
        gates, source = gates_of(inputs.gates, samples), sources.of(samples)
        weights = sources.gated(source, gates, inputs.x.dtype)
        outputs.append(convolve(inputs.x[samples], weights, bias, **geometry._asdict(), channels_last=channels_last))
        if keep:
            kept.append(weights)
        del weights  # the next ones would be made beside them
    return join(outputs), join(kept) if keep else None


def backward(
    inputs: Inputs,
    geometry: Geometry,
    grad: Tensor,
    kept: Tensor | None,
    channels_last: bool,
    need_x: bool,
    need_spectrum: bool,
) -> Gradients:
    """Gradients of :func:`forward`.

    Args:
        inputs: Those of the forward pass.
        geometry: That of the forward pass.
        grad: Gradient of the output.
        kept: Weights that the forward pass kept, or None to make them again.
        channels_last: Memory format of the input's gradient.
        need_x: Compute the gradient of the input.
        need_spectrum: Compute the gradient of the spectrum, or of the bank where there is one.
    """
    x, gates, spectrum = inputs
    kernel_size = geometry.kernel_size
    sources = Sources(inputs, geometry)
    bank = sources.bank
    grad_spectrum = torch.zeros_like(spectrum.coefficients) if need_spectrum and bank is None else None
    parts: list[Gates] = []
    grad_x: list[Tensor] = []
    for samples in sources.chunks():
        chosen, source = gates_of(gates, samples), sources.of(samples)
        maps, slope = x[samples], grad[samples]
        if need_x:
            if kept is not None:
                weights = kept[samples]
            else:
                weights = sources.gated(source, chosen, x.dtype)
            grad_x.append(grad_input(slope, weights, maps, **geometry._asdict(), channels_last=channels_last))
            del weights
        grad_gated = grad_weight(slope, maps, **geometry._asdict())
        if chosen.local_input is None:
            grad_mixed = grad_gated.flatten(1, 2).to(source.dtype)
            if bank is None:
                by_row = grad_mixed.unflatten(1, (-1, *kernel_size)).transpose(3, 4)
                grad_mixed = by_row.reshape(len(by_row), -1, sources.columns)
            part = Gates(None, None, None, None, None, None)
        else:
            grad_mixed, part = grad_of_gates(grad_gated, source, chosen, kernel_size, bank is not None)
        del grad_gated
        if bank is None:
            grad_bands = sources.transform.adjoint(grad_mixed, chosen.bands, grad_spectrum)
        else:
            grad_bands = grad_of_gains(grad_mixed, bank)
            if need_spectrum:
                factors = chosen.bands.mT.to(bank.dtype), grad_mixed.flatten(1)
                if grad_spectrum is None:
                    grad_spectrum = torch.mm(*factors).view_as(bank)
                else:
                    grad_spectrum.flatten(1).addmm_(*factors)
        parts.append(part._replace(bands=grad_bands))
    given = (name for name in PER_SAMPLE if getattr(parts[0], name) is not None)
    per_sample = {name: join([getattr(part, name) for part in parts]) for name in given}
    local_weight = None if parts[0].local_weight is None else sum(part.local_weight for part in parts)
    return Gradients(
        x=join(grad_x) if need_x else None,
        gates=parts[0]._replace(**per_sample, local_weight=local_weight),
        coefficients=grad_spectrum if bank is None else None,
        bank=None if bank is None else grad_spectrum,
    )


def grad_of_gates(
    grad: Tensor, source: Tensor, gates: Gates, kernel_size: tuple[int, int], from_bank: bool
) -> tuple[Tensor, Gates]:
    """Gradients of FDW's weights, and of the gates but those of the bands, given that of the gated weights.

    Args:
        grad: Gradient (B, Cout, kh*kw, Cin) of the gated weights.
        source: The bank, or FDW's weights.
        gates: Gates of the samples.
        kernel_size: (kh, kw).
        from_bank: Whether `source` is the bank.
    """
    batch, num_filters, positions, channels = grad.shape
    grad_mixed, grad_logits, row_sums, channel_sums = ungate(
        grad, source, **gates._asdict(), kernel_size=kernel_size, from_bank=from_bank
    )
    by_row = row_sums.sum(0).view(batch, num_filters, positions)
    taps = gates.local_weight.shape[2]
    reach = taps // 2
    padded = torch.nn.functional.pad(gates.local_input.to(grad.dtype), (reach, reach))
    grad_local = torch.bmm(grad_logits, padded.unfold(1, taps, 1)).sum(0, dtype=torch.float32)
    # Channel c feeds the logits of channels c - reach ... c + reach, by taps in reverse: sums along a diagonal.
    reversed_taps = gates.local_weight.squeeze(1).flip(1).mT.to(grad.dtype)
    by_tap = torch.bmm(reversed_taps.expand(batch, -1, -1), grad_logits).float()
    padded = torch.nn.functional.pad(by_tap, (reach, reach))
    width = padded.shape[2]
    diagonals = padded.as_strided((batch, taps, channels), (taps * width, width + 1, 1))
    return grad_mixed, Gates(
        bands=None,
        channels=channel_sums.sum(0),
        filters=by_row.squeeze(2) if gates.positions is None else (by_row * gates.positions[:, None]).sum(2),
        positions=None if gates.positions is None else torch.bmm(gates.filters[:, None], by_row).squeeze(1),
        local_input=diagonals.sum(1),
        local_weight=grad_local.view_as(gates.local_weight),
    )


def grad_of_gains(grad: Tensor, bank: Tensor) -> Tensor:
    """Gradient of the gains (B, n) in float32, given that of FDW's weights (B, Q, Cin) and the bank (n, Q, Cin).

    A product for each row, so that they fill the device: one product would sum millions in few programs.
    """
    return torch.bmm(grad.transpose(0, 1), bank.permute(1, 2, 0)).sum(0, dtype=torch.float32)
