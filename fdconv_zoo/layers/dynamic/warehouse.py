"""A warehouse: the bank of cells that the layers of one stage share (KernelWarehouse), and who owns which at the start.

Paper: KernelWarehouse: Rethinking the Design of Dynamic Convolution, ICML 2024, https://arxiv.org/abs/2406.07879
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

Shape = tuple[int, int, int, int]


class Place(NamedTuple):
    """A layer's place in its warehouse.

    Attributes:
        first: The layer that holds the cells, or None if this is it.
        cell_shape: Shape (co, ci, 1, 1) of a cell.
        num_cells: Cells n of the warehouse.
        start: Cells before the layer's own.
        own: The layer's own cells, no other layer's.
        owned: Cells that any layer owns; they are the first ones.
        columns: Cell that each mixture starts from; n, the null cell, for those that start from none.
    """

    first: nn.Module | None
    cell_shape: Shape
    num_cells: int
    start: int
    own: int
    owned: int
    columns: list[int]


def refuse_below_one(ratio: float) -> None:
    """Refuse a budget of cells that can't hold static weights.

    Raises:
        ValueError: It is below 1.
    """
    if ratio < 1:
        raise ValueError(
            f"cell_num_ratio={ratio}: a warehouse of fewer cells than the static layers have can't hold their weights, "
            "and models are made by conversion. Take a cell_num_ratio of 1 or more, or put KWConv2d layers of a "
            "Warehouse into a network of your own and train it from scratch"
        )


class Warehouse:
    """The cells of a bank, shared out among layers of these shapes, which are then made in this order.

    Args:
        shapes: Shape (Cout, Cin, kh, kw) of each layer's kernel.
        cell_num_ratio: Budget b: cells for each of a static layer's, 1 for as many weights as in the static layers.
        cell_inplane_ratio: Input channels of a cell, to the greatest number that divides those of all layers.
        cell_outplane_ratio: The same for filters.

    Raises:
        ValueError: On ratios out of range, cells that do not divide the kernels, or, with a budget below 1, so few
            cells that a layer gets none, or cells that no layer gets.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        cell_num_ratio: float = 1.0,
        cell_inplane_ratio: float = 1.0,
        cell_outplane_ratio: float = 1.0,
    ) -> None:
        if not shapes or cell_num_ratio <= 0 or not (0 < cell_inplane_ratio <= 1 and 0 < cell_outplane_ratio <= 1):
            raise ValueError(
                f"{len(shapes)} layers, cell_num_ratio={cell_num_ratio}, cell_inplane_ratio={cell_inplane_ratio}, "
                f"cell_outplane_ratio={cell_outplane_ratio}, but all must be above 0, and the last two at most 1"
            )
        self.shapes = [tuple(shape) for shape in shapes]
        self.ratio = cell_num_ratio
        co = max(int(math.gcd(*(shape[0] for shape in shapes)) * cell_outplane_ratio), 1)
        ci = max(int(math.gcd(*(shape[1] for shape in shapes)) * cell_inplane_ratio), 1)
        for shape in shapes:
            if shape[0] % co or shape[1] % ci:
                raise ValueError(
                    f"cells of {co}x{ci} do not divide a kernel of {shape[0]}x{shape[1]}: choose other ratios"
                )
        self.cell_shape = (co, ci, 1, 1)
        self.mixtures = [kh * kw * (filters // co) * (channels // ci) for filters, channels, kh, kw in shapes]
        self.num_cells = max(int(cell_num_ratio * sum(self.mixtures)), 1)
        self.counts = self._share_out()
        self._first: nn.Module | None = None
        self._taken = 0

    def place(self, layer: nn.Module) -> Place:
        """The place of the next layer.

        Raises:
            ValueError: The warehouse was planned for another one, or for no more.
        """
        index = self._taken
        if index == len(self.shapes) or layer.static_shape != self.shapes[index]:
            planned = self.shapes[index] if index < len(self.shapes) else "no more"
            raise ValueError(f"a layer of {layer.static_shape}, but next in the warehouse's plan is {planned}")
        self._taken += 1
        first, self._first = self._first, self._first or layer
        start, counts = sum(self.counts[:index]), self.counts
        columns = self._columns(self.mixtures[index], start)
        return Place(
            first, self.cell_shape, self.num_cells, start=start, own=counts[index], owned=sum(counts), columns=columns
        )

    def _share_out(self) -> list[int]:
        """How many cells each layer owns."""
        if self.ratio >= 1:
            return [mixtures * int(self.ratio) for mixtures in self.mixtures]
        counts: list[int] = []
        for mixtures in self.mixtures:
            columns = self._columns(mixtures, sum(counts))
            counts.append(sum(column < self.num_cells for column in columns))
        if 0 in counts or sum(counts) < self.num_cells:
            shares = ", ".join(f"{count} of {m}" for count, m in zip(counts, self.mixtures, strict=True))
            raise ValueError(
                f"cell_num_ratio={self.ratio}: {self.num_cells} cells, of which the layers' mixtures start from "
                f"{shares}, but each layer must have one, and each cell a layer: choose other ratios"
            )
        return counts

    def _columns(self, mixtures: int, start: int) -> list[int]:
        if self.ratio >= 1:
            return [start + t * int(self.ratio) for t in range(mixtures)]
        every, columns = int(1 / self.ratio), []
        for t in range(mixtures):
            takes = t % every == (t // every) % every and start < self.num_cells
            columns.append(start if takes else self.num_cells)
            start += takes
        return columns
