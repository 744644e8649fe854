"""FBM's bands on a GPU: a kernel that filters and gates a map that fits a program, and its adjoint.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.3)

A low-pass is P_h x P_w with P a projection onto few frequencies, whose elements are a Dirichlet kernel of the distance.
A map is read once and written once. The gates' convolution is PyTorch's.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ...low_pass import num_kept
from .launch import blocks_of, kernel, next_block, precision_of, strides


@triton.jit
def rounded(value, PRECISION: tl.constexpr):
    """Rounds to TF32 where products take it: they cut digits off, which would make all low-passes smaller."""
    if PRECISION == "tf32":
        return (value.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)
    else:
        return value


@triton.jit
def projections_kernel(
    out, kept, height, width, BANDS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Both projections of each band: of columns (BLOCK_H, BLOCK_H), then of rows (BLOCK_W, BLOCK_W)."""
    for band in tl.static_range(BANDS):
        base = out + band * (BLOCK_H * BLOCK_H + BLOCK_W * BLOCK_W)
        if tl.program_id(0) == 2 * band:
            store_projection(base, height, kept[2 * band], PRECISION, BLOCK_H)
        if tl.program_id(0) == 2 * band + 1:
            store_projection(base + BLOCK_H * BLOCK_H, width, kept[2 * band + 1], PRECISION, BLOCK_W)


