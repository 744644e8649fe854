"""Kernels that convolve each sample with its own weight, and their gradients: matrix products over patches that are
never written. Where there is nothing but a product of each sample's rows and its weight, cuBLAS computes it.

Weights are (B, Cout, kh*kw, Cin). Maps may have any strides: channels_last, or a slice of a larger map.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..types import Geometry
from .launch import blocks_of, kernel, next_block, precision_of, strides


@triton.jit
def pixels_of(
    places, in_places, position, height, width, out_width, TOP: tl.constexpr, LEFT: tl.constexpr, DOWN: tl.constexpr,
    RIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, ROW_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr,
):  # fmt: skip
    """Row and column of the pixel that each place of the output sees at a kernel position, and whether there is one."""
    y = places // out_width * DOWN - TOP + position // KERNEL_WIDTH * ROW_STEP
    column = places % out_width * RIGHT - LEFT + position % KERNEL_WIDTH * COLUMN_STEP
    return y, column, in_places & (y >= 0) & (y < height) & (column >= 0) & (column < width)


@triton.jit
def convolve_kernel(
    out, x, weight, bias, num_filters, num_channels, height, width, out_height, out_width,
    x_batch, x_channel, x_row, x_column, out_batch, out_channel, out_row, out_column,
    TOP: tl.constexpr, LEFT: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, ROW_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of filters and places of one sample."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    count = out_height * out_width
    filter_blocks, place_blocks = tl.cdiv(num_filters, BLOCK_O), tl.cdiv(count, BLOCK_P)
    program = tl.program_id(0)
    sample = (program // (filter_blocks * place_blocks)).to(tl.int64)
    filters = program // place_blocks % filter_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    places = program % place_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    out_y, out_x = places // out_width, places % out_width
    in_filters, in_places = filters < num_filters, places < count
    x += sample * x_batch
    weight += sample * num_filters * POSITIONS * num_channels
    total = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    channel_blocks = tl.cdiv(num_channels, BLOCK_C)
    for step in range(POSITIONS * channel_blocks):
        position = step // channel_blocks
        channels = step % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        in_channels = channels < num_channels
        y, column, inside = pixels_of(
            places, in_places, position, height, width, out_width, TOP=TOP, LEFT=LEFT, DOWN=DOWN, RIGHT=RIGHT,
            KERNEL_WIDTH=KERNEL_WIDTH, ROW_STEP=ROW_STEP, COLUMN_STEP=COLUMN_STEP,
        )  # fmt: skip
        left = tl.load(
            weight + (filters[:, None] * POSITIONS + position) * num_channels + channels[None, :],
            mask=in_filters[:, None] & in_channels[None, :], other=0.0,
        )  # fmt: skip
        patch = tl.load(
            x + channels[:, None] * x_channel + (y * x_row + column * x_column)[None, :],
            mask=in_channels[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left, patch, total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(bias + filters, mask=in_filters, other=0.0).to(tl.float32)[:, None]
    target = out + sample * out_batch + filters[:, None] * out_channel + (out_y * out_row + out_x * out_column)[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=in_filters[:, None] & in_places[None, :])


@triton.jit
def grad_input_kernel(
    grad_x, grad, weight, num_filters, num_channels, height, width, out_height, out_width,
    x_batch, x_channel, x_row, x_column, grad_batch, grad_channel, grad_row, grad_column,
    TOP: tl.constexpr, LEFT: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, ROW_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of channels and pixels of one sample: each pixel gathers from the places whose patches hold it."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    count = height * width
    channel_blocks, pixel_blocks = tl.cdiv(num_channels, BLOCK_C), tl.cdiv(count, BLOCK_P)
    program = tl.program_id(0)
    sample = (program // (channel_blocks * pixel_blocks)).to(tl.int64)
    channels = program // pixel_blocks % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    pixels = program % pixel_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    y, column = pixels // width, pixels % width
    in_channels, in_pixels = channels < num_channels, pixels < count
    grad += sample * grad_batch
    weight += sample * num_filters * POSITIONS * num_channels
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    filter_blocks = tl.cdiv(num_filters, BLOCK_O)
    for step in range(POSITIONS * filter_blocks):
        position = step // filter_blocks
        filters = step % filter_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
        in_filters = filters < num_filters
        from_top = y + TOP - position // KERNEL_WIDTH * ROW_STEP
        from_left = column + LEFT - position % KERNEL_WIDTH * COLUMN_STEP
        out_y, out_x = from_top // DOWN, from_left // RIGHT
        inside = in_pixels & (from_top >= 0) & (from_left >= 0) & (out_y < out_height) & (out_x < out_width)
        inside = inside & (out_y * DOWN == from_top) & (out_x * RIGHT == from_left)
        left = tl.load(
            weight + (filters[None, :] * POSITIONS + position) * num_channels + channels[:, None],
            mask=in_filters[None, :] & in_channels[:, None], other=0.0,
        )  # fmt: skip
        slope = tl.load(
            grad + filters[:, None] * grad_channel + (out_y * grad_row + out_x * grad_column)[None, :],
            mask=in_filters[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        total = tl.dot(left, slope, total, input_precision=PRECISION)
    target = grad_x + sample * x_batch + channels[:, None] * x_channel + (y * x_row + column * x_column)[None, :]
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=in_channels[:, None] & in_pixels[None, :])


@triton.jit
def grad_weight_kernel(
    grad_weight, grad, x, num_filters, num_channels, height, width, out_height, out_width,
    x_batch, x_channel, x_row, x_column, grad_batch, grad_channel, grad_row, grad_column,
    TOP: tl.constexpr, LEFT: tl.constexpr, DOWN: tl.constexpr, RIGHT: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr, KERNEL_WIDTH: tl.constexpr, ROW_STEP: tl.constexpr, COLUMN_STEP: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A block of filters and channels of one sample, at one kernel position."""
    POSITIONS: tl.constexpr = KERNEL_HEIGHT * KERNEL_WIDTH
    filter_blocks, channel_blocks = tl.cdiv(num_filters, BLOCK_O), tl.cdiv(num_channels, BLOCK_C)
    program = tl.program_id(0)
    position = program % POSITIONS
    channels = program // POSITIONS % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    filters = program // (POSITIONS * channel_blocks) % filter_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
    sample = (program // (POSITIONS * channel_blocks * filter_blocks)).to(tl.int64)
    in_filters, in_channels = filters < num_filters, channels < num_channels
    x += sample * x_batch
    grad += sample * grad_batch
    count = out_height * out_width
    total = tl.zeros((BLOCK_O, BLOCK_C), tl.float32)
    for first in range(0, count, BLOCK_P):
        places = first + tl.arange(0, BLOCK_P)
        out_y, out_x = places // out_width, places % out_width
        y, column, inside = pixels_of(
            places, places < count, position, height, width, out_width, TOP=TOP, LEFT=LEFT, DOWN=DOWN, RIGHT=RIGHT,
            KERNEL_WIDTH=KERNEL_WIDTH, ROW_STEP=ROW_STEP, COLUMN_STEP=COLUMN_STEP,
        )  # fmt: skip
        slope = tl.load(
            grad + filters[:, None] * grad_channel + (out_y * grad_row + out_x * grad_column)[None, :],
            mask=in_filters[:, None] & inside[None, :], other=0.0,
        )  # fmt: skip
        patch = tl.load(
            x + channels[None, :] * x_channel + (y * x_row + column * x_column)[:, None],
            mask=in_channels[None, :] & inside[:, None], other=0.0,
        )  # fmt: skip
        total = tl.dot(slope, patch, total, input_precision=PRECISION)
    target = grad_weight + (sample * num_filters + filters[:, None]) * POSITIONS * num_channels
    target += position * num_channels + channels[None, :]
    tl.store(target, total.to(grad_weight.dtype.element_ty), mask=in_filters[:, None] & in_channels[None, :])


GEOMETRY = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"


def constants(
    kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int], dtype: torch.dtype
) -> dict[str, int | str]:
    """A geometry, and the precision of products, by the names that the kernels have for them."""
    return {
        "TOP": padding[2], "LEFT": padding[0], "DOWN": stride[0], "RIGHT": stride[1],
        "KERNEL_HEIGHT": kernel_size[0], "KERNEL_WIDTH": kernel_size[1],
        "ROW_STEP": dilation[0], "COLUMN_STEP": dilation[1], "PRECISION": precision_of(dtype),
    }  # fmt: skip


