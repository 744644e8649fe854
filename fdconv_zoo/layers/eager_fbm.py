"""FBM in eager mode, with a backward pass written by hand.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)

Saved for the backward pass is the feature map alone; gates and filtered maps, several times as large, are made again.
The same function in traceable form, the reference for this one, is :func:`~fdconv_zoo.layers.fbm.modulate_bands`.
torch.compile takes this one as an operator.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .band_filters import low_pass_matrices, low_passes, sum_low_passes
from .eager import NO_SECOND_DERIVATIVES
from .functional import without_autocast

# Up to this many places a map's bands are gated by one matrix; low-passes of small maps are many tiny products.
MATRIX_PLACES = 256


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


def band_factors(gates: Tensor) -> Tensor:
    """Factors of the map and of its low-passes (B, n+1, H, W): A_1, A_2 - A_1, ..., 1 - A_n.

    Their sum is that over the bands, A_1 (x - low_1) + A_2 (low_1 - low_2) + ... + low_n (Eq. 9), with one product for
    each low-pass instead of two.
    """
    batch, bands, height, width = gates.shape
    factors = gates.new_ones(batch, bands + 1, height, width)
    factors.narrow(1, 0, bands).copy_(gates)
    factors.narrow(1, 1, bands).sub_(gates)
    return factors


def band_matrix(factors: Tensor, lows: Tensor) -> Tensor:
    """Matrix (B, HW, HW) that gates the bands of a map: the sum of the low-passes (n, HW, HW) times their factors."""
    first, *others = factors.flatten(2).unsqueeze(2).unbind(1)
    matrix = others[0] * lows[0]
    for factor, low in zip(others[1:], lows[1:], strict=True):
        matrix.addcmul_(factor, low)
    matrix.diagonal(dim1=1, dim2=2).add_(first.squeeze(1))
    return matrix


def by_matrix(x: Tensor, mask_grid: int | None) -> bool:
    """Whether a matrix (HW, HW) gates the bands of a map (B, C, H, W)."""
    return mask_grid is None and x.shape[2] * x.shape[3] <= MATRIX_PLACES


def exact(x: Tensor) -> Tensor:
    """A map in the precision to filter in, float32 at least, its pixels in order."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()


def forward_pass(
    x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None
) -> Tensor:
    """:func:`~fdconv_zoo.layers.fbm.modulate_bands` without autograd: see there."""
    maps = exact(x)
    factors = band_factors(band_gates(maps, weight.to(maps.dtype), bias.to(maps.dtype)))
    if by_matrix(x, mask_grid):
        modulated = torch.bmm(maps.flatten(2), band_matrix(factors, low_pass_matrices(maps, cutoffs))).view_as(maps)
    else:
        modulated = maps * factors.narrow(1, 0, 1)
        for i, low in enumerate(low_passes(maps, cutoffs, mask_grid), start=1):
            modulated.addcmul_(low, factors.narrow(1, i, 1))
    return modulated.to(x.dtype)


def backward_pass(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cutoffs: list[tuple[int, int]],
    mask_grid: int | None,
    need_x: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gradients of the map, if needed, the weight and the bias of :func:`forward_pass`, given that of its output."""
    maps, slope = exact(x), exact(grad)
    kernel = weight.to(maps.dtype)
    gates = band_gates(maps, kernel, bias.to(maps.dtype))
    factors, bands = band_factors(gates), gates.shape[1]
    grad_x = None
    if by_matrix(x, mask_grid):
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
        grad_x = grad_x.to(x.dtype)
    grad_kernel = torch.bmm(patches, maps.flatten(2).mT).sum(0).view(bands, 3, 3, -1)
    return (
        grad_x,
        grad_kernel.permute(0, 3, 1, 2).flip(2, 3).to(weight.dtype).contiguous(),
        grad_logits.sum((0, 2, 3)).to(bias.dtype),
    )


class _ModulateBands(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.cutoffs, ctx.mask_grid = cutoffs, mask_grid
        # A view made here could not be changed in place by what follows, such as ReLU(inplace=True).
        return forward_pass(x, weight, bias, cutoffs, mask_grid).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(NO_SECOND_DERIVATIVES)
        with without_autocast(grad.device.type):
            grads = backward_pass(grad, *ctx.saved_tensors, ctx.cutoffs, ctx.mask_grid, ctx.needs_input_grad[0])
        return *grads, None, None


def eager_modulate_bands(
    x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[tuple[int, int]], mask_grid: int | None
) -> Tensor:
    """:func:`~fdconv_zoo.layers.fbm.modulate_bands`, faster and without second derivatives."""
    if x.numel() == 0:
        return x + (weight.sum() + bias.sum()).to(x.dtype)
    if torch.compiler.is_compiling():
        numbers = [number for fraction in cutoffs for number in fraction]
        return torch.ops.fdconv_zoo.modulate_bands(x, weight, bias, numbers, mask_grid)
    with without_autocast(x.device.type):
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
            return _ModulateBands.apply(x, weight, bias, cutoffs, mask_grid)
        return forward_pass(x, weight, bias, cutoffs, mask_grid)
