"""Kernels that make the samples' gated weights and take their gradients back, each element once.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A gated weight is FDW's weight times the dense, position, channel and filter gates (Eq. 4-7). FDW's weight is mixed from
the bank of the groups' weights, a product of (B x n) and (n x weights), or read where each sample's spectrum was
transformed. Nothing else is as large as the weights: the dense gate's logits, a sum over few taps, are made in place.

Layouts: the bank (n, R, C) and FDW's weights (B, R, C) are matrices with R = Cout*kh and C = Cin*kw, as the transform
yields them; gated weights are (B, Cout, kh*kw, Cin), as the convolution reads them.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import kernel, next_block, precision_of

# With these warps and blocks no register spills, for compute capability 9.0 and strides that 16 divides.
WARPS = 8


@triton.jit
def mixed_weights(
    source, gains, samples, in_batch, channels, in_channels, matrix_row, columns, matrix_size, column_offset,
    gains_stride, num_bands, KERNEL_WIDTH: tl.constexpr, FROM_BANK: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """FDW's weights (BLOCK_B, BLOCK_C) of samples and channels at one filter and kernel position."""
    places = matrix_row * columns + channels * KERNEL_WIDTH + column_offset
    if FROM_BANK:
        value = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for first in range(0, num_bands, BLOCK_N):
            bands = first + tl.arange(0, BLOCK_N)
            in_bands = bands < num_bands
            gain = tl.load(
                gains + samples[:, None] * gains_stride + bands[None, :],
                mask=in_batch[:, None] & in_bands[None, :], other=0.0,
            )  # fmt: skip
            weights = tl.load(
                source + bands.to(tl.int64)[:, None] * matrix_size + places[None, :],
                mask=in_bands[:, None] & in_channels[None, :], other=0.0,
            )  # fmt: skip
            rounded = gain.to(weights.dtype)
            value = tl.dot(rounded, weights, value, input_precision=PRECISION)
            if SPLIT:  # what rounding a gain to 16 bits left over, which all of a group's weights would share
                value = tl.dot((gain - rounded.to(tl.float32)).to(weights.dtype), weights, value)
    else:
        value = tl.load(
            source + samples.to(tl.int64)[:, None] * matrix_size + places[None, :],
            mask=in_batch[:, None] & in_channels[None, :], other=0.0,
        )  # fmt: skip
    return value.to(tl.float32)


