"""What ``visualize.py`` draws: the gates, bands and weights of FDConv layers as tensors on the CPU."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers import FDW

Layer = FDConv2d | FDLinear
GATES = ("group gains", "input channels", "filters", "kernel positions", "weight elements", "FBM maps")
# Elements of all groups' weights together; float32, with a spectrum of each beside it.
MAX_GROUP_ELEMENTS = 1 << 27


def find_layer(layers: Mapping[str, Layer], name: str | None) -> str:
    """Return the name of the layer to draw: the one asked for, the first with FBM, or the first.

    Raises:
        ValueError: There is no layer of that name, or none at all; lists those there are.
    """
    if not layers:
        raise ValueError("the model has no dynamic layers: take a model that has them, or --convert a static one")
    if name is None:
        with_bands = (name for name, layer in layers.items() if getattr(layer, "fbm", None) is not None)
        return next(with_bands, next(iter(layers)))
    if name not in layers:
        method = next(iter(layers.values())).method
        raise ValueError(f"no {method} layer {name}, there are: {', '.join(layers)}")
    return name


def gates_of(layer: Layer, x: Tensor) -> dict[str, Tensor]:
    """Compute all gates that a layer makes from its input.

    Args:
        layer: The layer, in eval mode.
        x: Its input, (B, Cin, H, W), or (B, ..., Cin) for FDLinear.

    Returns:
        Those of `GATES` that the layer has, each with the photos along the first axis: group gains (B, n), input
        channels (B, Cin), filters (B, Cout), kernel positions (B, kh, kw), weight elements (B, R, C), FBM maps
        (B, bands - 1, H, W).
    """
    x = x.float()
    pooled = x.mean((2, 3)) if isinstance(layer, FDConv2d) else x.flatten(1, -2).mean(1)
    gates = layer.ksm(pooled)
    made = (
        gates.bands,
        gates.channels,
        gates.filters,
        None if gates.positions is None else gates.positions.unflatten(1, layer.kernel_shape),
        layer.ksm.dense_gate(gates),
        None if layer.fbm is None else layer.fbm.gates(x),
    )
    return {kind: gate.float().cpu() for kind, gate in zip(GATES, made, strict=True) if gate is not None}


class LayerInputs:
    """What the layers of a model see during a forward pass.

    Attributes:
        deviation: RMS of gate - 1 over all photos, by layer and kind of gate.
        kept: Input of the one layer that is drawn.
    """

    def __init__(self, kept_name: str) -> None:
        self.kept_name = kept_name
        self.kept: Tensor | None = None
        self.deviation: dict[str, dict[str, float]] = {}

    @contextmanager
    def watch(self, layers: Mapping[str, Layer]) -> Iterator[None]:
        """Look at the layers' inputs while the context lasts."""
        handles = [layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            gates = gates_of(layer, inputs[0])
            self.deviation[name] = {kind: (gate - 1).square().mean().sqrt().item() for kind, gate in gates.items()}
            if name == self.kept_name:
                self.kept = inputs[0]

        return look


def group_matrices(layer: Layer) -> tuple[list[int], Tensor]:
    """Make the spatial weights of single frequency groups.

    Returns:
        Numbers of the groups, lowest frequencies first: all of them, or evenly spread ones where all would take too
        much memory; and their weight matrices (K, R, C).
    """
    count = max(2, min(layer.fdw.num_bands, MAX_GROUP_ELEMENTS // (layer.fdw.rows * layer.fdw.columns)))
    groups = torch.linspace(0, layer.fdw.num_bands - 1, count).round().int().unique().tolist()
    return groups, torch.stack([layer.fdw.group_matrix(group).float().cpu() for group in groups])


def group_energy(fdw: FDW, magnitude: Tensor) -> Tensor:
    """Energy of a weight in each frequency group, from the magnitude of its half spectrum: (R, C//2+1) to (n,).

    A column between the first and the Nyquist one stands for its mirror image too.
    """
    energy = 2 * magnitude.square()
    energy[:, [0, fdw.columns // 2] if fdw.columns % 2 == 0 else [0]] /= 2
    index = fdw.band_index().cpu().flatten().long()
    return torch.zeros(fdw.num_bands).index_add_(0, index, energy.flatten())


def cut_pairs(layer: Layer) -> Tensor:
    """Find the groups that share a frequency because the border between them cuts a pair of mirrored coefficients.

    In the columns of a half spectrum that are their own mirror image, coefficients u and -u are one frequency of a real
    weight. They have equal radius, and the border of two groups may fall between them.

    Returns:
        Numbers of the groups (pairs, 2), the lower one first.
    """
    columns = layer.fdw.columns
    own_mirror = [0, columns // 2] if columns % 2 == 0 else [0]
    group = layer.fdw.band_index().cpu()[:, own_mirror]
    mirrored = group.flip(0).roll(1, 0)
    cut = group < mirrored
    return torch.stack([group[cut], mirrored[cut]], dim=1).long().unique(dim=0)


def random_bank(layer: Layer, size: int) -> Tensor:
    """Draw a bank of static kernels as DY-Conv mixes them, initialised as nn.Conv2d is: matrices (size, R, C)."""
    bound = layer.fdw.fan_in**-0.5
    generator = torch.Generator().manual_seed(0)
    return torch.empty(size, layer.fdw.rows, layer.fdw.columns).uniform_(-bound, bound, generator=generator)


def filters(matrices: Tensor, kernel_height: int) -> Tensor:
    """Take weight matrices (K, Cout*kh, Cin*kw) apart into filters (K, Cout, kh, Cin*kw)."""
    return matrices.unflatten(1, (-1, kernel_height))


def magnitudes(matrices: Tensor) -> Tensor:
    """Magnitude of the half spectra (K, R, C//2+1) of matrices (K, R, C)."""
    return torch.fft.rfft2(matrices, norm="ortho").abs()


def cosine_similarity(vectors: Tensor) -> Tensor:
    """Cosines (K, K) between tensors (K, ...)."""
    rows = F.normalize(vectors.flatten(1), dim=1)
    return rows @ rows.mT


def largest_off_diagonal(similarity: Tensor) -> float:
    """Largest absolute value beside the diagonal of a square matrix."""
    return (similarity - similarity.diag().diag()).abs().max().item()


def kernel_response(matrices: Tensor, kernel_size: tuple[int, int], size: int = 128) -> Tensor:
    """Frequency response of the kernels in weight matrices: RMS of |FFT| over all kernels of a matrix.

    Exact and cheap by the kernels' autocorrelation: E|F(f)|^2 = e(f)^H E[k k^T] e(f), e(f) the Fourier basis.

    Args:
        matrices: Weight matrices (K, Cout*kh, Cin*kw).
        kernel_size: (kh, kw).
        size: Frequencies on an axis.

    Returns:
        Responses (K, size, size), frequency 0 in the centre.
    """
    kh, kw = kernel_size
    kernels = matrices.unflatten(2, (-1, kw)).unflatten(1, (-1, kh)).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    correlation = kernels.mT @ kernels / kernels.shape[1]
    taps = torch.eye(kh * kw).view(-1, kh, kw)
    basis = torch.fft.fftshift(torch.fft.fft2(taps, s=(size, size)), dim=(-2, -1)).flatten(1)
    power = torch.einsum("if,kij,jf->kf", basis.conj(), correlation.to(basis.dtype), basis).real
    return power.clamp(min=0).sqrt().unflatten(1, (size, size))


def plane_radius(rows: int, columns: int, half: bool = False) -> Tensor:
    """Frequency, in cycles per sample, of each place of a spectrum.

    Args:
        rows: Rows of what was transformed.
        columns: Its columns.
        half: False for fftshift(fft2), (rows, columns); True for rfft2, (rows, columns//2+1).
    """
    vertical = torch.fft.fftfreq(rows)
    if half:
        return torch.hypot(vertical[:, None], torch.fft.rfftfreq(columns)[None])
    return torch.fft.fftshift(torch.hypot(vertical[:, None], torch.fft.fftfreq(columns)[None]))


def radial_profile(planes: Tensor, radius: Tensor, rings: int = 40) -> tuple[Tensor, Tensor]:
    """Mean of spectra over rings of equal frequency.

    Args:
        planes: Values (K, H, W).
        radius: Frequency of each place (H, W), see :func:`plane_radius`.
        rings: Number of rings from 0 to the highest frequency.

    Returns:
        Middle of each ring (rings,) in cycles per sample, and means (K, rings), NaN where a ring is empty.
    """
    width = radius.max() / rings
    ring = (radius.flatten() / width).long().clamp(max=rings - 1)
    sums = torch.zeros(len(planes), rings).index_add_(1, ring, planes.flatten(1))
    return (torch.arange(rings) + 0.5) * width, sums / torch.bincount(ring, minlength=rings)


def feature_spectrum(x: Tensor) -> Tensor:
    """Mean magnitude over the channels of a map's spectrum, frequency 0 in the centre: (C, H, W) to (H, W)."""
    return torch.fft.fftshift(torch.fft.fft2(x, norm="ortho").abs().mean(0))
