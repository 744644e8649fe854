"""Figures of a layer's weights for ``visualize.py``: frequency groups beside a bank of kernels and a static layer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE
from torch import Tensor

from fdconv_zoo.layers.fourier import weight_to_matrix
from pictures.layer import (
    Layer,
    cosine_similarity,
    cut_pairs,
    filters,
    group_energy,
    group_matrices,
    kernel_response,
    largest_off_diagonal,
    magnitudes,
    plane_radius,
    radial_profile,
    random_bank,
)

STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.titlesize": 14,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.grid": False,
    "image.cmap": "magma",
    "legend.frameon": False,
}
GROUP_COLORS = "viridis"
BANK_SIZE = 4
SHOWN_GROUPS = 6
SHOWN_FILTERS = 64


@dataclass(frozen=True)
class Weights:
    """Weights of a layer and of what it is compared with, as matrices (K, R, C).

    Attributes:
        groups: Numbers of the frequency groups, lowest frequencies first.
        fdw: Spatial weight of each group.
        bank: Static kernels of random initialisation, as DY-Conv mixes them.
        static: The weight at gains of 1, alone (1, R, C).
        num_bands: Number of all frequency groups.
        cut_pairs: Groups (pairs, 2) that share a frequency, see :func:`pictures.layer.cut_pairs`.
        kernel_size: (kh, kw).
    """

    groups: list[int]
    fdw: Tensor
    bank: Tensor
    static: Tensor
    num_bands: int
    cut_pairs: Tensor
    kernel_size: tuple[int, int]

    @classmethod
    def of(cls, layer: Layer) -> "Weights":
        """Makes them from a layer."""
        weight = layer.static_twin().weight.detach().float().cpu()
        matrix = weight if weight.dim() == 2 else weight_to_matrix(weight)
        return cls(
            *group_matrices(layer),
            bank=random_bank(layer, BANK_SIZE),
            static=matrix[None],
            num_bands=layer.fdw.num_bands,
            cut_pairs=cut_pairs(layer),
            kernel_size=layer.kernel_shape,
        )

    def static_filters(self) -> Tensor:
        """The static layer's first filters (K, kh, Cin*kw)."""
        return filters(self.static, self.kernel_size[0])[0, :SHOWN_FILTERS]

    def without_cut_pairs(self, similarity: Tensor) -> Tensor:
        """Similarity of the groups (K, K) with zeros for those that share a frequency."""
        apart = similarity.clone()
        place = {group: place for place, group in enumerate(self.groups)}
        for pair in self.cut_pairs.tolist():
            if place.keys() >= set(pair):
                low, high = (place[group] for group in pair)
                apart[low, high] = apart[high, low] = 0
        return apart


def spread(count: int, wanted: int) -> list[int]:
    """Up to `wanted` numbers below `count`, evenly spread, the first and the last among them."""
    return torch.linspace(0, count - 1, min(count, wanted)).round().int().tolist()


def group_colors(count: int) -> list[tuple[float, ...]]:
    """Colours of groups, lowest frequencies first."""
    return [colormaps[GROUP_COLORS](0.95 * index / max(1, count - 1)) for index in range(count)]