@triton.jit
def store_projection(out, size, kept, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    """Projection (BLOCK, BLOCK) of `size` pixels onto the frequencies below kept / 2: cosines summed in closed form."""
    first, second = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    distance = tl.abs(first - second)
    # Whole turns are dropped in integers, so that angles stay exact. sin(pi (kept-1) d / N) / sin(pi d / N) / N
    functions = kept - 1
    turn = (functions * distance) % (2 * size)
    unit = 3.141592653589793 / size
    below = tl.sin(distance.to(tl.float32) * unit)
    above = tl.sin(turn.to(tl.float32) * unit)
    on_diagonal = distance == 0
    value = tl.where(on_diagonal, functions.to(tl.float32), above / tl.where(on_diagonal, 1.0, below))
    inside = (first < size) & (second < size)
    tl.store(out + first * BLOCK + second, rounded(tl.where(inside, value / size, 0.0), PRECISION))


@triton.jit
def low_pass(maps, projections, band, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Low-pass of a map (BLOCK_H, BLOCK_W)."""
    base = projections + band * (BLOCK_H * BLOCK_H + BLOCK_W * BLOCK_W)
    rows, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
    right = tl.load(base + BLOCK_H * BLOCK_H + columns[:, None] * BLOCK_W + columns[None, :])
    half = tl.dot(rounded(maps, PRECISION), right, input_precision=PRECISION)
    left = tl.load(base + rows[:, None] * BLOCK_H + rows[None, :])
    return tl.dot(left, rounded(half, PRECISION), input_precision=PRECISION)


@triton.jit
def load_gate(logits, offset, bias, inside):
    """Gate of one band over a map, twice a sigmoid."""
    return 2 * tl.sigmoid(tl.load(logits + offset, mask=inside, other=0.0).to(tl.float32) + bias.to(tl.float32))


@triton.jit
def modulate_kernel(
    out, x, logits, bias, projections, channels, height, width, x_batch, x_channel, x_row, x_column,
    out_batch, out_channel, out_row, out_column, logit_batch, logit_band, logit_pixel,
    BANDS: tl.constexpr, ADJOINT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One channel of one sample: the sum of the map and its low-passes times their factors (Eq. 9).

    Low-passes are symmetric: the adjoint multiplies by the factors before them.
    """
    sample, channel = (tl.program_id(0) // channels).to(tl.int64), tl.program_id(0) % channels
    rows, columns = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_W)[None, :]
    inside = (rows < height) & (columns < width)
    # Offsets of pixels have 32 bits: those of 64 would take half the registers.
    x += sample * x_batch + channel.to(tl.int64) * x_channel
    maps = tl.load(x + (rows * x_row + columns * x_column), mask=inside, other=0.0).to(tl.float32)
    logits += sample * logit_batch
    offset = (rows * width + columns) * logit_pixel
    gate = load_gate(logits, offset, tl.load(bias), inside)
    total = maps * gate
    for band in tl.static_range(BANDS):
        if band + 1 < BANDS:
            lower = load_gate(logits, offset + (band + 1) * logit_band, tl.load(bias + band + 1), inside)
        else:
            lower = tl.full((BLOCK_H, BLOCK_W), 1.0, tl.float32)
        if ADJOINT:
            total += low_pass(maps * (lower - gate), projections, band, PRECISION, BLOCK_H, BLOCK_W)
        else:
            total += low_pass(maps, projections, band, PRECISION, BLOCK_H, BLOCK_W) * (lower - gate)
        gate = lower
    out += sample * out_batch + channel.to(tl.int64) * out_channel
    tl.store(out + (rows * out_row + columns * out_column), total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def grad_factors_kernel(
    out, grad, x, projections, channels, height, width, channel_blocks, x_batch, x_channel, x_row, x_column,
    grad_batch, grad_channel, grad_row, grad_column,
    BANDS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Of one sample and CHANNELS channels, the sums over channels of the gradient times the map and its low-passes."""
    program = tl.program_id(0)
    sample, block = (program // channel_blocks).to(tl.int64), program % channel_blocks
    rows, columns = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_W)[None, :]
    in_map = (rows < height) & (columns < width)
    pixels, count = rows * width + columns, height * width
    for part in tl.static_range(BANDS + 1):
        total = tl.zeros((BLOCK_H, BLOCK_W), tl.float32)
        for number in range(CHANNELS):
            channel = (block * CHANNELS + number).to(tl.int64)
            inside = in_map & (channel < channels)
            place = x + sample * x_batch + channel * x_channel
            maps = tl.load(place + (rows * x_row + columns * x_column), mask=inside, other=0.0).to(tl.float32)
            if part > 0:
                maps = low_pass(maps, projections, part - 1, PRECISION, BLOCK_H, BLOCK_W)
            place = grad + sample * grad_batch + channel * grad_channel
            slope = tl.load(place + (rows * grad_row + columns * grad_column), mask=inside, other=0.0)
            total += maps * slope.to(tl.float32)
        target = (program.to(tl.int64) * (BANDS + 1) + part) * count + pixels
        tl.store(out + target, total, mask=in_map)


@triton.jit
def grad_logits_kernel(
    out, factors, logits, bias, parts, count, pixel_blocks, logit_batch, logit_band, logit_pixel,
    BANDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of pixels of one sample and band: the gradient of its gate's factors, and through twice a sigmoid."""
    band, sample = tl.program_id(0) % BANDS, (tl.program_id(0) // BANDS // pixel_blocks).to(tl.int64)
    pixels = tl.program_id(0) // BANDS % pixel_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = pixels < count
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        place = factors + ((sample * parts + part) * (BANDS + 1) + band) * count + pixels
        # The gate is added to the map's or the low-pass's factor above it and taken from that of the one below.
        total += tl.load(place, mask=inside, other=0.0) - tl.load(place + count, mask=inside, other=0.0)
    place = logits + sample * logit_batch + pixels * logit_pixel + band * logit_band
    gate = load_gate(place, 0, tl.load(bias + band), inside)
    tl.store(out + (sample * BANDS + band) * count + pixels, total * gate * (1 - 0.5 * gate), mask=inside)


def sizes_kept(x: Tensor, cutoffs: list[int]) -> tuple[int, ...]:
    """Rows and columns of functions that each low-pass of a map keeps, one after the other."""
    pairs = zip(cutoffs[::2], cutoffs[1::2], strict=True)
    return tuple(num_kept(size, *cutoff) for cutoff in pairs for size in x.shape[2:])


def blocks(x: Tensor) -> dict[str, int | str]:
    """Sizes and precision of a program, by the kernels' names for them."""
    height, width = (next_block(side, 16, 64) for side in x.shape[2:])
    # Exact products of float32 need the registers of more threads.
    warps = 8 if height * width > 1024 or x.dtype == torch.float32 else 4 if height * width > 256 else 1
    return {"PRECISION": precision_of(x.dtype), "BLOCK_H": height, "BLOCK_W": width, "num_warps": warps}


def projections_of(x: Tensor, cutoffs: list[int]) -> Tensor:
    """Projections of all bands, one after the other, as the kernels read them: made once, read by every program."""
    sizes, bands = blocks(x), len(cutoffs) // 2
    height, width = sizes["BLOCK_H"], sizes["BLOCK_W"]
    out = x.new_empty(bands * (height**2 + width**2), dtype=torch.float32)
    projections_kernel[(2 * bands,)](out, sizes_kept(x, cutoffs), *x.shape[2:], BANDS=bands, **sizes)
    return out


def gate_bands_fake(
    x: Tensor, logits: Tensor, bias: Tensor, cutoffs: list[int], adjoint: bool, channels_last: bool
) -> Tensor:
    """Empty tensor in the shape of the result of :func:`gate_bands`."""
    return torch.empty_like(x, memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@kernel(
    "(Tensor x, Tensor logits, Tensor bias, int[] cutoffs, bool adjoint, bool channels_last) -> Tensor",
    gate_bands_fake,
)
def gate_bands(
    x: Tensor, logits: Tensor, bias: Tensor, cutoffs: list[int], adjoint: bool, channels_last: bool
) -> Tensor:
    """Gates the bands of a map.

    Args:
        x: Map (B, C, H, W), of any strides; for the adjoint, the gradient of the result.
        logits: Of the gates (B, n, H, W) without bias, contiguous or channels_last.
        bias: (n,).
        cutoffs: Numerators and denominators, one after the other, widest first.
        adjoint: Compute the gradient of the map, as far as it does not flow through the gates.
        channels_last: Memory format of the result. So its neighbours are read 16 bytes at once by a convolution.
    """
    out = gate_bands_fake(x, logits, bias, cutoffs, adjoint, channels_last)
    batch, channels, height, width = x.shape
    modulate_kernel[(batch * channels,)](
        out, x, logits, bias.contiguous(), projections_of(x, cutoffs), channels, height=height, width=width,
        **strides("x", x), **strides("out", out), logit_batch=logits.stride(0), logit_band=logits.stride(1),
        logit_pixel=logits.stride(3), BANDS=len(cutoffs) // 2, ADJOINT=adjoint, **blocks(x),
    )  # fmt: skip
    return out


# Channels that a program sums over.
CHANNELS = 16


def grad_factors_fake(grad: Tensor, x: Tensor, cutoffs: list[int]) -> Tensor:
    """Empty tensor in the shape of the result of :func:`grad_factors`."""
    batch, channels, height, width = x.shape
    shape = batch, blocks_of(channels, CHANNELS), len(cutoffs) // 2 + 1, height, width
    return x.new_empty(shape, dtype=torch.float32)


@kernel("(Tensor grad, Tensor x, int[] cutoffs) -> Tensor", grad_factors_fake)
def grad_factors(grad: Tensor, x: Tensor, cutoffs: list[int]) -> Tensor:
    """Gradients of the factors of a map and of its low-passes, in parts of their sums over channels.

    Args:
        grad: Gradient (B, C, H, W) of the modulated map.
        x: The map.
        cutoffs: As for :func:`gate_bands`.

    Returns:
        Parts (B, parts, n + 1, H, W) in float32.
    """
    out = grad_factors_fake(grad, x, cutoffs)
    batch, channels, height, width = x.shape
    grad_factors_kernel[(batch * out.shape[1],)](
        out, grad, x, projections_of(x, cutoffs), channels, height, width=width, channel_blocks=out.shape[1],
        **strides("x", x), **strides("grad", grad), BANDS=len(cutoffs) // 2, CHANNELS=CHANNELS, **blocks(x),
    )  # fmt: skip
    return out


# Pixels of a program.
PIXELS = 256


def grad_logits_fake(factors: Tensor, logits: Tensor, bias: Tensor) -> Tensor:
    """Empty tensor in the shape of the result of :func:`grad_logits`."""
    return factors.new_empty(logits.shape)


@kernel("(Tensor factors, Tensor logits, Tensor bias) -> Tensor", grad_logits_fake)
def grad_logits(factors: Tensor, logits: Tensor, bias: Tensor) -> Tensor:
    """Gradient of the gates' logits.

    Args:
        factors: Result (B, parts, n + 1, H, W) of :func:`grad_factors`.
        logits: (B, n, H, W) without bias, contiguous or channels_last.
        bias: (n,).

    Returns:
        Gradient (B, n, H, W) in float32.
    """
    out = grad_logits_fake(factors, logits, bias)
    (batch, bands, height, width), parts = logits.shape, factors.shape[1]
    pixel_blocks = blocks_of(height * width, PIXELS)
    grad_logits_kernel[(batch * bands * pixel_blocks,)](
        out, factors, logits, bias.contiguous(), parts=parts, count=height * width, pixel_blocks=pixel_blocks,
        logit_batch=logits.stride(0), logit_band=logits.stride(1), logit_pixel=logits.stride(3), BANDS=bands,
        BLOCK=PIXELS,
    )  # fmt: skip
    return out


def gate_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Logits (B, n, H, W) of the gates without their bias (Eq. 10), contiguous or channels_last."""
    logits = F.conv2d(x, weight.to(x.dtype), padding=1)
    is_dense = logits.is_contiguous() or logits.is_contiguous(memory_format=torch.channels_last)
    return logits if is_dense else logits.contiguous()


def forward(x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], channels_last: bool) -> Tensor:
    """:func:`fdconv_zoo.layers.ops.modulate_bands` for maps that fit a program; the cutoffs are flat."""
    return gate_bands(x, gate_logits(x, weight), bias, cutoffs, False, channels_last)


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, cutoffs: list[int], need_x: bool, channels_last: bool
) -> list[Tensor]:
    """Gradients of the map, if needed, the weight and the bias of :func:`forward`, given that of its output."""
    logits = gate_logits(x, weight)
    slope = grad_logits(grad_factors(grad, x, cutoffs), logits, bias)
    through_gates, grad_weight, _ = torch.ops.aten.convolution_backward(
        slope.to(x.dtype), x, weight.to(x.dtype), bias_sizes=None, stride=(1, 1), padding=(1, 1),
        dilation=(1, 1), transposed=False, output_padding=(0, 0), groups=1, output_mask=(need_x, True, False),
    )  # fmt: skip
    grads = [grad_weight.to(weight.dtype), slope.sum((0, 2, 3)).to(bias.dtype)]
    if not need_x:
        return grads
    return [gate_bands(grad, logits, bias, cutoffs, True, channels_last).add_(through_gates), *grads]
