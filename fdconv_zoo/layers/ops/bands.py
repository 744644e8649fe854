"""FBM's bands as an operator: implementations by device, fake implementation and autograd.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)

Elsewhere than on a GPU the dispatcher calls the eager implementation itself. Gates and filtered maps are several times
the input, so the input alone is saved for the backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from ..layout import is_channels_last
from . import traced, transforms, triton
from .eager import bands, limits
from .library import without_autocast


def on_gpu(x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], mask_grid: int | None, fused: bool) -> Tensor:
    """The bands by Triton's kernels, where they are there for it."""
    if not fused or not triton.filters(x, mask_grid):
        return bands.forward(x, weight, bias, cutoffs, mask_grid, limits=limits.OTHER)
    from .triton import bands as triton_bands

    return triton_bands.forward(x, weight, bias, cutoffs, is_channels_last(x))


def backward_on_gpu(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    cutoffs: list[int],
    mask_grid: int | None,
    fused: bool,
    need_x: bool,
) -> list[Tensor]:
    """Their backward pass by Triton's kernels, where they are there for it."""
    if not fused or not triton.filters(x, mask_grid):
        return bands.backward(grad, x, weight, bias, cutoffs, mask_grid, need_x=need_x, limits=limits.OTHER)
    from .triton import bands as triton_bands

    *of_x, grad_weight, grad_bias = triton_bands.backward(
        grad, x, weight, bias, cutoffs, need_x, channels_last=is_channels_last(x)
    )
    return [*of_x, grad_weight.contiguous(), grad_bias.contiguous()]


def fake(x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], mask_grid: int | None, fused: bool) -> Tensor:
    """Empty tensor in the shape of the output; Triton's kernels keep the memory format."""
    is_kept = fused and triton.filters(x, mask_grid) and is_channels_last(x)
    return torch.empty_like(x, memory_format=torch.channels_last if is_kept else torch.contiguous_format)


def backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], mask_grid: int | None, fused: bool,
    need_x: bool,
) -> list[Tensor]:  # fmt: skip
    """Empty tensors in the shapes of the gradients."""
    of_x = [fake(x, weight, bias, cutoffs, mask_grid, fused)] if need_x else []
    return [*of_x, *(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (weight, bias))]


def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keeps the inputs; gates and filtered maps, several times as large, are made again."""
    x, weight, bias, ctx.cutoffs, ctx.mask_grid, ctx.fused = inputs
    ctx.save_for_backward(x, weight, bias)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments."""
    x, weight, bias = ctx.saved_tensors
    need_x = ctx.needs_input_grad[0]

    def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return traced.modulate_bands(x, weight, bias, bands.fractions(ctx.cutoffs), ctx.mask_grid)

    with without_autocast(grad):
        if transforms.needs_plain_gradients(grad):
            return *transforms.gradients(plain, (x, weight, bias), grad), None, None, None
        grads = torch.ops.fdconv_zoo.modulate_bands_backward.default(
            grad, x, weight, bias, ctx.cutoffs, mask_grid=ctx.mask_grid, fused=ctx.fused, need_x=need_x
        )
    return *(grads if need_x else (None, *grads)), None, None, None
