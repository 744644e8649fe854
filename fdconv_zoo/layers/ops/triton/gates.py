"""Kernel that makes KSM's gates from its hidden layer: normalisation, StarReLU, the heads and their sigmoids at once.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.2)

All of them are tiny, and what they cost on a GPU is their launches. It is for passes without gradients, where BatchNorm
is a factor and a term for each channel.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks_of, kernel, next_block, precision_of

# With these blocks no register spills, for compute capability 9.0.
BLOCK_OUT, LARGEST_BATCH = 64, 32


@triton.jit
def gates_kernel(
    out, hidden, weight, bias, mean, variance, norm_weight, norm_bias, star_scale, star_bias,
    batch, num_hidden, num_out, epsilon,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A block (BLOCK_B, BLOCK_O) of gates."""
    samples = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    gates = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_batch, in_gates = samples < batch, gates < num_out
    scale, shift = tl.load(star_scale).to(tl.float32), tl.load(star_bias).to(tl.float32)
    total = tl.zeros((BLOCK_B, BLOCK_O), tl.float32)
    for first in range(0, num_hidden, BLOCK_H):
        units = first + tl.arange(0, BLOCK_H)
        in_units = units < num_hidden
        value = tl.load(
            hidden + samples[:, None] * num_hidden + units[None, :],
            mask=in_batch[:, None] & in_units[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        centre = tl.load(mean + units, mask=in_units, other=0.0).to(tl.float32)
        spread = tl.load(variance + units, mask=in_units, other=1.0).to(tl.float32)
        factor = tl.load(norm_weight + units, mask=in_units, other=0.0).to(tl.float32) / tl.sqrt_rn(spread + epsilon)
        term = tl.load(norm_bias + units, mask=in_units, other=0.0).to(tl.float32)
        positive = tl.maximum((value - centre[None, :]) * factor[None, :] + term[None, :], 0.0)
        active = tl.where(in_units[None, :], scale * positive * positive + shift, 0.0)
        heads = tl.load(
            weight + gates[None, :] * num_hidden + units[:, None],
            mask=in_gates[None, :] & in_units[:, None], other=0.0,
        ).to(tl.float32)  # fmt: skip
        total = tl.dot(active, heads, total, input_precision=PRECISION)
    total += tl.load(bias + gates, mask=in_gates, other=0.0).to(tl.float32)[None, :]
    places = samples.to(tl.int64)[:, None] * num_out + gates[None, :]
    tl.store(out + places, 2 * tl.sigmoid(total), mask=in_batch[:, None] & in_gates[None, :])


def gates_of_hidden_fake(hidden: Tensor, weight: Tensor, *unused: Tensor | float) -> Tensor:
    """Empty tensor in the shape of the gates."""
    return hidden.new_empty(len(hidden), len(weight), dtype=torch.float32)


@kernel(
    "(Tensor hidden, Tensor weight, Tensor bias, Tensor mean, Tensor variance, Tensor norm_weight, Tensor norm_bias, "
    "float epsilon, Tensor star_scale, Tensor star_bias) -> Tensor",
    gates_of_hidden_fake,
)
def gates_of_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    star_scale: Tensor,
    star_bias: Tensor,
) -> Tensor:
    """Gates (B, G) in float32, computed in float32 whatever the parameters' dtype.

    Args:
        hidden: KSM's hidden layer (B, A) before its normalisation.
        weight: That of the heads (G, A).
        bias: That of the heads (G,).
        mean: BatchNorm's running mean (A,).
        variance: Its running variance (A,).
        norm_weight: Its weight (A,).
        norm_bias: Its bias (A,).
        epsilon: What it adds to the variance.
        star_scale: StarReLU's factor (1,).
        star_bias: Its term (1,).
    """
    out = gates_of_hidden_fake(hidden, weight)
    (batch, num_hidden), num_out = hidden.shape, len(weight)
    block = next_block(batch, 16, LARGEST_BATCH)
    grid = blocks_of(batch, block), blocks_of(num_out, BLOCK_OUT)
    gates_kernel[grid](
        out, hidden.contiguous(), weight.contiguous(), bias, mean=mean, variance=variance, norm_weight=norm_weight,
        norm_bias=norm_bias, star_scale=star_scale, star_bias=star_bias, batch=batch, num_hidden=num_hidden,
        num_out=num_out, epsilon=epsilon, PRECISION=precision_of(torch.float32), BLOCK_B=block, BLOCK_O=BLOCK_OUT,
        BLOCK_H=next_block(num_hidden, 16, 64),
    )  # fmt: skip
    return out
