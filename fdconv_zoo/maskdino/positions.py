"""Positions as sines, centres of places, logits of boxes, and boxes of masks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import box_convert

TEMPERATURE = 10000
EPSILON = 1e-5


def sine(positions: Tensor, width: int) -> Tensor:
    """Encode numbers (...) in [0, 1] as (..., width), sine and cosine by turns."""
    exponents = torch.arange(width // 2, device=positions.device) * 2 / width
    angles = 2 * math.pi * positions[..., None] / TEMPERATURE**exponents
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)


def map_positions(height: int, width: int, channels: int, device: torch.device) -> Tensor:
    """Encode the places of a map (height * width, channels): half of the channels for y, then half for x.

    The last row and column are at 2 pi; places are not shifted to pixel centres, unlike those of Deformable DETR.
    """
    rows, columns = (
        sine(torch.arange(1, size + 1, device=device) / (size + 1e-6), channels // 2) for size in (height, width)
    )
    grid = torch.cat((rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)), -1)
    return grid.flatten(0, 1)


def box_positions(boxes: Tensor, channels: int) -> Tensor:
    """Encode boxes (..., 4) as (..., 2 * channels): y, x, w, h, half of the channels for each.

    The original has 128 for each, whatever the width; its published widths of 256 are the same.
    """
    cx, cy, w, h = boxes.unbind(-1)
    return sine(torch.stack((cy, cx, w, h), -1), channels // 2).flatten(-2)


def centres(shapes: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """Return the centres (1, S, 2) of all places of maps, x and y in [0, 1]."""
    points = [
        torch.cartesian_prod(
            (torch.arange(height, device=device) + 0.5) / height, (torch.arange(width, device=device) + 0.5) / width
        )
        for height, width in shapes
    ]
    return torch.cat(points).flip(-1)[None]


def logit(x: Tensor) -> Tensor:
    """The inverse of the logistic function, with `x` and `1 - x` kept above 1e-5."""
    return torch.log(x.clamp(EPSILON, 1) / (1 - x).clamp(EPSILON, 1))


def _extent(present: Tensor) -> tuple[Tensor, Tensor]:
    """First and last index of True in (..., n); n and -1 where there is none."""
    index = torch.arange(present.shape[-1], device=present.device)
    first = torch.where(present, index, present.shape[-1]).amin(-1)
    return first, torch.where(present, index, -1).amax(-1)


def boxes_of_masks(masks: Tensor, kind: str) -> Tensor:
    """Return the boxes (..., 4), (cx, cy, w, h) in [0, 1], around masks (..., H, W) of bool.

    Args:
        masks: True inside.
        kind: "bitmask" counts the last row and column in, and gives an empty mask the box (0, 0, 0, 0); "mask2box"
            leaves them out, and gives it (1, 1, 0, 0).
    """
    x1, x2 = _extent(masks.any(-2))
    y1, y2 = _extent(masks.any(-1))
    height, width = masks.shape[-2:]
    last = 1 if kind == "bitmask" else 0
    size = masks.new_tensor((width, height, width, height), dtype=torch.float32)
    boxes = box_convert(torch.stack((x1, y1, x2 + last, y2 + last), -1) / size, "xyxy", "cxcywh")
    empty = masks.new_tensor((0, 0, 0, 0) if kind == "bitmask" else (1, 1, 0, 0), dtype=torch.float32)
    return torch.where(masks.flatten(-2).any(-1)[..., None], boxes, empty)
