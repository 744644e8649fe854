"""The dynamic convolution: chunks of samples, each sample with a weight of its own, and a backward pass by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A sample's weight is as large as the layer, so a batch of weights is not kept unless the plan says so: samples pass
through in chunks of bounded size, and the backward pass makes the weights again. Weights are matrices (B, R, C) with
R = Cout*kh and C = Cin*kw, as the Fourier transform yields them.
"""

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Gates, Geometry, Gradients, Inputs, Limits, Plan, element_gate
from .weight import Made, SampleWeights


def symmetric_padding(geometry: Geometry) -> tuple[int, int]:
    """Zeros above and below, and left and right, of a geometry whose padding is the same on both sides."""
    return geometry.padding[2], geometry.padding[0]


class SampleConv:
    """Convolves the samples of a chunk with weights of their own, in the layout of the weight matrix.

    Args:
        x: Input (B, Cin, H, W).
        element: Element gate (B, kh*Cin*kw), or None.
        geometry: Geometry of the convolution, its padding the same on both sides.
        plan: Plan of the call.
    """

    def __init__(self, x: Tensor, element: Tensor | None, geometry: Geometry, plan: Plan) -> None:
        self.x, self.element, self.geometry, self.plan = x, element, geometry, plan
        self.patches = self.operand = None
        if plan.by_groups:
            return
        (kh, kw), (top, left), (down, right) = geometry.kernel_size, symmetric_padding(geometry), geometry.stride
        padded = F.pad(x, geometry.padding) if top + left > 0 else x
        if (kh, kw) == (1, 1):
            patches = padded[:, :, ::down, ::right]
        else:
            # One view, copied once: a kernel's place is as far from the next one as dilation times a pixel.
            samples, channels, rows, columns = padded.stride()
            strides = samples, rows * geometry.dilation[0], channels, columns * geometry.dilation[1]
            patches = padded.as_strided(
                (len(x), kh, x.shape[1], kw, *plan.size), (*strides, rows * down, columns * right)
            )
        self.patches = patches.reshape(len(x), -1, plan.size[0] * plan.size[1])
        self.operand = self.patches * element[:, :, None] if plan.gate_input and element is not None else self.patches

    def _gated(self, weight: Tensor) -> Tensor:
        """Weight matrices (B, R, C) times the element gate where it does not gate the input, in the input's dtype."""
        if self.element is not None and not self.plan.gate_input:
            by_filter = weight.view(len(weight), -1, self.element.shape[1])
            weight = (by_filter * self.element[:, None]).view_as(weight)
        return weight.to(self.x.dtype)

    def _groups(self, maps: Tensor) -> Tensor:
        """Maps (B, C, H, W) as the groups of one sample."""
        return maps.reshape(1, -1, *maps.shape[2:])

    def _kernels(self, weight: Tensor) -> Tensor:
        """Weight matrices (B, R, C) as the kernels (B*Cout, Cin, kh, kw) of a grouped convolution."""
        kh, kw = self.geometry.kernel_size
        kernels = weight.view(len(weight), -1, kh, weight.shape[2] // kw, kw)
        return torch.stack(kernels.unbind(2), dim=3).flatten(0, 1)

    def _gradients(self, grad: Tensor, kernels: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        """Gradients of input and kernels of the grouped convolution, as far as they are wanted."""
        return torch.ops.aten.convolution_backward(
            self._groups(grad),
            self._groups(self.x),
            kernels,
            bias_sizes=None,
            stride=self.geometry.stride,
            padding=symmetric_padding(self.geometry),
            dilation=self.geometry.dilation,
            transposed=False,
            output_padding=(0, 0),
            groups=len(self.x),
            output_mask=(*wanted, False),
        )[:2]

    def forward(self, weight: Tensor, scale: Tensor | None, out: Tensor) -> None:
        """Convolves and scales.

        Args:
            weight: Weight matrices (B, R, C) before the element gate.
            scale: Factor of each filter (B, Cout) in the input's dtype, or None.
            out: Takes the output (B, Cout, Hout, Wout).
        """
        batch, weight = len(self.x), self._gated(weight)
        if self.operand is None:
            padding = symmetric_padding(self.geometry)
            result = F.conv2d(
                self._groups(self.x), self._kernels(weight), None, self.geometry.stride, padding,
                dilation=self.geometry.dilation, groups=batch,
            ).view_as(out)  # fmt: skip
            if scale is None:
                out.copy_(result)
            else:
                torch.mul(result, scale[:, :, None, None], out=out)
            return
        kernels, places = weight.view(batch, -1, self.operand.shape[1]), out.flatten(2)
        scale_weight = scale is not None and kernels.shape[2] < places.shape[2]
        if scale_weight:
            kernels = kernels * scale[:, :, None]
        if self.plan.channels_last:
            torch.bmm(self.operand.mT, kernels.mT, out=places.mT)
        else:
            torch.bmm(kernels, self.operand, out=places)
        if scale is not None and not scale_weight:
            places.mul_(scale[:, :, None])

    def grad_weight(self, grad: Tensor, rows: int) -> Tensor:
        """Gradient of the gated weight matrices (B, R, C), given R and that of the output."""
        batch, (kh, kw) = len(self.x), self.geometry.kernel_size
        if self.operand is None:
            shape = (batch * rows // kh, self.x.shape[1], kh, kw)
            kernels = self._gradients(grad, grad.new_empty(1).expand(shape), (False, True))[1]
            return kernels.view(batch, -1, *shape[1:]).transpose(2, 3).reshape(batch, rows, -1).contiguous()
        return torch.bmm(grad.flatten(2), self.operand.mT).view(batch, rows, -1)

    def grad_input(self, grad: Tensor, weight: Tensor, need_x: bool) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the input (B, Cin, H, W), if needed, and of its gate, if it is gated.

        Args:
            grad: Gradient of the output times the scale.
            weight: Weight matrices (B, R, C) before the element gate.
            need_x: Compute that of the input.
        """
        weight = self._gated(weight)
        if self.operand is None:
            return self._gradients(grad, self._kernels(weight), (True, False))[0].view_as(self.x), None
        kernels = weight.view(len(weight), -1, self.operand.shape[1])
        if self.plan.channels_last:
            patches = torch.bmm(grad.flatten(2).mT, kernels).mT
        else:
            patches = torch.bmm(kernels.mT, grad.flatten(2))
        if self.element is None or not self.plan.gate_input:
            return self._fold(patches), None
        grad_x = self._fold(patches * self.element[:, :, None]) if need_x else None
        return grad_x, (patches * self.patches).sum(2)

    def grad_element(self, grad: Tensor, gated: Tensor, scale: Tensor) -> Tensor:
        """Gradient of an element gate that gated the weight, in whose gradient it is then taken into account in place.

        Args:
            grad: :meth:`grad_weight`.
            gated: Weight matrices (B, R, C) before the element gate.
            scale: Factor of each filter (B, Cout).
        """
        by_filter = grad.view(len(grad), -1, self.element.shape[1])
        products = by_filter * gated.view_as(by_filter)
        by_filter *= self.element[:, None]
        return torch.bmm(scale[:, None], products).squeeze(1)

    def _fold(self, patches: Tensor) -> Tensor:
        """Adjoint of taking patches: sums (B, kh*Cin*kw, Hout*Wout) into (B, Cin, H, W)."""
        (kh, kw), (top, left) = self.geometry.kernel_size, symmetric_padding(self.geometry)
        stride, dilation, size = self.geometry.stride, self.geometry.dilation, self.plan.size
        if (kh, kw, top, left, *stride) == (1, 1, 0, 0, 1, 1):
            return patches.unflatten(2, size)
        patches = patches.reshape(len(self.x), kh, -1, kw, *size)
        shape = (*self.x.shape[:2], self.x.shape[2] + 2 * top, self.x.shape[3] + 2 * left)
        out = patches.new_zeros(shape)
        for i, j in product(range(kh), range(kw)):
            rows = slice(i * dilation[0], i * dilation[0] + size[0] * stride[0], stride[0])
            columns = slice(j * dilation[1], j * dilation[1] + size[1] * stride[1], stride[1])
            out[:, :, rows, columns].add_(patches[:, i, :, j])
        return out[:, :, top : shape[2] - top, left : shape[3] - left]


def forward(
    inputs: Inputs, geometry: Geometry, limits: Limits, channels_last: bool, keep: bool
) -> tuple[Tensor, Made | None]:
    """Convolves each sample with its weight (Eq. 4-7).

    Args:
        inputs: The input, its gates and the spectrum of the weight.
        geometry: Geometry of the convolution, its padding the same on both sides.
        limits: Those of the device.
        channels_last: Memory format of the output.
        keep: Keep the weights for the backward pass.

    Returns:
        Output (B, Cout, Hout, Wout), and the weights that are kept.

    Raises:
        ValueError: If the padded input is smaller than the kernel.
    """
    plan = Plan.make(inputs, geometry, limits, channels_last)
    x, gates, spectrum = inputs
    rows, columns = len(spectrum.coefficients), x.shape[1] * geometry.kernel_size[1]
    output = torch.empty(
        (len(x), rows // geometry.kernel_size[0], *plan.size), dtype=x.dtype, device=x.device,
        memory_format=torch.channels_last if plan.channels_last else torch.contiguous_format,
    )  # fmt: skip
    element = element_gate(gates, geometry.kernel_size)
    scale = None if gates.filters is None else (2 * gates.filters).to(x.dtype)
    kept = None
    if keep:
        gated = spectrum.coefficients.new_empty(len(x), rows, columns)
        kept = Made(gated, None if gates.local_weight is None else torch.empty_like(gated))
    weights = SampleWeights(gates, spectrum, geometry.kernel_size, columns, plan)
    for start in range(0, len(x), plan.chunk):
        samples = slice(start, start + plan.chunk)
        made = weights.make(samples, False, None if kept is None else kept.of(samples))
        convolution = SampleConv(x[samples], None if element is None else element[samples], geometry, plan)
        convolution.forward(made.gated, None if scale is None else scale[samples], output[samples])
        del made, convolution  # the next chunk would be made beside them
    return output, kept


def backward(
    inputs: Inputs,
    geometry: Geometry,
    limits: Limits,
    grad: Tensor,
    kept: Made | None,
    *,
    channels_last: bool,
    need_x: bool,
    need_spectrum: bool,
) -> Gradients:
    """Gradients of :func:`forward`.

    Args:
        inputs: Those of the forward pass.
        geometry: That of the forward pass.
        limits: Those of the device.
        grad: Gradient of the output.
        kept: Weights that the forward pass kept, or None to make them again.
        channels_last: Memory format of the output.
        need_x: Compute the gradient of the input.
        need_spectrum: Compute the gradient of the spectrum.
    """
    plan = Plan.make(inputs, geometry, limits, channels_last)
    x, gates, spectrum = inputs
    rows, columns = len(spectrum.coefficients), x.shape[1] * geometry.kernel_size[1]
    element = element_gate(gates, geometry.kernel_size)
    scale = None if gates.filters is None else 2 * gates.filters
    weights = SampleWeights(gates, spectrum, geometry.kernel_size, columns, plan)
    grads = weights.zero_gradients(need_spectrum)
    grad_x: list[Tensor] = []
    grad_element = None if element is None else torch.empty_like(element)
    for start in range(0, len(x), plan.chunk):
        samples = slice(start, start + plan.chunk)
        made = weights.make(samples, keep_gate=True) if kept is None else kept.of(samples)
        convolution = SampleConv(x[samples], None if element is None else element[samples], geometry, plan)
        grad_out = grad[samples]
        grad_weight = convolution.grad_weight(grad_out, rows).to(spectrum.coefficients.dtype)
        if need_x or (plan.gate_input and element is not None):
            if scale is not None:
                grad_out = grad_out * scale[samples].to(grad_out.dtype)[:, :, None, None]
            grad_part, grad_gate = convolution.grad_input(grad_out, made.gated, need_x)
            if need_x:
                grad_x.append(grad_part)
            if grad_gate is not None:
                grad_element[samples] = grad_gate
        if element is not None and not plan.gate_input:
            grad_element[samples] = convolution.grad_element(grad_weight, made.gated, scale[samples])
        weights.backward(samples, made, grad_weight, grads)
    weights.finish(grads)
    grad_channels, grad_positions = element_gate_adjoint(grad_element, gates, geometry.kernel_size)
    grad_local = None if grads.local_weight is None else grads.local_weight.view_as(gates.local_weight)
    grad_gates = Gates(
        bands=grads.bands,
        channels=grad_channels,
        filters=grads.filters,
        positions=grad_positions,
        local_input=grads.local_input,
        local_weight=grad_local,
    )
    # One chunk is not copied.
    joined = None if not need_x else grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x)
    return Gradients(joined, grad_gates, grads.coefficients)


def element_gate_adjoint(
    grad: Tensor | None, gates: Gates, kernel_size: tuple[int, int]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the channel and the position gate, given that of the element gate (B, kh*Cin*kw)."""
    if grad is None or gates.positions is None:
        return grad, None
    grad = grad.view(len(grad), kernel_size[0], -1, kernel_size[1])
    positions = gates.positions.view(-1, kernel_size[0], 1, kernel_size[1])
    by_position = torch.einsum("bicj,bc->bij", grad, gates.channels)
    return (grad * positions).sum((1, 3)), by_position.flatten(1)
