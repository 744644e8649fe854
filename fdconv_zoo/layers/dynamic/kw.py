"""KernelWarehouse: each piece of each kernel is a mixture of the cells of a bank that several layers share.

Paper: KernelWarehouse: Rethinking the Design of Dynamic Convolution, ICML 2024, https://arxiv.org/abs/2406.07879
"""

import math
from collections.abc import Callable, Mapping

import torch
from timm.layers import register_notrace_module
from torch import Tensor, nn

from ..ksm import Projection
from .conv2d import DynamicConv2d, add_bias, pooled
from .parts import Annealed, Hidden, draw_by_fan_out
from .warehouse import Place, Warehouse, refuse_below_one

# What the null cell and this leave of a mixture of one cell alone is 1 / (1 + 0.001).
NORM_FLOOR = 1e-3


class KWAttention(Annealed):
    """Contrasting-driven attention: logits over the sum of their magnitudes, which may be negative.

    Its temperature is the paper's beta: 1 for the cells that mixtures start from alone, 0 for the attention alone.

    Args:
        in_channels: Input channels Cin.
        place: The layer's place in its warehouse.
        reduction: Ratio of hidden to input channels; at least 16 are kept.
        nonlocal_basis_ratio: Below 1, the logits of other layers' cells are made from a basis of so many for each.
        norm_layer: Normalisation of the hidden map.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    rest, lowest, highest = 0.0, 0.0, 1.0
    columns: Tensor

    def __init__(
        self,
        in_channels: int,
        place: Place,
        reduction: float,
        nonlocal_basis_ratio: float,
        norm_layer: str | Callable[..., nn.Module],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(device)
        self.column_list = place.columns
        self.mixtures, self.cells = len(place.columns), place.num_cells
        self.start, self.own = place.start, place.own
        self.register_buffer("columns", torch.tensor(place.columns, device=device), persistent=False)
        self.hidden = Hidden(in_channels, reduction, norm_layer, device=device, dtype=dtype)
        others = self.cells - self.own
        self.basis = max(int(others * nonlocal_basis_ratio), 16) if nonlocal_basis_ratio < 1 else 0
        # Logits that one mixture has before those of other layers' cells are made of the basis.
        self.made = self.own + self.basis + 1 if self.basis else self.cells + 1
        self.fc2 = Projection(
            self.hidden.channels, self.mixtures * self.made, bias=not self.basis, device=device, dtype=dtype
        )
        self.fc3 = self.basis_bias = None
        if self.basis:
            self.fc3 = Projection(self.basis, others, bias=False, device=device, dtype=dtype)
            self.basis_bias = nn.Parameter(torch.empty(self.mixtures * (self.cells + 1), device=device, dtype=dtype))
        self.reset_parameters()

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Draws the linear maps; biases are zero."""
        self.hidden.reset_parameters()
        draw_by_fan_out(self.fc2)
        if self.fc3 is not None:
            draw_by_fan_out(self.fc3)
            nn.init.zeros_(self.basis_bias)

    @torch.jit.ignore
    def init_non_persistent_buffers(self) -> None:
        """Sets the temperature to rest, and the columns to those of the layer's place."""
        super().init_non_persistent_buffers()
        self.columns = torch.tensor(self.column_list, device=self.temperature.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KWAttention":
        """Moves the module; `to_empty` from the meta device leaves no columns."""
        super()._apply(fn, recurse)
        if not self.columns.is_meta:
            self.columns.copy_(torch.tensor(self.column_list, device="cpu"))
        return self

    def train(self, mode: bool = True) -> "KWAttention":
        """The columns are made anew: averages of a model's buffers cut integers down."""
        if not self.columns.is_meta:
            with torch.inference_mode(False):
                self.columns = torch.tensor(self.column_list, device=self.columns.device)
        return super().train(mode)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits (B, m, n + 1), the null cell's last."""
        logits = self.fc2(hidden).view(hidden.shape[0], self.mixtures, self.made)
        if self.fc3 is None:
            return logits
        own, basis, null = logits.split([self.own, self.basis, 1], dim=2)
        others = self.fc3(basis)
        logits = torch.cat([others[..., : self.start], own, others[..., self.start :], null], dim=2)
        return logits + self.basis_bias.view(self.mixtures, -1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Share of each cell in each mixture (B, m, n), from the pooled input (B, Cin)."""
        logits = self._logits(self.hidden(pooled))
        shares = logits / (logits.abs().sum(dim=2, keepdim=True) + NORM_FLOOR)
        start = shares.new_zeros(self.mixtures, self.cells + 1).scatter(1, self.columns.unsqueeze(1), 1.0)
        return ((1 - self.temperature) * shares + self.temperature * start)[..., : self.cells]


@register_notrace_module
class KWConv2d(DynamicConv2d):
    """Convolution with a kernel out of a warehouse, in place of nn.Conv2d.

    The first layer made of a warehouse holds the cells, which the others take from it: they go where it goes. Where
    whoever keeps its parameters elsewhere (accelerate, FSDP2) puts them in place for its own forward alone, the others
    call it without an input. TorchScript knows no such reference.

    Args:
        in_channels: As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`, and so on up to `groups`.
        groups: Only 1 is possible.
        bias: Adds a learnt bias.
        warehouse: The warehouse, or None for one of this layer alone, with a budget of 1.
        reduction: Ratio of the attention's hidden channels to Cin; at least 16 are kept.
        nonlocal_basis_ratio: As for :class:`KWAttention`.
        norm_layer: Normalisation in the attention, or timm's name of it. BatchNorm takes its running statistics for a
            batch of one.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Shape:
        As for :class:`~fdconv_zoo.layers.dynamic.conv2d.DynamicConv2d`.

    Raises:
        ValueError: On groups other than 1, or a layer that the warehouse was not planned for.
        RuntimeError: The cells are not in place when the first layer is called.
    """

    method = "KernelWarehouse"
    held = ("cells", "bias")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        warehouse: Warehouse | None = None,
        reduction: float = 1 / 16,
        nonlocal_basis_ratio: float = 1.0,
        norm_layer: str | Callable[..., nn.Module] = nn.BatchNorm2d,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation=dilation, groups=groups)
        if groups != 1:
            raise ValueError(f"groups={groups}, but KWConv2d's cells have all channels: only groups=1")
        if nonlocal_basis_ratio <= 0:
            raise ValueError(f"nonlocal_basis_ratio={nonlocal_basis_ratio}, but it must be above 0")
        factory = {"device": device, "dtype": dtype}
        warehouse = Warehouse([self.static_shape]) if warehouse is None else warehouse
        place = warehouse.place(self)
        self.ratio = warehouse.ratio
        self.attention = KWAttention(in_channels, place, reduction, nonlocal_basis_ratio, norm_layer, **factory)
        self.owned = place.owned
        # In a tuple, where nn.Module does not look: the parameters are the first layer's alone.
        self._first = (place.first,)
        cells = None if place.first is not None else torch.empty(place.num_cells, *place.cell_shape, **factory)
        self.register_parameter("cells", None if cells is None else nn.Parameter(cells))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_channels, **factory)) if bias else None)
        if cells is not None:
            nn.init.zeros_(self.cells)  # until the layers that own them are made
        self.reset_parameters()

    @torch.jit.ignore
    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the layer's own cells and its attention as the paper does; the first layer also the cells of none."""
        bank, own = self.bank(), self.attention.own
        if own:
            start = self.attention.start
            bank[start : start + own].normal_(std=math.sqrt(2 / (own * bank.shape[1])))
        if self.cells is not None and self.owned < len(bank):
            self.cells[self.owned :].normal_(std=math.sqrt(2 / (len(bank) * bank.shape[1])))
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.attention.reset_parameters()

    @torch.jit.ignore
    def first(self) -> "KWConv2d":
        """The layer that holds the cells."""
        return self if self._first[0] is None else self._first[0]

    @torch.jit.ignore
    def bank(self) -> Tensor:
        """The cells (n, co, ci, 1, 1)."""
        return self.first().cells

    @torch.jit.ignore
    def holder(self) -> Tensor:
        """The cells, wherever they are held."""
        return self.first().cells

    @torch.jit.ignore
    def static_state(self, weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
        """An attention at zero, but for a bias that gives each mixture the cell it starts from; without the cells.

        Raises:
            ValueError: The warehouse is too small for static weights.
        """
        refuse_below_one(self.ratio)
        attention = self.attention
        if attention.basis:
            raise ValueError(
                "nonlocal_basis_ratio below 1 with cell_num_ratio of 1 or more: no start from static weights"
            )
        logits = torch.zeros(attention.mixtures, attention.cells + 1, device=weight.device, dtype=weight.dtype)
        logits[torch.arange(attention.mixtures), torch.tensor(attention.column_list)] = 1
        state = {
            "attention.fc2.weight": torch.zeros_like(attention.fc2.weight),
            "attention.fc2.bias": logits.flatten(),
        }
        return state if bias is None else {**state, "bias": bias}

    @torch.jit.ignore
    def put_static(
        self, state: dict[str, Tensor], prefixes: Mapping[nn.Module, str], weight: Tensor, bias: Tensor | None
    ) -> None:
        """Adds the static state to that of a model, the cells under the name of the layer that holds them."""
        super().put_static(state, prefixes, weight, bias)
        key = f"{prefixes[self.first()]}cells"
        bank = state[key] if key in state else self.bank()
        if bank.is_meta and not weight.is_meta:
            # Its numbers are of no use: those that no static weight takes are drawn as a new layer draws them.
            bank = torch.empty_like(bank, device=weight.device).normal_(std=math.sqrt(2 / (len(bank) * bank.shape[1])))
        state[key] = self._with_pieces(bank.detach().to(weight.device, copy=True), weight)

    @torch.jit.ignore
    def _with_pieces(self, bank: Tensor, weight: Tensor) -> Tensor:
        """A bank with the pieces of a static weight in the cells that mixtures start from, in place."""
        filters, channels, kh, kw = self.static_shape
        co, ci = bank.shape[1:3]
        grid = weight.view(filters // co, co, channels // ci, ci, kh, kw).permute(4, 5, 0, 2, 1, 3)
        pieces = grid.reshape(-1, co, ci, 1, 1) * (1 + NORM_FLOOR)
        bank[torch.tensor(self.attention.column_list)] = pieces.to(bank)
        return bank

    @torch.jit.ignore
    @torch.no_grad()
    def set_static(self, weight: Tensor, bias: Tensor | None) -> None:
        """Takes over the static weight and bias; other layers' cells stay."""
        super().set_static(weight, bias)
        self._with_pieces(self.bank(), weight.reshape(self.static_shape))

    def _adopt(self, static: nn.Module, weights_follow: bool = False) -> None:
        super()._adopt(static, weights_follow)
        trains, cells_train = static.weight.requires_grad, self.bank().requires_grad
        if self._first[0] is not None and trains != cells_train:
            words = {True: "is trained", False: "is frozen"}
            raise ValueError(
                f"its static weight {words[trains]}, but that of its warehouse's first layer {words[cells_train]}, and "
                "they share their cells: freeze or train all layers of a warehouse, or leave some with include"
            )

    @torch.jit.ignore
    def static_weight(self) -> Tensor:
        """What the cells that mixtures start from make (Cout, Cin, kh, kw).

        Raises:
            ValueError: The warehouse is too small for static weights.
        """
        refuse_below_one(self.ratio)
        filters, channels, kh, kw = self.static_shape
        bank = self.bank()
        co, ci = bank.shape[1:3]
        pieces = bank[torch.tensor(self.attention.column_list)].view(kh, kw, filters // co, channels // ci, co, ci)
        return pieces.permute(2, 4, 3, 5, 0, 1).reshape(self.static_shape) / (1 + NORM_FLOOR)

    def forward(self, x: Tensor | None) -> Tensor:
        """Convolves x: see the class for its shape. Without x, for the other layers, hands over a copy of the cells."""
        # The cells are a parameter of this layer in checkpoints, so that the hooks which put them in place are its own.
        return self.cells.clone() if x is None else super().forward(x)

    def _cells_beside(self, x: Tensor) -> Tensor:
        """The cells, where x is."""
        cells = self.bank()
        if self._first[0] is not None:
            cells = cells if is_in_place(cells, x) else self._first[0](None)
            if cells.device != x.device and not cells.is_meta:  # layers on several devices
                cells = cells.to(x.device)
        if not is_in_place(cells, x):
            raise RuntimeError(
                f"the cells of the warehouse, which its first layer holds, are a {type(cells).__name__} of "
                f"{list(cells.shape)} on {cells.device}, not in place for a layer that computes on {x.device}. Load "
                "them, if they are not; FSDP2 has to take a layer that holds cells by itself: fully_shard(layer) for "
                "each KWConv2d whose `cells` is not None, before the blocks around them"
            )
        return cells

    def _convolve(self, x: Tensor) -> Tensor:
        return add_bias(self._mix(x, self.attention(pooled(x)), self._cells_beside(x), None), self.bias)


def is_in_place(cells: Tensor, x: Tensor) -> bool:
    """Whether cells are with x: neither elsewhere, nor a shard of FSDP2's, nor flattened or freed."""
    is_shard = hasattr(cells, "device_mesh") and not hasattr(x, "device_mesh")
    return not is_shard and cells.device == x.device and cells.dim() == 5
