"""Fourier Disjoint Weight (FDW): one weight budget in the Fourier domain, split into disjoint frequency groups.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783 (Sec. 3.1)

What differs from the official code:
- The spectrum is stored so that Parseval's theorem holds (norm of the parameter = norm of the weight). A step of SGD on
  it moves the weight exactly as a step on the weight would, so learning rates and weight decay carry over.
- Any number of groups is allowed, also one that does not divide the number of coefficients.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .fourier import GainMap, band_index, check_num_bands, from_spectrum, make_gain_map, to_spectrum
from .ops import weight_matrices
from .ops.bank import make_bank
from .ops.types import Spectrum


class KeptBank(NamedTuple):
    """Weight matrices of the groups, kept between calls.

    Attributes:
        weights: The bank (n, Cout*kh*kw, Cin).
        source: The spectrum it was made from.
        version: That of the spectrum's values.
    """

    weights: Tensor
    source: nn.Parameter
    version: int


# By rows, columns, num_bands and official_order of the weight matrix.
GainMaps = dict[tuple[int, int, int, bool], GainMap]


def _sums(index: Tensor, tiles: Tensor) -> tuple[int, int] | None:
    """Sums of the numbers in a gain map; None where there are no numbers, on the meta device or in fake tensors."""
    if any(type(part) is not Tensor or part.is_meta for part in (index, tiles)):
        return None
    return int(index.sum()), int(tiles.sum())


class FDW(nn.Module):
    """Fourier Disjoint Weight: the spectrum of a weight matrix and the groups of its coefficients.

    Args:
        rows: Rows R = Cout*kh of the weight matrix.
        columns: Columns C = Cin*kw of the weight matrix.
        num_bands: Frequency groups n.
        official_order: See :func:`~fdconv_zoo.layers.fourier.band_index`.
        kernel_size: (kh, kw).
        init_weights: False leaves the spectrum to be set.
        gain_maps: As for :meth:`init_non_persistent_buffers`.
        device: Device of the parameter.
        dtype: Dtype of the parameter; the transforms run in float32 at least.

    Raises:
        ValueError: If `num_bands` is below 1 or above the number of coefficients.
    """

    gain_index: Tensor
    gain_tiles: Tensor
    kept_bank: KeptBank | None = None
    map_sums: tuple[int, int] | None = None  # of pickles from before it was there

    def __init__(
        self,
        rows: int,
        columns: int,
        num_bands: int = 64,
        official_order: bool = False,
        kernel_size: tuple[int, int] = (1, 1),
        init_weights: bool = True,
        gain_maps: GainMaps | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_num_bands(rows, columns, num_bands)
        self.rows = rows
        self.columns = columns
        self.num_bands = num_bands
        self.official_order = official_order
        self.kept_bank = None
        self.kernel_size = kernel_size
        self.spectrum = nn.Parameter(torch.empty(rows, columns // 2 + 1, 2, device=device, dtype=dtype))
        self.register_buffer("gain_index", None, persistent=False)
        self.register_buffer("gain_tiles", None, persistent=False)
        # Not that of the parameter, which accelerate's init_empty_weights has put on the meta device by now.
        self.init_non_persistent_buffers(gain_maps, torch.empty(0, device=device).device)
        if init_weights:
            self._draw_matrix()

    @property
    def fan_in(self) -> int:
        """Inputs of one output, Cin*kh*kw."""
        return self.columns * self.kernel_size[0]

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Recomputes the gain map and initialises the weight matrix as nn.Conv2d and nn.Linear do."""
        self.init_non_persistent_buffers()
        self._draw_matrix()

    def _draw_matrix(self) -> None:
        bound = self.fan_in**-0.5
        self.set_matrix(torch.empty(self.rows, self.columns, device=self.spectrum.device).uniform_(-bound, bound))

    @torch.jit.ignore
    def init_non_persistent_buffers(self, known: GainMaps | None = None, device: torch.device | None = None) -> None:
        """Recomputes the gain map (timm's and Hugging Face's protocol for what lost its buffers).

        Args:
            known: Gain maps of other layers, to copy this one's from or to add it to: a map takes long to make.
            device: Device of the map; None for that of the spectrum.
        """
        key = self.rows, self.columns, self.num_bands, self.official_order
        place = self.spectrum.device if device is None else device
        with torch.inference_mode(False):  # a layer that is made anew there may be trained later
            gain_map = None if known is None else known.get(key)
            if gain_map is None:
                gain_map = make_gain_map(band_index(*key), self.num_bands, self.columns)
                if known is not None:
                    known[key] = gain_map
            # Copies: modules that share a buffer list it once.
            self.gain_index, self.gain_tiles = (part.to(place, copy=True) for part in gain_map)
        self.map_sums = _sums(*gain_map)

    @torch.jit.ignore
    def _follow_spectrum(self) -> None:
        """Makes the gain map anew where the spectrum has left the meta device without it, by assignment of a tensor."""
        if self.gain_index.is_meta and not self.spectrum.is_meta:
            self.init_non_persistent_buffers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FDW":
        """Moves the module; `to_empty` leaves the gain map's numbers, which are no weights to be loaded."""
        self.drop_bank()
        self._follow_spectrum()
        before = self.gain_index, self.gain_tiles
        super()._apply(fn, recurse)
        after = self.gain_index, self.gain_tiles
        if before[0].is_meta and not after[0].is_meta:
            self.init_non_persistent_buffers()
        elif not after[0].is_meta:
            for name, new, old in zip(("gain_index", "gain_tiles"), after, before, strict=True):
                if new.dtype != old.dtype:  # as of type(), which casts all there is
                    setattr(self, name, old.to(new.device))
                elif new is not old:
                    new.copy_(old)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        self.drop_bank()
        super()._load_from_state_dict(*args)
        self._follow_spectrum()

    @torch.jit.ignore
    def band_index(self) -> Tensor:
        """Group of every coefficient, int32 (R, C//2+1)."""
        tiles = self.gain_tiles[self.gain_index] % self.num_bands
        return tiles.flatten(1)[:, : self.columns // 2 + 1].contiguous()

    @torch.jit.ignore
    def matrix(self) -> Tensor:
        """The weight matrix (R, C) at gains of one: the static weight."""
        self._drop_bank_before_updates()
        return from_spectrum(self.spectrum, self.columns)

    @torch.jit.ignore
    @torch.no_grad()
    def set_matrix(self, matrix: Tensor) -> None:
        """Makes the static weight equal to `matrix` (R, C)."""
        self.spectrum.copy_(to_spectrum(matrix))

    @torch.jit.ignore
    def group_matrix(self, band: int) -> Tensor:
        """The part of the weight matrix (R, C) that group `band` contributes at a gain of one."""
        self._drop_bank_before_updates()
        return from_spectrum(self.spectrum * (self.band_index() == band).unsqueeze(-1), self.columns)

    @torch.jit.ignore
    def matrices(self, gains: Tensor) -> Tensor:
        """Weight matrices (B, R, C) for the gains (B, n) of B samples, in plain operations (Eq. 4-5)."""
        spectrum = self()
        exact_dtype = torch.promote_types(self.spectrum.dtype, torch.float32)
        return weight_matrices(spectrum, gains.to(exact_dtype), self.columns)

    @torch.jit.ignore
    def keep_bank(self, dtype: torch.dtype) -> None:
        """Makes the groups' weights now, for the passes without gradients that follow.

        They are n times the weight's elements in `dtype`, are used for inputs of that dtype only, and are given up when
        the layer is trained, moved, cast or loaded, or a pass records a gradient for the spectrum. Where the spectrum
        changes in place they are not used.
        """
        gain_map = GainMap(self.gain_index, self.gain_tiles)
        with torch.inference_mode(False), torch.no_grad():
            weights = make_bank(self.spectrum, gain_map, self.num_bands, self.columns, self.kernel_size, dtype)
        self.kept_bank = KeptBank(weights, self.spectrum, self.spectrum._version)

    @torch.jit.ignore
    def drop_bank(self) -> None:
        """Gives up what :meth:`keep_bank` made."""
        self.kept_bank = None

    @torch.jit.unused
    def _drop_bank_before_updates(self) -> None:
        """Gives the bank up where a gradient is recorded: a fused optimiser's update leaves no new version behind."""
        if self.kept_bank is not None and torch.is_grad_enabled() and self.spectrum.requires_grad:
            self.drop_bank()

    @torch.jit.unused
    def _usable_bank(self) -> tuple[Tensor | None, int]:
        kept = self.kept_bank
        if kept is None or kept.source is not self.spectrum:
            return None, -1
        return kept.weights, kept.version

    def forward(self) -> Spectrum:
        """The spectrum, the map of its gains, and the bank if one is kept and there is no gradient to compute."""
        if torch.jit.is_scripting():
            return Spectrum(self.spectrum, GainMap(self.gain_index, self.gain_tiles), None, -1)
        else:
            self._follow_spectrum()
            self._drop_bank_before_updates()
            if len(self._forward_hooks) > 0:
                # What hooks into the end of a module may free its parameters there (FSDP2), before they are used.
                return Spectrum(self.spectrum.clone(), GainMap(self.gain_index, self.gain_tiles), None, -1)
            bank, version = self._usable_bank()
            return Spectrum(self.spectrum, GainMap(self.gain_index, self.gain_tiles), bank, version)

    # Not torch.jit.ignore: scripts would take the method over, and call it with a self that is no FDW.
    def train(self, mode: bool = True) -> "FDW":
        """Training changes the spectrum: a kept bank is given up.

        The gain map is made anew where its numbers changed: averages of a model's buffers (`AveragedModel(...,
        use_buffers=True)`) cut integers down.
        """
        if mode:
            self.drop_bank()
        if self.map_sums is not None and _sums(self.gain_index, self.gain_tiles) not in (self.map_sums, None):
            self.init_non_persistent_buffers()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept_bank": None}

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, num_bands={self.num_bands}"