@triton.jit
def dense_gate(
    local_input, local_weight, samples, in_batch, channels, num_channels, row, TAPS: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The dense gate without its factor of 2 (BLOCK_B, BLOCK_C): a sigmoid of a sum over neighbouring channels."""
    logits = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for tap in tl.static_range(TAPS):
        near = channels + (tap - TAPS // 2)
        inside = (near >= 0) & (near < num_channels)
        pooled = tl.load(
            local_input + samples[:, None] * num_channels + near[None, :],
            mask=in_batch[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        logits += pooled * tl.load(local_weight + row * TAPS + tap)
    return tl.sigmoid(logits)


@triton.jit
def gated_weights_kernel(
    out, source, gains, channel_gates, filter_gates, position_gates, local_input, local_weight,
    batch, num_filters, num_channels, num_bands, gains_stride, channels_stride, filters_stride, positions_stride,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, TAPS: tl.constexpr, FROM_BANK: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One filter of a block of samples and channels; without gates, TAPS is 0."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    batch_blocks, channel_blocks = tl.cdiv(batch, BLOCK_B), tl.cdiv(num_channels, BLOCK_C)
    program = tl.program_id(0)
    # Blocks of samples first: they read the same part of the bank.
    samples = program % batch_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    channels = program // batch_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    filter = program // (batch_blocks * channel_blocks)
    in_batch, in_channels = samples < batch, channels < num_channels
    inside = in_batch[:, None] & in_channels[None, :]
    columns = num_channels * KERNEL_WIDTH
    matrix_size = num_filters * KERNEL_HEIGHT * columns
    if TAPS > 0:
        scale = tl.load(filter_gates + samples * filters_stride + filter, mask=in_batch, other=0.0)[:, None]
        scale *= tl.load(channel_gates + samples[:, None] * channels_stride + channels[None, :], mask=inside, other=0.0)
    for position in range(POSITIONS):
        row = filter * POSITIONS + position
        value = mixed_weights(
            source, gains, samples, in_batch, channels, in_channels, filter * KERNEL_HEIGHT + position // KERNEL_WIDTH,
            columns, matrix_size, position % KERNEL_WIDTH, gains_stride, num_bands, KERNEL_WIDTH, FROM_BANK, SPLIT,
            PRECISION, BLOCK_B, BLOCK_C, BLOCK_N,
        )  # fmt: skip
        if TAPS > 0:
            gate = dense_gate(
                local_input, local_weight, samples, in_batch, channels, num_channels, row, TAPS, BLOCK_B, BLOCK_C
            )
            value *= 2 * gate * scale
            if POSITIONS > 1:
                value *= tl.load(position_gates + samples * positions_stride + position, mask=in_batch, other=0.0)[
                    :, None
                ]
        target = out + samples.to(tl.int64)[:, None] * matrix_size + row * num_channels + channels[None, :]
        tl.store(target, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def ungate_kernel(
    grad, source, gains, channel_gates, filter_gates, position_gates, local_input, local_weight,
    grad_mixed, grad_logits, row_sums, channel_sums,
    batch, num_filters, num_channels, num_bands, gains_stride, channels_stride, filters_stride, positions_stride,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, TAPS: tl.constexpr, FROM_BANK: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr, FILTERS: tl.constexpr,
):  # fmt: skip
    """FILTERS filters of a block of samples and channels: see :func:`ungate`."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    batch_blocks, channel_blocks = tl.cdiv(batch, BLOCK_B), tl.cdiv(num_channels, BLOCK_C)
    program = tl.program_id(0)
    samples = program % batch_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    channel_block = program // batch_blocks % channel_blocks
    channels = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    filter_block = program // (batch_blocks * channel_blocks)
    in_batch, in_channels = samples < batch, channels < num_channels
    inside = in_batch[:, None] & in_channels[None, :]
    columns = num_channels * KERNEL_WIDTH
    matrix_size = num_filters * KERNEL_HEIGHT * columns
    by_channel = tl.load(channel_gates + samples[:, None] * channels_stride + channels[None, :], mask=inside, other=0.0)
    sums = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    for number in range(FILTERS * POSITIONS):
        row = filter_block * FILTERS * POSITIONS + number
        filter, position = row // POSITIONS, row % POSITIONS
        in_rows = in_batch & (filter < num_filters)
        tile = in_rows[:, None] & in_channels[None, :]
        matrix_row = filter * KERNEL_HEIGHT + position // KERNEL_WIDTH
        column_offset = position % KERNEL_WIDTH
        value = mixed_weights(
            source, gains, samples, in_rows, channels, in_channels & (filter < num_filters), matrix_row, columns,
            matrix_size, column_offset, gains_stride, num_bands, KERNEL_WIDTH, FROM_BANK, SPLIT, PRECISION, BLOCK_B,
            BLOCK_C, BLOCK_N,
        )  # fmt: skip
        # A row past the last one is masked by the number of samples, its weights by the row itself.
        last = tl.minimum(row, num_filters * POSITIONS - 1)
        gate = dense_gate(
            local_input, local_weight, samples, in_batch, channels, num_channels, last, TAPS, BLOCK_B, BLOCK_C
        )
        by_row = tl.load(filter_gates + samples * filters_stride + filter, mask=in_rows, other=0.0)
        if POSITIONS > 1:
            by_row *= tl.load(position_gates + samples * positions_stride + position, mask=in_batch, other=0.0)
        offset = samples.to(tl.int64)[:, None] * matrix_size
        in_layout = offset + row * num_channels + channels[None, :]
        slope = tl.load(grad + in_layout, mask=tile, other=0.0).to(tl.float32)
        product = slope * value * 2 * gate
        sums += product * by_row[:, None]
        row_sum = tl.sum(product * by_channel, axis=1)
        number_of_rows = num_filters * POSITIONS
        places = (channel_block * batch + samples).to(tl.int64) * number_of_rows + row
        tl.store(row_sums + places, row_sum, mask=in_rows)
        scale = by_channel * by_row[:, None]
        tl.store(grad_logits + in_layout, (product * scale * (1 - gate)).to(grad_logits.dtype.element_ty), mask=tile)
        in_matrix = offset + matrix_row * columns + channels[None, :] * KERNEL_WIDTH + column_offset
        tl.store(grad_mixed + in_matrix, (slope * 2 * gate * scale).to(grad_mixed.dtype.element_ty), mask=tile)
    places = (filter_block * batch + samples).to(tl.int64)[:, None] * num_channels + channels[None, :]
    tl.store(channel_sums + places, sums, mask=inside)


def gated_weights_fake(
    source: Tensor, bands: Tensor, channels: Tensor | None, filters: Tensor | None, positions: Tensor | None,
    local_input: Tensor | None, local_weight: Tensor | None, kernel_size: list[int], from_bank: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Empty tensor in the shape of the result of :func:`gated_weights`."""
    rows, columns = source.shape[1:]
    shape = len(bands), rows // kernel_size[0], math.prod(kernel_size), columns // kernel_size[1]
    return source.new_empty(shape, dtype=dtype)


GATES = "Tensor bands, Tensor? channels, Tensor? filters, Tensor? positions, Tensor? local_input, Tensor? local_weight"


@kernel(f"(Tensor source, {GATES}, int[] kernel_size, bool from_bank, ScalarType dtype) -> Tensor", gated_weights_fake)
def gated_weights(
    source: Tensor, bands: Tensor, channels: Tensor | None, filters: Tensor | None, positions: Tensor | None,
    local_input: Tensor | None, local_weight: Tensor | None, kernel_size: list[int], from_bank: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Makes the gated weights of samples.

    Args:
        source: The bank (n, R, C), or FDW's weights of the samples (B, R, C) in float32.
        bands: Gains (B, n) in float32; their columns are adjacent, as those of all gates.
        channels: Channel gates (B, Cin), or None without KSM, as all the following.
        filters: Filter gates (B, Cout).
        positions: Position gates (B, kh*kw), or None where the kernel has one position.
        local_input: Input (B, Cin), contiguous, of the dense gate.
        local_weight: Convolution (Cout*kh*kw, 1, t), contiguous, that makes the dense gate's logits.
        kernel_size: (kh, kw).
        from_bank: Whether `source` is the bank.
        dtype: That of the result.

    Returns:
        Weights (B, Cout, kh*kw, Cin).
    """
    out = gated_weights_fake(
        source, bands, channels, filters, positions, local_input, local_weight, kernel_size, from_bank, dtype
    )
    batch, num_filters, _, num_channels = out.shape
    num_bands = bands.shape[1]
    strides = (row_stride(gate) for gate in (bands, channels, filters, positions))
    largest = 32 if source.dtype == torch.float32 and from_bank else 64
    block_b, block_c = next_block(batch, 16, largest), next_block(num_channels, 16, largest)
    grid = (triton.cdiv(batch, block_b) * triton.cdiv(num_channels, block_c) * num_filters,)
    gated_weights_kernel[grid](
        out, source, bands, channels, filters, positions, local_input, local_weight,
        batch, num_filters, num_channels, num_bands, *strides,
        KERNEL_HEIGHT=kernel_size[0], KERNEL_WIDTH=kernel_size[1],
        TAPS=0 if local_weight is None else local_weight.shape[2], FROM_BANK=from_bank,
        SPLIT=from_bank and source.dtype != torch.float32, PRECISION=precision_of(source.dtype), BLOCK_B=block_b,
        BLOCK_C=block_c, BLOCK_N=next_block(num_bands, 16, 64), num_warps=WARPS,
    )  # fmt: skip
    return out


def row_stride(gate: Tensor | None) -> int:
    """Distance of a gate's samples."""
    return 0 if gate is None else gate.stride(0)


def ungate_blocks(batch: int, num_channels: int, positions: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Samples, channels and filters of a program of :func:`ungate`."""
    largest = 32 if dtype == torch.float32 else 64
    return next_block(batch, 16, 32), next_block(num_channels, 16, largest), max(1, 16 // positions)


def ungate_fake(
    grad: Tensor, source: Tensor, bands: Tensor, channels: Tensor, filters: Tensor, positions: Tensor | None,
    local_input: Tensor, local_weight: Tensor, kernel_size: list[int], from_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Empty tensors in the shapes of the results of :func:`ungate`."""
    batch, num_filters, num_positions, num_channels = grad.shape
    _, block_c, block_filters = ungate_blocks(batch, num_channels, num_positions, source.dtype)
    rows = num_filters * num_positions
    return (
        source.new_empty(batch, *source.shape[1:]),
        grad.new_empty(batch, rows, num_channels),
        bands.new_empty(triton.cdiv(num_channels, block_c), batch, rows),
        bands.new_empty(triton.cdiv(num_filters, block_filters), batch, num_channels),
    )


@kernel(
    f"(Tensor grad, Tensor source, {GATES}, int[] kernel_size, bool from_bank) -> (Tensor, Tensor, Tensor, Tensor)",
    ungate_fake,
)
def ungate(
    grad: Tensor, source: Tensor, bands: Tensor, channels: Tensor, filters: Tensor, positions: Tensor | None,
    local_input: Tensor, local_weight: Tensor, kernel_size: list[int], from_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Takes the gradient of gated weights apart, where there are gates.

    Args:
        grad: Gradient (B, Cout, kh*kw, Cin) of the gated weights.
        source: As for :func:`gated_weights`, as all the following.
        bands: Gains.
        channels: Channel gates.
        filters: Filter gates.
        positions: Position gates, or None.
        local_input: Input of the dense gate.
        local_weight: Convolution of the dense gate.
        kernel_size: (kh, kw).
        from_bank: Whether `source` is the bank.

    Returns:
        Gradients of FDW's weights (B, R, C) in the dtype of `source`, and of the dense gate's logits
        (B, Cout*kh*kw, Cin) in that of `grad`; and, in float32, parts of sums of the gradient times the weight without
        filter and position gates, over channels (parts, B, Cout*kh*kw), and without channel gates, over filters and
        positions (parts, B, Cin).
    """
    results = ungate_fake(
        grad, source, bands, channels, filters, positions, local_input, local_weight, kernel_size, from_bank
    )
    batch, num_filters, num_positions, num_channels = grad.shape
    num_bands = bands.shape[1]
    strides = (row_stride(gate) for gate in (bands, channels, filters, positions))
    block_b, block_c, block_filters = ungate_blocks(batch, num_channels, num_positions, source.dtype)
    blocks = (triton.cdiv(batch, block_b), triton.cdiv(num_channels, block_c), triton.cdiv(num_filters, block_filters))
    ungate_kernel[(math.prod(blocks),)](
        grad, source, bands, channels, filters, positions, local_input, local_weight, *results,
        batch, num_filters, num_channels, num_bands, *strides,
        KERNEL_HEIGHT=kernel_size[0], KERNEL_WIDTH=kernel_size[1], TAPS=local_weight.shape[2], FROM_BANK=from_bank,
        SPLIT=from_bank and source.dtype != torch.float32, PRECISION=precision_of(source.dtype), BLOCK_B=block_b,
        BLOCK_C=block_c, BLOCK_N=next_block(num_bands, 16, 64), FILTERS=block_filters, num_warps=WARPS,
    )  # fmt: skip
    return results
