"""Kernels that make the samples' gated weights and take their gradients back, each element once.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A gated weight is FDW's weight times the dense, position, channel and filter gates (Eq. 4-7). FDW's weight is mixed from
the bank of the groups' weights, a product of (B x n) and (n x weights), or read where each sample's spectrum was
transformed. Nothing else is as large as the weights: the dense gate's logits, a sum over few taps, are made in place.

Layouts: the bank is (n, Cout*kh*kw, Cin), gated weights are (B, Cout, kh*kw, Cin), as the convolution reads them; FDW's
weights (B, R, C) of samples are matrices with R = Cout*kh and C = Cin*kw, as the transform yields them.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import blocks_of, kernel, next_block, precision_of


class Tile(NamedTuple):
    """What a program computes.

    Attributes:
        samples: Samples at most.
        channels: Channels at most.
        rows: Rows, filters times positions, one after the other: what they share is loaded once.
        warps: Its warps.
    """

    samples: int
    channels: int
    rows: int
    warps: int


# Measured on an H200, and without registers that spill there.
GATED = Tile(64, 32, 32, 8)
UNGATED = Tile(32, 32, 16, 4)


@triton.jit
def load_gains(
    gains, samples, in_batch, gains_stride, num_bands, FROM_BANK: tl.constexpr, BAND_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gains of the samples, a tile (BLOCK_B, BLOCK_N) of each block of bands."""
    tiles = ()
    if FROM_BANK:
        for block in tl.static_range(BAND_BLOCKS):
            bands = block * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = in_batch[:, None] & (bands < num_bands)[None, :]
            tiles = tiles + (tl.load(gains + samples[:, None] * gains_stride + bands[None, :], mask=inside, other=0.0),)
    return tiles


