"""What changes a layer's function and no shape in its checkpoint tells: the order of coefficients and FBM's bands."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .fbm import FBM
from .fdw import FDW


class BandOptions(nn.Module):
    """A few integers in a layer's state dict, compared when it is loaded.

    A buffer, and not extra state: all that reads or writes state dicts knows buffers (safetensors, accelerate, EMA).

    Args:
        fdw: The layer's FDW.
        fbm: The layer's FBM, or None.
        device: Device of the buffer.

    Raises:
        RuntimeError: From `load_state_dict`, if the options of the checkpoint are others. One without them loads.
    """

    values: Tensor
    # No buffer, which would be averaged too.
    _as_set: Tensor | None = None

    def __init__(self, fdw: FDW, fbm: FBM | None, device: torch.device | str | None = None) -> None:
        super().__init__()
        grid = int(fdw.official_order) if fbm is None else fbm.mask_grid or 0
        self.options = [grid, *(number for fraction in (fbm.cutoffs if fbm else []) for number in fraction)]
        self.register_buffer("values", torch.tensor(self.options, device=device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BandOptions":
        """Moves the buffer; `to_empty` leaves its numbers, which a checkpoint may lack."""
        super()._apply(fn, recurse)
        if not self.values.is_meta:
            self._restore()
        return self

    def _restore(self) -> None:
        # On the buffer's device: a copy from the CPU would wait for it, in every update of an average.
        if self._as_set is None or self._as_set.device != self.values.device:
            self._as_set = torch.tensor(self.options, device=self.values.device)
        self.values.copy_(self._as_set)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Saves the numbers as they were set: averages of a model's buffers cut integers down."""
        if not self.values.is_meta and not self.values.is_inference():
            self._restore()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        saved = state_dict.get(f"{prefix}values")
        if saved is None:
            # Of a checkpoint from before this buffer, which is then no missing key.
            if self.values.is_meta and local_metadata.get("assign_to_params_buffers"):
                self.values = torch.tensor(self.options, device="cpu")
            return
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if not saved.is_meta and saved.flatten().tolist() != self.options:
            layer = prefix.removesuffix(".").rpartition(".")[0] or "the layer"
            error_msgs.append(
                f"{layer} has {describe(self.options)} and would compute something else than what was saved, which has "
                f"{describe(saved.tolist())}: build it with that"
            )
        # In memory of its own: an assigned tensor is the checkpoint's.
        self.values = torch.tensor(self.options, device=self.values.device)


def describe(options: list[int]) -> str:
    """The options as keyword arguments of a layer."""
    grid, *numbers = options
    if not numbers:
        return f"mask_grid={64 if grid else None}"
    cutoffs = ", ".join(f"{n:g}/{d:g}" for n, d in zip(numbers[::2], numbers[1::2], strict=True))
    return f"mask_grid={grid or None}, cutoffs=({cutoffs})"