def draw_similarity(weights: Weights) -> Figure:
    """Draw cosine similarities: of the weights above, of the magnitudes of their spectra below."""
    figure = Figure(figsize=(13, 9))
    axes = figure.subplots(2, 3)
    columns = {
        f"FDW: {len(weights.groups)} of its {weights.num_bands} groups": weights.fdw,
        f"bank of {BANK_SIZE} kernels, random init": weights.bank,
        f"static layer: {len(weights.static_filters())} of its filters": weights.static_filters(),
    }
    for column, (title, matrices) in enumerate(columns.items()):
        for row, vectors in enumerate((matrices, magnitudes(matrices))):
            similarity = cosine_similarity(vectors)
            axis = axes[row, column]
            image = axis.imshow(similarity.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            largest = f"largest off the diagonal: {largest_off_diagonal(similarity):.2g}"
            if column == 0 and len(weights.cut_pairs):
                apart = largest_off_diagonal(weights.without_cut_pairs(similarity))
                largest += f" ({len(weights.cut_pairs)} cut pairs),\nelsewhere: {apart:.1g}"
            axis.set_title(f"{title if row == 0 else 'their magnitude spectra'}\n{largest}")
            number = "group" if column == 0 else "kernel" if column == 1 else "filter"
            ticks = spread(len(similarity), 5)
            labels = [(weights.groups[tick] if column == 0 else tick) + 1 for tick in ticks]
            axis.set(xticks=ticks, yticks=ticks, xticklabels=labels, yticklabels=labels, xlabel=number, ylabel=number)
            if len(similarity) <= BANK_SIZE:
                for i, j in torch.cartesian_prod(*[torch.arange(len(similarity))] * 2).tolist():
                    color = "white" if similarity[i, j].abs() > 0.6 else "black"
                    axis.text(j, i, f"{similarity[i, j]:.2f}", ha="center", va="center", color=color)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.6, pad=0.02)
    return figure


@dataclass(frozen=True)
class Kind:
    """Parallel weights that a figure shows beside others.

    Attributes:
        title: What they are.
        matrices: Weight matrices (K, R, C).
        colors: A colour each.
        labels: A name each.
    """

    title: str
    matrices: Tensor
    colors: Sequence
    labels: Sequence[str]


def kinds_of(weights: Weights) -> tuple[Kind, Kind, Kind]:
    """Some groups of the FDW, the bank, the static layer."""
    shown = spread(len(weights.groups), SHOWN_GROUPS)
    numbers = range(BANK_SIZE)
    labels = [f"group {weights.groups[place] + 1}" for place in shown]
    return (
        Kind("FDW groups", weights.fdw[shown], group_colors(len(shown)), labels),
        Kind(
            f"bank of {BANK_SIZE} kernels, random init",
            weights.bank,
            [f"C{number}" for number in numbers],
            [f"kernel {number + 1}" for number in numbers],
        ),
        Kind("static layer", weights.static, ["black"], ["weight"]),
    )


def _legend_below(axis: Axes, height: float) -> None:
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, height), ncols=3)


def _draw_profiles(axis: Axes, radius: Tensor, profiles: Tensor, kind: Kind) -> None:
    for profile, color, label in zip(profiles / profiles.nan_to_num().amax(), kind.colors, kind.labels, strict=True):
        axis.plot(radius, profile, color=color, label=label, linewidth=1.8)
    axis.set(xlabel="frequency (cycles/sample)", ylim=(0, 1.05), xlim=(0, 0.71))
    axis.grid(alpha=0.3)
    _legend_below(axis, -0.16)


