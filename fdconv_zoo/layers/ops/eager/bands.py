"""FBM's bands, with a backward pass written by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...low_pass import band_factors, band_matrix, low_pass_matrices, low_passes, sum_low_passes
from ..types import Limits


def kernel_matrix(weight: Tensor) -> Tensor:
    """Filters (n, C, 3, 3), turned round, as a matrix (9n, C)."""
    return weight.flip(2, 3).permute(0, 2, 3, 1).flatten(0, 2)


def band_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Gates of the bands (B, n, H, W), a 3x3 convolution of x (B, C, H, W) with few filters (n, C, 3, 3) (Eq. 10).

    One matrix product, then sums of shifted maps: a convolution works on blocks of filters, most of them empty here.
    """
    # fold is the adjoint of a convolution's patches, so the kernel is turned round.
    maps = torch.matmul(kernel_matrix(weight), x.flatten(2))
    logits = F.fold(maps, x.shape[2:], 3, padding=1)
    return logits.add_(bias.view(-1, 1, 1)).sigmoid_().mul_(2)


def by_matrix(x: Tensor, mask_grid: int | None, limits: Limits) -> bool:
    """Whether a matrix (HW, HW) gates the bands of a map (B, C, H, W)."""
    return mask_grid is None and x.shape[2] * x.shape[3] <= limits.matrix


def exact(x: Tensor) -> Tensor:
    """A map in the precision to filter in, float32 at least, its pixels in order."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def fractions(numbers: list[int]) -> list[tuple[int, int]]:
    """Numerators and denominators in one list, as the dispatcher hands them over, as pairs."""
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], mask_grid: int | None, *, limits: Limits
) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.modulate_bands`: see there; the cutoffs are as for :func:`fractions`."""
    maps, cutoffs, is_small = exact(x), fractions(cutoffs), by_matrix(x, mask_grid, limits)
    factors = band_factors(band_gates(maps, weight.to(maps.dtype), bias.to(maps.dtype)))
    if is_small:
        # A view could not be changed in place by what follows, such as ReLU(inplace=True).
        modulated = torch.empty_like(maps)
        torch.bmm(maps.flatten(2), band_matrix(factors, low_pass_matrices(maps, cutoffs)), out=modulated.flatten(2))
    else:
        modulated = maps * factors.narrow(1, 0, 1)
        for i, low in enumerate(low_passes(maps, cutoffs, mask_grid), start=1):
            modulated.addcmul_(low, factors.narrow(1, i, 1))
    return modulated.to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cutoffs: list[int],
    mask_grid: int | None,
    need_x: bool,
    *,
    limits: Limits,
) -> list[Tensor]:
    """Gradients of the map, if needed, the weight and the bias of :func:`forward`, given that of its output."""
    maps, slope, cutoffs = exact(x), exact(grad), fractions(cutoffs)
    kernel = weight.to(maps.dtype)
    gates = band_gates(maps, kernel, bias.to(maps.dtype))
    factors, bands = band_factors(gates), gates.shape[1]
    if by_matrix(x, mask_grid, limits):
        lows = low_pass_matrices(maps, cutoffs)
        products = torch.bmm(maps.flatten(2).mT, slope.flatten(2))
        sums = [products.diagonal(dim1=1, dim2=2), *((products * low).sum(1) for low in lows)]
        grad_factors = torch.stack(sums, dim=1).view_as(factors)
        if need_x:
            grad_x = torch.bmm(slope.flatten(2), band_matrix(factors, lows).mT).view_as(maps)
    else:
        sums = [(slope * part).sum(1) for part in (maps, *low_passes(maps, cutoffs, mask_grid))]
        grad_factors = torch.stack(sums, dim=1)
        if need_x:
            grad_x = sum_low_passes(slope, factors.narrow(1, 1, bands), cutoffs, mask_grid)
            grad_x.addcmul_(slope, factors.narrow(1, 0, 1))
    grad_gates = grad_factors.narrow(1, 0, bands) - grad_factors.narrow(1, 1, bands)
    grad_logits = grad_gates.mul_(gates).mul_(1 - gates / 2)
    patches = F.unfold(grad_logits, 3, padding=1)
    if need_x:
        grad_x.view(*x.shape[:2], -1).baddbmm_(kernel_matrix(kernel).t().expand(len(x), -1, -1), patches)
    grad_kernel = torch.bmm(patches, maps.flatten(2).mT).sum(0).view(bands, 3, 3, -1)
    grads = [
        grad_kernel.permute(0, 3, 1, 2).flip(2, 3).to(weight.dtype).contiguous(),
        grad_logits.sum((0, 2, 3)).to(bias.dtype),
    ]
    return [grad_x.to(x.dtype), *grads] if need_x else grads


def kernel(
    device_limits: Limits,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cutoffs: list[int],
    mask_grid: int | None,
    fused: bool,
) -> Tensor:
    """The operator by PyTorch's operations; `fused` is for a GPU's kernels."""
    return forward(x, weight, bias, cutoffs, mask_grid, limits=device_limits)


def backward_kernel(
    device_limits: Limits,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cutoffs: list[int],
    mask_grid: int | None,
    fused: bool,
    need_x: bool,
) -> list[Tensor]:
    """Its backward pass by PyTorch's operations."""
    return backward(grad, x, weight, bias, cutoffs, mask_grid, need_x=need_x, limits=device_limits)
