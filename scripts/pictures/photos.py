"""Figures of what photos do in the layers for ``visualize.py``: gates, frequency bands, spectra of the features."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from fdconv_zoo.layers.fbm import FBM
from pictures.layer import GATES, feature_spectrum

GATE_COLORS = "RdBu_r"  # blue below 1, white at 1, red above
SMALLEST_RANGE = 0.01  # of a gate around 1, for gates that all but rest there
EMPTY_BAND = 1e-5  # of the feature: what float32 leaves of a band without a frequency
SHOWN_SHARE = 0.995  # of the values within the limits of a colour map: single bright pixels would darken the rest


def gate_range(gates: Tensor) -> float:
    """Distance from 1 that the colours and axes of gates reach."""
    return max(SMALLEST_RANGE, (gates - 1).abs().max().item())


def largest_shown(values: Tensor) -> float:
    """Limit of a colour map that holds almost all absolute values."""
    return values.abs().flatten().quantile(SHOWN_SHARE).item()


def _draw_bar(axis: Axes, image: ScalarMappable, **options: Any) -> None:
    # a place of the picture's own height, which a colour bar beside it does not have
    axis.figure.colorbar(image, cax=axis.inset_axes((1.04, 0, 0.05, 1)), **options)


def _draw_lines(axis: Axes, gates: Tensor, names: Sequence[str], title: str, xlabel: str) -> None:
    for gate, name in zip(gates, names, strict=True):
        axis.plot(range(1, len(gate) + 1), gate, linewidth=1.2, marker=".", markersize=3, label=name)
    reach = 1.1 * gate_range(gates)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set(title=title, xlabel=xlabel, ylim=(1 - reach, 1 + reach), xlim=(0, gates.shape[1] + 1))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axis.grid(alpha=0.3)


def draw_gates(gates: Mapping[str, Tensor], names: Sequence[str]) -> Figure:
    """Draw KSM's gates of one layer, a colour a photo.

    Args:
        gates: Of :func:`pictures.layer.gates_of`.
        names: Names of the photos.
    """
    names = [f"{number}: {name}" for number, name in enumerate(names, start=1)]
    figure = Figure(figsize=(15, 7.6))
    axes = figure.subplot_mosaic([["bands", "bands", "positions"], ["channels", "filters", "dense"]])
    _draw_lines(
        axes["bands"], gates["group gains"], names, "gains of the frequency groups", "group, low to high frequency"
    )
    axes["bands"].set_ylabel("gate")
    figure.legend(*axes["bands"].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    for key, kind, xlabel in (("channels", "input channels", "channel"), ("filters", "filters", "filter")):
        if kind in gates:
            _draw_lines(axes[key], gates[kind], names, f"gates of the {kind}", xlabel)
        else:
            axes[key].remove()
    if "kernel positions" in gates:
        axis, positions = axes["positions"], gates["kernel positions"]
        gap = torch.full((positions.shape[1], 1), torch.nan)
        parts = [part for position in positions for part in (position, gap)][:-1]
        norm = CenteredNorm(1, gate_range(positions))
        image = axis.imshow(torch.cat(parts, dim=1).numpy(), cmap=GATE_COLORS, norm=norm)
        _draw_bar(axis, image, label="gate")
        height, width = positions.shape[1:]
        step = width + 1
        # a frame for each photo: gates of 1 are as white as the gaps
        for number in range(len(names)):
            axis.add_patch(Rectangle((number * step - 0.5, -0.5), width, height, fill=False, clip_on=False))
        axis.spines[:].set_visible(False)
        axis.set(title="gates of the kernel positions", yticks=())
        axis.set_xticks([number * step + (step - 2) / 2 for number in range(len(names))], range(1, len(names) + 1))
        axis.set_xlabel("photo")
    else:
        axes["positions"].remove()
    if "weight elements" in gates:
        axis, dense = axes["dense"], gates["weight elements"].flatten(1)
        reach = 1.1 * gate_range(dense)
        for gate, name in zip(dense, names, strict=True):
            counts = torch.histc(gate, bins=81, min=1 - reach, max=1 + reach) / len(gate)
            edges = torch.linspace(1 - reach, 1 + reach, 82)
            axis.stairs(100 * counts, edges, label=name, linewidth=1.5)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set(title="dense gates of the weight's elements", xlabel="gate", ylabel="per cent of the elements")
        axis.grid(alpha=0.3)
    else:
        axes["dense"].remove()
    return figure


def draw_layers(deviation: Mapping[str, Mapping[str, float]], drawn: str) -> Figure:
    """Draw how far the gates of every layer are from 1: kinds of gates by layers.

    Args:
        deviation: RMS of gate - 1, by layer and kind of gate.
        drawn: The layer that the other figures show, its name in bold.
    """
    kinds = [kind for kind in GATES if any(kind in row for row in deviation.values())]
    values = torch.tensor([[row.get(kind, torch.nan) for row in deviation.values()] for kind in kinds])
    figure = Figure(figsize=(15, 4.8))
    axis = figure.subplots()
    axis.set_facecolor("0.85")
    moved = values[values > 0]
    if len(moved):
        norm = LogNorm(max(moved.min().item(), 1e-3 * moved.max().item()), 1.001 * moved.max().item(), clip=True)
        shown = torch.where(values > 0, values, torch.nan)
        image = axis.imshow(shown.numpy(), cmap="viridis", norm=norm, aspect="auto", interpolation="nearest")
        figure.colorbar(image, ax=axis, label="RMS of gate - 1", pad=0.01)
    else:
        axis.imshow(torch.full_like(values, torch.nan).numpy(), aspect="auto")
        text = "every gate of every layer is exactly 1"
        axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", va="center", fontsize=14)
    step = max(1, -(-len(deviation) // 60))
    names = list(deviation)
    ticks = sorted({*range(0, len(names), step), names.index(drawn)})
    axis.set_xticks(ticks, [names[tick] for tick in ticks], rotation=90, fontsize=8)
    axis.get_xticklabels()[ticks.index(names.index(drawn))].set_fontweight("bold")
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set_title("distance of the gates from 1 (grey: no such gate, or exactly 1)")
    return figure


def band_names(fbm: FBM) -> list[str]:
    """Frequency ranges of the bands in cycles per pixel, highest first."""
    limits = [f"{numerator}/{denominator}" for numerator, denominator in fbm.cutoffs]
    middle = [f"{low} ≤ f < {high}" for high, low in pairwise(limits)]
    return [f"f ≥ {limits[0]}", *middle, f"f < {limits[-1]}"]


def rms(maps: Tensor) -> Tensor:
    """Root mean square over the channels: (..., C, H, W) to (..., H, W)."""
    return maps.square().mean(-3).sqrt()


def _draw_map(axis: Axes, values: Tensor, title: str) -> None:
    image = axis.imshow(values.numpy(), vmin=0, vmax=max(1e-12, largest_shown(values)))
    _draw_bar(axis, image, extend="max")
    axis.set_title(title)


def _draw_change(axis: Axes, values: Tensor, title: str, smallest: float, **place: Any) -> None:
    reach = max(smallest, largest_shown(values))
    image = axis.imshow(values.numpy(), cmap=GATE_COLORS, norm=CenteredNorm(0, reach), **place)
    _draw_bar(axis, image, extend="both")
    axis.set_title(title)


def draw_bands(photo: Tensor, fbm: FBM, x: Tensor) -> Figure:
    """Draw a photo, the bands of a feature map and the modulation map of each.

    Args:
        photo: As the model sees it, (3, H, W) or grey (1, H, W), in [0, 1].
        fbm: FBM of the layer.
        x: The layer's input (C, H, W).
    """
    bands = rms(fbm.bands(x[None])[:, 0])
    maps = fbm.gates(x[None])[0]
    empty = bands.amax((1, 2)) < EMPTY_BAND * rms(x).max()
    names = band_names(fbm)
    figure = Figure(figsize=(3.1 * (len(names) + 1), 5.6))
    axes = figure.subplots(2, len(names) + 1)
    axes[0, 0].imshow(photo.expand(3, -1, -1).permute(1, 2, 0).numpy())
    axes[0, 0].set_title("photo, as the model sees it")
    _draw_map(axes[1, 0], rms(x), f"input of the layer, {x.shape[0]} channels")
    norm = CenteredNorm(1, gate_range(maps))
    for column, (band, name) in enumerate(zip(bands, names, strict=True), start=1):
        if empty[column - 1]:
            said = f"no such frequency\nin {x.shape[1]} x {x.shape[2]} pixels"
            axes[0, column].text(0.5, 0.5, said, ha="center", va="center")
            axes[0, column].set(title=f"band {name}", aspect="equal")
        else:
            _draw_map(axes[0, column], band, f"band {name}")
        if column <= len(maps):
            modulation = axes[1, column].imshow(maps[column - 1].numpy(), cmap=GATE_COLORS, norm=norm)
            axes[1, column].set_title(f"map A{column}: {maps[column - 1].min():.2f} to {maps[column - 1].max():.2f}")
    _draw_bar(axes[1, len(maps)], modulation, label="gate")
    axes[1, -1].text(0.5, 0.5, "no map:\nthe lowest band\nstays as it is", ha="center", va="center")
    axes[1, -1].set_axis_off()
    for axis in axes.flat:
        axis.set(xticks=(), yticks=())
    return figure


def draw_feature_spectrum(fbm: FBM, x: Tensor) -> Figure:
    """Draw the spectrum of a layer's input (C, H, W) before and after FBM, and what FBM changed."""
    after = fbm(x[None])[0]
    spectra = [feature_spectrum(maps).clamp_min(1e-12).log10() for maps in (x, after)]
    figure = Figure(figsize=(15, 3.7))
    axes = figure.subplots(1, 4)
    change = rms(after) - rms(x)
    smallest = SMALLEST_RANGE * rms(x).max().item()
    _draw_change(axes[0], change, "change of the feature\n(RMS over channels)", smallest)
    axes[0].set(xticks=(), yticks=())
    place = {"extent": (-0.5, 0.5, 0.5, -0.5), "interpolation": "nearest"}
    low, high = min(s.min().item() for s in spectra), max(s.max().item() for s in spectra)
    for axis, spectrum, title in zip(axes[1:], spectra, ("before FBM", "after FBM"), strict=False):
        image = axis.imshow(spectrum.numpy(), vmin=low, vmax=high, **place)
        axis.set_title(f"spectrum {title}\n(log10 mean magnitude)")
        _draw_bar(axis, image)
    _draw_change(axes[3], spectra[1] - spectra[0], "after / before\n(log10)", SMALLEST_RANGE, **place)
    for axis in axes[1:]:
        axis.set(xlabel="fx (cycles/pixel)", xticks=(-0.5, 0, 0.5), yticks=(-0.5, 0, 0.5))
        for numerator, denominator in fbm.cutoffs:
            limit = numerator / denominator
            square = [-limit, limit, limit, -limit, -limit], [-limit, -limit, limit, limit, -limit]
            axis.plot(*square, color="cyan" if axis is not axes[3] else "black", linewidth=0.8, linestyle=":")
    axes[1].set_ylabel("fy (cycles/pixel)")
    return figure