def draw_spectrum(layer: Layer, weights: Weights) -> Figure:
    """Draw the half spectrum of the weight matrix, its groups, their profiles over frequency, and their energy."""
    figure = Figure(figsize=(16, 4.2))
    axes = figure.subplots(1, 5, width_ratios=(0.8, 0.8, 1, 1, 1))
    static = magnitudes(weights.static)[0]
    place = {"extent": (0, 0.5, 0.5, -0.5), "aspect": "equal", "interpolation": "nearest"}
    log_magnitude = torch.fft.fftshift(static.clamp_min(1e-12).log10(), dim=0)
    low, high = torch.quantile(
        log_magnitude.flatten()[:: max(1, log_magnitude.numel() // 100_000)], torch.tensor([0.01, 1])
    )
    image = axes[0].imshow(log_magnitude.numpy(), vmin=low, vmax=high, **place)
    figure.colorbar(image, cax=axes[0].inset_axes((1.08, 0, 0.1, 1)), label="log10 magnitude")
    axes[0].set_title("spectrum of the\nweight matrix")
    index = torch.fft.fftshift(layer.fdw.band_index().cpu(), dim=0) + 1
    image = axes[1].imshow(index.numpy(), cmap=GROUP_COLORS, **place)
    figure.colorbar(image, cax=axes[1].inset_axes((1.08, 0, 0.1, 1)), label="group")
    axes[1].set_title(f"its {layer.fdw.num_bands}\ndisjoint groups")
    for axis in axes[:2]:
        axis.set(xlabel="across columns", xticks=(0, 0.5), yticks=(-0.5, 0, 0.5))
    axes[0].set_ylabel("frequency across rows (cycles/sample)")

    radius = plane_radius(*weights.static.shape[1:], half=True)
    for axis, kind in zip(axes[2:4], kinds_of(weights), strict=False):
        _draw_profiles(axis, *radial_profile(magnitudes(kind.matrices), radius), kind)
        axis.set_title(f"{kind.title}:\nmean magnitude (peak = 1)")
    energy = group_energy(layer.fdw, static)
    numbers = range(1, len(energy) + 1)
    axes[4].bar(numbers, (100 * energy / energy.sum()).tolist(), width=1, color=group_colors(len(energy)))
    axes[4].axhline(100 / layer.fdw.num_bands, color="black", linestyle=":", label="white noise")
    axes[4].set(xlabel="group", title="share of the weight's\nenergy (per cent)")
    _legend_below(axes[4], -0.16)
    return figure


def draw_responses(weights: Weights) -> Figure:
    """Draw the frequency responses of the groups' kernels, and all profiles beside bank and static layer."""
    figure = Figure(figsize=(15, 6.8))
    upper, lower = figure.subfigures(2, 1, height_ratios=(1, 1.5))
    kinds = kinds_of(weights)
    responses = [kernel_response(kind.matrices, weights.kernel_size) for kind in kinds]
    # every kernel over its own peak
    responses = [planes / planes.amax((1, 2), keepdim=True).clamp_min(1e-12) for planes in responses]
    axes = upper.subplots(1, len(responses[0]))
    for axis, response, label in zip(axes, responses[0], kinds[0].labels, strict=True):
        image = axis.imshow(response.numpy(), extent=(-0.5, 0.5, 0.5, -0.5), vmin=0, vmax=1)
        axis.set(title=label, xlabel="fx (cycles/pixel)", xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
    axes[0].set_ylabel("fy (cycles/pixel)")
    bar = axes[-1].inset_axes((1.06, 0, 0.06, 1))
    upper.colorbar(image, cax=bar, label="RMS over all kernels\n(peak = 1)")

    axes = lower.subplots(1, len(kinds))
    for axis, planes, kind in zip(axes, responses, kinds, strict=True):
        _draw_profiles(axis, *radial_profile(planes, plane_radius(*planes.shape[1:])), kind)
        axis.set(title=kind.title, xlabel="frequency (cycles/pixel)")
    axes[0].set_ylabel("response, mean over a ring")
    return figure


def draw_tsne(weights: Weights) -> Figure:
    """Draw t-SNE embeddings of single filters: of some groups, of the bank, of the static layer."""
    figure = Figure(figsize=(15, 5.2))
    kinds = kinds_of(weights)
    for axis, kind in zip(figure.subplots(1, len(kinds)), kinds, strict=True):
        taken = filters(kind.matrices, weights.kernel_size[0])[:, :SHOWN_FILTERS]
        points = taken.flatten(0, 1).flatten(1)
        perplexity = min(30, (len(points) - 1) / 3)
        tsne = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=0)
        places = torch.from_numpy(tsne.fit_transform(points.numpy())).unflatten(0, taken.shape[:2])
        for part, color, label in zip(places, kind.colors, kind.labels, strict=True):
            axis.scatter(*part.T, s=18, color=color, label=label, alpha=0.75, linewidths=0)
        each = " each" if len(taken) > 1 else ""
        axis.set(title=f"{kind.title}: {taken.shape[1]} filters{each}", xticks=(), yticks=())
        _legend_below(axis, -0.02)
    return figure
