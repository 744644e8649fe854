"""The arithmetic of FDConv: the operators where the device's implementation computes, plain operations where torch.jit
or torch.export reads along, or torch.func transforms.

This is the one place that asks which of the two is wanted.
"""

from itertools import chain

import torch
import torch.fx
from torch import Tensor, nn

from . import (
    library,
    mixed,
    registry,  # noqa: F401, registers the operators
    traced,
    triton,
    volume,
)
from .types import Geometry, Inputs, Spectrum, VolumeGeometry


def is_exporting() -> bool:
    """Whether torch.export reads along, or an exporter built on it."""
    if torch.jit.is_scripting():
        return True
    if not hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_compiling()
    return torch.compiler.is_exporting()


def takes_plain_operations() -> bool:
    """Whether something reads along or transforms what is computed that knows nothing of the operators."""
    if torch.jit.is_scripting() or torch.jit.is_tracing():
        return True
    # torch.func and forward-mode AD compute with tensors of their own.
    is_transformed = torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    return is_transformed or is_exporting()


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on where a tensor is."""
    device = x.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def can_launch(x: Tensor) -> bool:
    """Whether a GPU's kernel without a derivative may compute from a tensor: no gradients, nothing reading along."""
    return not torch.is_grad_enabled() and triton.is_supported(x, torch.float32) and not takes_plain_operations()


def is_for_onnx() -> bool:
    """Whether an exporter to ONNX reads along, whose transforms are products of matrices."""
    if not torch.jit.is_scripting():
        if torch.onnx.is_in_onnx_export():
            return True
    return False


@torch.jit.ignore
def leaf(module: nn.Module, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """The node of a module in the graph that torch.fx is tracing, given the node of its input.

    So it is a leaf for every tracer, torchvision's create_feature_extractor and torch.ao's among them: sizes steer what
    it computes.
    """
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x,), {})


class Entry(nn.Module):
    """The way into a layer of one input: as torch.jit, torch.fx and autocast want it.

    Subclasses compute in `_compute(x, by_kernels)`; `by_kernels` says that x is where a GPU's kernels may compute.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes the layer's function of x: see the class for its shape."""
        # Scripts know neither torch.fx nor autocast; elsewhere x is rounded as for a convolution, and what the gates
        # and the weight are made from stays exact.
        if torch.jit.is_scripting():
            return self._compute(x, False)
        else:
            if isinstance(x, torch.fx.Proxy):
                return leaf(self, x)
            device = x.device.type
            by_kernels = device == triton.DEVICE
            if not x.is_floating_point() or not is_autocast(x):
                return self._compute(x, by_kernels)
            dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return self._compute(x.to(dtype), by_kernels)


def dynamic_conv2d(
    inputs: Inputs, geometry: Geometry, bias: Tensor | None, channels_last: bool, recompute: bool, fused: bool
) -> Tensor:
    """Convolves each sample with the weight that FDW and KSM make for it (Eq. 4-7).

    Args:
        inputs: The input, its gates and the spectrum of the weight.
        geometry: Geometry of the convolution.
        bias: Bias (Cout,), or None.
        channels_last: Memory format of the output.
        recompute: Make the weights again in the backward pass instead of keeping them.
        fused: On a GPU, compute by Triton's kernels where they can.

    Returns:
        Output (B, Cout, Hout, Wout), dtype of the input.

    Raises:
        ValueError: If the padded input is smaller than the kernel, where the operator computes.
    """
    if torch.jit.is_scripting() or takes_plain_operations():
        out = traced.dynamic_conv2d(without_bank(inputs), geometry, is_for_onnx())
        return out if bias is None else out + bias.to(out.dtype)[:, None, None]
    else:
        return library.dynamic_conv2d(inputs, geometry, bias, channels_last, recompute, fused)


def without_bank(inputs: Inputs) -> Inputs:
    """Inputs whose spectrum is transformed, whatever bank is kept: the operator alone knows whether it is true."""
    spectrum = inputs.spectrum
    return Inputs(inputs.x, inputs.gates, Spectrum(spectrum.coefficients, spectrum.gain_map, None, -1))


def dynamic_conv3d(inputs: Inputs, geometry: VolumeGeometry) -> Tensor:
    """:func:`dynamic_conv2d` of volumes (B, Cin, D, H, W), in plain operations and without bias."""
    if torch.jit.is_scripting():
        return volume.dynamic_conv3d(inputs, geometry, False, False)
    else:
        by_patches = torch.jit.is_tracing() or is_exporting()
        if not by_patches and inputs.x.numel() == 0:
            return volume.convolve_nothing(inputs, geometry)
        return volume.dynamic_conv3d(without_bank(inputs), geometry, by_patches, is_for_onnx())


def modulate_bands(
    x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None, fused: bool
) -> Tensor:
    """Gates the frequency bands of a feature map place by place (Eq. 8-10).

    Args:
        x: Feature map (B, C, H, W), any floating dtype; filtered in float32 at least.
        weight: Gate convolution (bands, C, 3, 3).
        bias: Its bias (bands,).
        cutoffs: Band limits as (numerator, denominator), widest first. The band below the last is left as it is.
        mask_grid: None, or the side of the official mask grid.
        fused: On a GPU, compute by Triton's kernels where they can.

    Returns:
        Modulated map (B, C, H, W), dtype of `x`.
    """
    if torch.jit.is_scripting() or takes_plain_operations():
        return traced.modulate_bands(x, weight, bias, cutoffs, mask_grid, is_for_onnx())
    else:
        if x.numel() == 0:
            return x + (weight.sum() + bias.sum()).to(x.dtype)
        operator, numbers = torch.ops.fdconv_zoo.modulate_bands.default, list(chain.from_iterable(cutoffs))
        if not is_autocast(x):
            return operator(x, weight, bias, numbers, mask_grid, fused)
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, weight, bias, numbers, mask_grid, fused)


def mixed_conv2d(
    x: Tensor,
    attention: Tensor,
    cells: Tensor,
    positions: Tensor | None,
    shape: list[int],
    geometry: Geometry,
    groups: int,
) -> Tensor:
    """Convolves each sample with a kernel mixed from a bank, in the input's dtype.

    Args:
        x: Input (B, Cin, H, W).
        attention: Share of each cell of the bank in each cell of a sample's kernel (B, m, n); see
            :class:`~fdconv_zoo.layers.ops.mixed.Mixture`.
        cells: The bank (n, co, ci, a, b): whole kernels, or pieces that divide them.
        positions: Gate of each kernel position (B, kh*kw), or None.
        shape: Shape (Cout, Cin/groups, kh, kw) of a kernel.
        geometry: Geometry of the convolution.
        groups: Groups of channels.

    Returns:
        Output (B, Cout, Hout, Wout), dtype of the input.

    Raises:
        ValueError: If the padded input is smaller than the kernel, where the operator computes.
    """
    gate = None if positions is None else positions.to(x.dtype)
    mixture = mixed.Mixture(x, attention.to(x.dtype), cells.to(x.dtype), gate)
    if torch.jit.is_scripting() or takes_plain_operations():
        return mixed.plain(mixture, shape, geometry, groups)
    else:
        return mixed.mixed_conv2d(mixture, shape, geometry, groups)


def weight_matrices(spectrum: Spectrum, gains: Tensor, columns: int) -> Tensor:
    """Weight matrices (B, R, C) from the spectrum and the gains (B, n) of its groups (Eq. 4-5), in plain operations."""
    made = Spectrum(spectrum.coefficients, spectrum.gain_map, None, -1)
    return traced.weight_matrices(made, gains, columns, is_for_onnx())