def blocks(filters: int, places: int, channels: int, summed: str, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of a program's block: small steps along the axis that is summed over, else as large as registers allow."""
    widest = 64 if dtype == torch.float32 else 128
    limits = {
        name: widest if name != summed else (32 if dtype == torch.float32 else 64)
        for name in ("BLOCK_O", "BLOCK_P", "BLOCK_C")
    }
    counts = {"BLOCK_O": filters, "BLOCK_P": places, "BLOCK_C": channels}
    sizes = {name: next_block(counts[name], 16, limit) for name, limit in limits.items()}
    accumulated = math.prod(size for name, size in sizes.items() if name != summed)
    return {**sizes, "num_warps": 8 if accumulated > 4096 else 4}


def are_rows(geometry: Geometry, *maps: Tensor) -> bool:
    """Whether a convolution is a product of each map's rows of channels (B, H*W, C), as cuBLAS takes them."""
    if geometry.kernel_size != (1, 1) or geometry.stride != (1, 1) or geometry.padding != (0, 0, 0, 0):
        return False
    return all(a.is_contiguous(memory_format=torch.channels_last) for a in maps)


def rows_of(maps: Tensor) -> Tensor:
    """Rows (B, H*W, C) of maps (B, C, H, W) in channels_last, a view."""
    return maps.movedim(1, -1).flatten(1, 2)


def convolve_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    """Empty tensor in the shape of the result of :func:`convolve`."""
    geometry = Geometry.of(kernel_size, stride, padding, dilation)
    size = geometry.checked_output_size(x.shape[2], x.shape[3])
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((len(x), weight.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=layout)


@kernel(f"(Tensor x, Tensor weight, Tensor? bias, {GEOMETRY}, bool channels_last) -> Tensor", convolve_fake)
def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    """Convolves maps x (B, Cin, H, W) with weights (B, Cout, kh*kw, Cin) of their own and adds a bias (Cout,).

    The geometry is that of :class:`Geometry`.

    Returns:
        Output (B, Cout, Hout, Wout).
    """
    geometry = kernel_size, stride, padding, dilation
    if channels_last and are_rows(Geometry.of(*geometry), x):
        rows = torch.bmm(rows_of(x), weight.squeeze(2).mT)
        out = rows.unflatten(1, x.shape[2:]).movedim(-1, 1)
        return out if bias is None else out.add_(bias.to(out.dtype)[:, None, None])
    out = convolve_fake(x, weight, bias, *geometry, channels_last)
    (batch, num_filters, out_height, out_width), num_channels = out.shape, x.shape[1]
    sizes = blocks(num_filters, out_height * out_width, num_channels, "BLOCK_C", x.dtype)
    grid = batch * blocks_of(num_filters, sizes["BLOCK_O"]) * blocks_of(out_height * out_width, sizes["BLOCK_P"])
    convolve_kernel[(grid,)](
        out, x, weight, bias, num_filters, num_channels, height=x.shape[2], width=x.shape[3], out_height=out_height,
        out_width=out_width, **strides("x", x), **strides("out", out), HAS_BIAS=bias is not None,
        **constants(*geometry, x.dtype), **sizes,
    )  # fmt: skip
    return out


def grad_input_fake(
    grad: Tensor, weight: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    """Empty tensor in the shape of the result of :func:`grad_input`."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout)


@kernel(f"(Tensor grad, Tensor weight, Tensor x, {GEOMETRY}, bool channels_last) -> Tensor", grad_input_fake)
def grad_input(
    grad: Tensor, weight: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int],
    dilation: list[int], channels_last: bool,
) -> Tensor:  # fmt: skip
    """Gradient of the map x, which gives the shape alone, of :func:`convolve`, given that of its output."""
    geometry = kernel_size, stride, padding, dilation
    if channels_last and are_rows(Geometry.of(*geometry), grad):
        return torch.bmm(rows_of(grad), weight.squeeze(2)).unflatten(1, x.shape[2:]).movedim(-1, 1)
    out = grad_input_fake(grad, weight, x, *geometry, channels_last)
    (batch, num_channels, height, width), num_filters = x.shape, weight.shape[1]
    sizes = blocks(num_filters, height * width, num_channels, "BLOCK_O", x.dtype)
    grid = batch * blocks_of(num_channels, sizes["BLOCK_C"]) * blocks_of(height * width, sizes["BLOCK_P"])
    grad_input_kernel[(grid,)](
        out, grad, weight, num_filters, num_channels, height, width=width, out_height=grad.shape[2],
        out_width=grad.shape[3], **strides("x", out), **strides("grad", grad), **constants(*geometry, x.dtype), **sizes,
    )  # fmt: skip
    return out


def grad_weight_fake(
    grad: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Empty tensor in the shape of the result of :func:`grad_weight`."""
    return x.new_empty(len(x), grad.shape[1], math.prod(kernel_size), x.shape[1])


@kernel(f"(Tensor grad, Tensor x, {GEOMETRY}) -> Tensor", grad_weight_fake)
def grad_weight(
    grad: Tensor, x: Tensor, kernel_size: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Gradient of the weights of :func:`convolve`, given that of its output."""
    geometry = kernel_size, stride, padding, dilation
    if are_rows(Geometry.of(*geometry), x, grad):
        return torch.bmm(rows_of(grad).mT, rows_of(x)).unsqueeze(2)
    out = grad_weight_fake(grad, x, *geometry)
    (_, num_channels, height, width), (_, num_filters, out_height, out_width) = x.shape, grad.shape
    sizes = blocks(num_filters, out_height * out_width, num_channels, "BLOCK_P", x.dtype)
    grid = len(x) * math.prod(kernel_size) * blocks_of(num_filters, sizes["BLOCK_O"])
    grad_weight_kernel[(grid * blocks_of(num_channels, sizes["BLOCK_C"]),)](
        out, grad, x, num_filters, num_channels, height, width=width, out_height=out_height, out_width=out_width,
        **strides("x", x), **strides("grad", grad), **constants(*geometry, x.dtype), **sizes,
    )  # fmt: skip
    return out