@triton.jit
def load_neighbours(
    local_input, samples, in_batch, channels, num_channels, TAPS: tl.constexpr,
):  # fmt: skip
    """The dense gate's input at each tap, times -log2(e): tiles (BLOCK_B, BLOCK_C), shifted by a channel each."""
    tiles = ()
    for tap in tl.static_range(TAPS):
        near = channels + (tap - TAPS // 2)
        inside = in_batch[:, None] & ((near >= 0) & (near < num_channels))[None, :]
        tile = tl.load(local_input + samples[:, None] * num_channels + near[None, :], mask=inside, other=0.0)
        tiles = tiles + (tile * -1.4426950408889634,)
    return tiles


@triton.jit
def mixed_weights(
    source, gains, samples, in_batch, channels, in_channels, row, num_channels, num_filters, num_bands,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, FROM_BANK: tl.constexpr, SPLIT: tl.constexpr,
    PRECISION: tl.constexpr, BAND_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """FDW's weights (BLOCK_B, BLOCK_C) of samples and channels in one row: at one filter and kernel position."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    size = num_filters * POSITIONS * num_channels
    if FROM_BANK:
        value = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
        for block in tl.static_range(BAND_BLOCKS):
            bands = block * BLOCK_N + tl.arange(0, BLOCK_N)
            weights = tl.load(
                source + bands.to(tl.int64)[:, None] * size + (row * num_channels + channels)[None, :],
                mask=(bands < num_bands)[:, None] & in_channels[None, :], other=0.0,
            )  # fmt: skip
            rounded = gains[block].to(weights.dtype)
            value = tl.dot(rounded, weights, value, input_precision=PRECISION)
            if SPLIT:  # what rounding a gain to 16 bits left over, which all of a group's weights would share
                value = tl.dot((gains[block] - rounded.to(tl.float32)).to(weights.dtype), weights, value)
    else:
        filter, position = row // POSITIONS, row % POSITIONS
        matrix_row = filter * KERNEL_HEIGHT + position // KERNEL_WIDTH
        places = (matrix_row * num_channels + channels) * KERNEL_WIDTH + position % KERNEL_WIDTH
        value = tl.load(
            source + samples.to(tl.int64)[:, None] * size + places[None, :],
            mask=in_batch[:, None] & in_channels[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
    return value


@triton.jit
def inverse_gate(neighbours, local_weight, row, TAPS: tl.constexpr):
    """What the weight is divided by for half its dense gate (BLOCK_B, BLOCK_C), a sigmoid of a sum over channels."""
    logits = neighbours[0] * tl.load(local_weight + row * TAPS)
    for tap in tl.static_range(1, TAPS):
        logits += neighbours[tap] * tl.load(local_weight + row * TAPS + tap)
    return 1 + tl.exp2(logits)


@triton.jit
def load_row_gates(
    filter_gates, position_gates, samples, in_batch, row, filters_stride, positions_stride, POSITIONS: tl.constexpr
):
    """Filter times position gate of the samples in one row (BLOCK_B,)."""
    gate = tl.load(filter_gates + samples * filters_stride + row // POSITIONS, mask=in_batch, other=0.0)
    if POSITIONS > 1:
        gate *= tl.load(position_gates + samples * positions_stride + row % POSITIONS, mask=in_batch, other=0.0)
    return gate


@triton.jit
def gated_weights_kernel(
    out, source, gains, channel_gates, filter_gates, position_gates, local_input, local_weight,
    batch, num_filters, num_channels, num_bands, gains_stride, channels_stride, filters_stride, positions_stride,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, TAPS: tl.constexpr, FROM_BANK: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BAND_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block of samples and channels; without gates, TAPS is 0."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    batch_blocks, channel_blocks = tl.cdiv(batch, BLOCK_B), tl.cdiv(num_channels, BLOCK_C)
    program = tl.program_id(0)
    # Blocks of samples first: they read the same part of the bank.
    samples = program % batch_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    channels = program // batch_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = program // (batch_blocks * channel_blocks) * ROWS
    in_batch, in_channels = samples < batch, channels < num_channels
    inside = in_batch[:, None] & in_channels[None, :]
    rows = num_filters * POSITIONS
    target = out + samples.to(tl.int64)[:, None] * rows * num_channels + channels[None, :]
    own_gains = load_gains(
        gains, samples, in_batch, gains_stride, num_bands, FROM_BANK=FROM_BANK, BAND_BLOCKS=BAND_BLOCKS, BLOCK_N=BLOCK_N
    )
    neighbours = load_neighbours(local_input, samples, in_batch, channels, num_channels, TAPS)
    if TAPS > 0:
        by_channel = 2 * tl.load(
            channel_gates + samples[:, None] * channels_stride + channels[None, :], mask=inside, other=0.0
        )
    for row in range(first, tl.minimum(first + ROWS, rows)):
        value = mixed_weights(
            source, own_gains, samples, in_batch, channels, in_channels, row=row, num_channels=num_channels,
            num_filters=num_filters, num_bands=num_bands, KERNEL_HEIGHT=KERNEL_HEIGHT, KERNEL_WIDTH=KERNEL_WIDTH,
            FROM_BANK=FROM_BANK, SPLIT=SPLIT, PRECISION=PRECISION, BAND_BLOCKS=BAND_BLOCKS, BLOCK_B=BLOCK_B,
            BLOCK_C=BLOCK_C, BLOCK_N=BLOCK_N,
        )  # fmt: skip
        if TAPS > 0:
            by_row = load_row_gates(
                filter_gates, position_gates, samples, in_batch, row, filters_stride=filters_stride,
                positions_stride=positions_stride, POSITIONS=POSITIONS,
            )  # fmt: skip
            value = value * by_row[:, None] * by_channel / inverse_gate(neighbours, local_weight, row, TAPS)
        tl.store(target + row * num_channels, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def ungate_kernel(
    grad, source, gains, channel_gates, filter_gates, position_gates, local_input, local_weight,
    grad_mixed, grad_logits, row_sums, channel_sums,
    batch, num_filters, num_channels, num_bands, gains_stride, channels_stride, filters_stride, positions_stride,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, TAPS: tl.constexpr, FROM_BANK: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, BAND_BLOCKS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of a block of samples and channels: see :func:`ungate`."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    batch_blocks, channel_blocks = tl.cdiv(batch, BLOCK_B), tl.cdiv(num_channels, BLOCK_C)
    program = tl.program_id(0)
    samples = program % batch_blocks * BLOCK_B + tl.arange(0, BLOCK_B)
    channel_block = program // batch_blocks % channel_blocks
    channels = channel_block * BLOCK_C + tl.arange(0, BLOCK_C)
    row_block = program // (batch_blocks * channel_blocks)
    in_batch, in_channels = samples < batch, channels < num_channels
    inside = in_batch[:, None] & in_channels[None, :]
    rows = num_filters * POSITIONS
    offset = samples.to(tl.int64)[:, None] * rows * num_channels
    own_gains = load_gains(
        gains, samples, in_batch, gains_stride, num_bands, FROM_BANK=FROM_BANK, BAND_BLOCKS=BAND_BLOCKS, BLOCK_N=BLOCK_N
    )
    neighbours = load_neighbours(local_input, samples, in_batch, channels, num_channels, TAPS)
    by_channel = tl.load(channel_gates + samples[:, None] * channels_stride + channels[None, :], mask=inside, other=0.0)
    sums = tl.zeros((BLOCK_B, BLOCK_C), tl.float32)
    first = row_block * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        value = mixed_weights(
            source, own_gains, samples, in_batch, channels, in_channels, row=row, num_channels=num_channels,
            num_filters=num_filters, num_bands=num_bands, KERNEL_HEIGHT=KERNEL_HEIGHT, KERNEL_WIDTH=KERNEL_WIDTH,
            FROM_BANK=FROM_BANK, SPLIT=SPLIT, PRECISION=PRECISION, BAND_BLOCKS=BAND_BLOCKS, BLOCK_B=BLOCK_B,
            BLOCK_C=BLOCK_C, BLOCK_N=BLOCK_N,
        )  # fmt: skip
        gate = 1 / inverse_gate(neighbours, local_weight, row, TAPS)
        by_row = load_row_gates(
            filter_gates, position_gates, samples, in_batch, row, filters_stride=filters_stride,
            positions_stride=positions_stride, POSITIONS=POSITIONS,
        )  # fmt: skip
        places = offset + row * num_channels + channels[None, :]
        slope = 2 * gate * tl.load(grad + places, mask=inside, other=0.0).to(tl.float32)
        product = slope * value
        sums += product * by_row[:, None]
        in_sums = (channel_block * batch + samples).to(tl.int64) * rows + row
        tl.store(row_sums + in_sums, tl.sum(product * by_channel, axis=1), mask=in_batch)
        scale = by_channel * by_row[:, None]
        tl.store(grad_logits + places, (product * scale * (1 - gate)).to(grad_logits.dtype.element_ty), mask=inside)
        if FROM_BANK:
            in_mixed = places
        else:
            matrix_row = row // POSITIONS * KERNEL_HEIGHT + row % POSITIONS // KERNEL_WIDTH
            in_matrix = (matrix_row * num_channels + channels[None, :]) * KERNEL_WIDTH + row % POSITIONS % KERNEL_WIDTH
            in_mixed = offset + in_matrix
        tl.store(grad_mixed + in_mixed, (slope * scale).to(grad_mixed.dtype.element_ty), mask=inside)
    in_sums = (row_block * batch + samples).to(tl.int64)[:, None] * num_channels + channels[None, :]
    tl.store(channel_sums + in_sums, sums, mask=inside)


def layout(
    tile: Tile, source: Tensor, bands: Tensor, local_weight: Tensor | None, shape: torch.Size, kernel_size: list[int],
    from_bank: bool,
) -> dict[str, int | str | bool]:  # fmt: skip
    """What both kernels are compiled for, by their names for it, given the shape of the weights."""
    num_bands = bands.shape[1]
    block_n = next_block(num_bands, 16, 64)
    # Exact products of float32 need more registers.
    samples = min(tile.samples, 32) if from_bank and source.dtype == torch.float32 else tile.samples
    return {
        "BLOCK_B": next_block(shape[0], 16, samples), "BLOCK_C": next_block(shape[3], 16, tile.channels),
        "ROWS": tile.rows, "num_warps": tile.warps,
        "KERNEL_HEIGHT": kernel_size[0], "KERNEL_WIDTH": kernel_size[1],
        "TAPS": 0 if local_weight is None else local_weight.shape[2], "FROM_BANK": from_bank,
        "SPLIT": from_bank and source.dtype != torch.float32, "PRECISION": precision_of(source.dtype),
        "BAND_BLOCKS": blocks_of(num_bands, block_n), "BLOCK_N": block_n,
    }  # fmt: skip


def gated_weights_fake(
    source: Tensor, bands: Tensor, channels: Tensor | None, filters: Tensor | None, positions: Tensor | None,
    local_input: Tensor | None, local_weight: Tensor | None, kernel_size: list[int], from_bank: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Empty tensor in the shape of the result of :func:`gated_weights`."""
    positions = math.prod(kernel_size)
    num_filters, num_channels = source.shape[1] // positions, source.shape[2]
    if not from_bank:
        num_filters, num_channels = source.shape[1] // kernel_size[0], source.shape[2] // kernel_size[1]
    return source.new_empty(len(bands), num_filters, positions, num_channels, dtype=dtype)


GATES = "Tensor bands, Tensor? channels, Tensor? filters, Tensor? positions, Tensor? local_input, Tensor? local_weight"


@kernel(f"(Tensor source, {GATES}, int[] kernel_size, bool from_bank, ScalarType dtype) -> Tensor", gated_weights_fake)
def gated_weights(
    source: Tensor, bands: Tensor, channels: Tensor | None, filters: Tensor | None, positions: Tensor | None,
    local_input: Tensor | None, local_weight: Tensor | None, kernel_size: list[int], from_bank: bool,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Makes the gated weights of samples.

    Args:
        source: The bank (n, Cout*kh*kw, Cin), or FDW's weights of the samples (B, R, C) in float32.
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
        source, bands, channels, filters, positions, local_input, local_weight=local_weight, kernel_size=kernel_size,
        from_bank=from_bank, dtype=dtype,
    )  # fmt: skip
    batch, num_filters, _, num_channels = out.shape
    num_bands = bands.shape[1]
    distances = sample_strides(bands, channels, filters, positions)
    sizes = layout(GATED, source, bands, local_weight, out.shape, kernel_size, from_bank=from_bank)
    gated_weights_kernel[(programs(out.shape, sizes),)](
        out, source, bands, channels, filters, positions, local_input=local_input, local_weight=local_weight,
        batch=batch, num_filters=num_filters, num_channels=num_channels, num_bands=num_bands, **distances, **sizes,
    )  # fmt: skip
    return out


def sample_strides(
    bands: Tensor, channels: Tensor | None, filters: Tensor | None, positions: Tensor | None
) -> dict[str, int]:
    """Distances of the gates' samples, by the kernels' names for them."""
    gates = {"gains": bands, "channels": channels, "filters": filters, "positions": positions}
    return {f"{name}_stride": 0 if gate is None else gate.stride(0) for name, gate in gates.items()}


def programs(shape: torch.Size, sizes: dict[str, int | str | bool]) -> int:
    """Programs for weights of a shape."""
    batch, num_filters, num_positions, num_channels = shape
    row_blocks = blocks_of(num_filters * num_positions, sizes["ROWS"])
    return blocks_of(batch, sizes["BLOCK_B"]) * blocks_of(num_channels, sizes["BLOCK_C"]) * row_blocks


def ungate_fake(
    grad: Tensor, source: Tensor, bands: Tensor, channels: Tensor, filters: Tensor, positions: Tensor | None,
    local_input: Tensor, local_weight: Tensor, kernel_size: list[int], from_bank: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Empty tensors in the shapes of the results of :func:`ungate`."""
    batch, num_filters, num_positions, num_channels = grad.shape
    block_c = next_block(num_channels, 16, UNGATED.channels)
    rows = num_filters * num_positions
    return (
        source.new_empty(batch, *source.shape[1:]),
        grad.new_empty(batch, rows, num_channels),
        bands.new_empty(blocks_of(num_channels, block_c), batch, rows),
        bands.new_empty(blocks_of(rows, UNGATED.rows), batch, num_channels),
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
        Gradients of FDW's weights in the layout and dtype of `source`, and of the dense gate's logits
        (B, Cout*kh*kw, Cin) in that of `grad`; and, in float32, parts of sums of the gradient times the weight without
        filter and position gates, over channels (parts, B, Cout*kh*kw), and without channel gates, over filters and
        positions (parts, B, Cin).
    """
    results = ungate_fake(
        grad, source, bands, channels, filters, positions, local_input=local_input, local_weight=local_weight,
        kernel_size=kernel_size, from_bank=from_bank,
    )  # fmt: skip
    grad_mixed, grad_logits, row_sums, channel_sums = results
    batch, num_filters, _, num_channels = grad.shape
    num_bands = bands.shape[1]
    distances = sample_strides(bands, channels, filters, positions)
    sizes = layout(UNGATED, source, bands, local_weight, grad.shape, kernel_size, from_bank=from_bank)
    ungate_kernel[(programs(grad.shape, sizes),)](
        grad, source, bands, channels, filters, positions, local_input=local_input, local_weight=local_weight,
        grad_mixed=grad_mixed, grad_logits=grad_logits, row_sums=row_sums, channel_sums=channel_sums,
        batch=batch, num_filters=num_filters, num_channels=num_channels, num_bands=num_bands, **distances, **sizes,
    )  # fmt: skip
    return results
