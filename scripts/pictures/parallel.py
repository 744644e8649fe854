"""How alike the weights are that a dynamic layer mixes (Figs. 1 and 5): FDConv's groups, other methods' kernels."""

from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers.base import DynamicLayer
from fdconv_zoo.layers.dynamic import DCDConv2d, KWConv2d
from fdconv_zoo.layers.fourier import weight_to_matrix
from pictures.layer import (
    cosine_similarity,
    group_matrices,
    kernel_response,
    largest_off_diagonal,
    magnitudes,
    plane_radius,
    radial_profile,
)
from pictures.report import Picture

SHOWN = 16


class Parallel(NamedTuple):
    """What a layer mixes.

    Attributes:
        noun: What one of them is called.
        matrices: Weight matrices (K, R, C).
        kernel_size: (kh, kw) of what they are laid out from.
    """

    noun: str
    matrices: Tensor
    kernel_size: tuple[int, int]


def parallel_weights(layer: DynamicLayer) -> Parallel:
    """What a layer mixes for each sample.

    FDConv mixes the weights of its frequency groups, CondConv, DY-Conv and ODConv whole kernels, KernelWarehouse the
    cells of its warehouse. DCD has one kernel; what it mixes are the directions of its latent space, each the product
    of one column of P and one row of Q.
    """
    if isinstance(layer, FDConv2d | FDLinear):
        return Parallel("group", group_matrices(layer)[1], layer.kernel_shape)
    if isinstance(layer, DCDConv2d):
        into, out = layer.q.weight.detach().flatten(1), layer.p.weight.detach().flatten(1)
        return Parallel("direction", (out.T[:, :, None] * into[:, None, :]).float().cpu(), (1, 1))
    bank = layer.bank().detach().float().cpu()
    noun = "cell" if isinstance(layer, KWConv2d) else "kernel"
    return Parallel(noun, torch.stack([weight_to_matrix(weight) for weight in bank]), tuple(bank.shape[3:]))


def mean_similarity(matrices: Tensor) -> float:
    """Mean cosine between different weights (K, R, C); NaN for one alone."""
    similarity = cosine_similarity(matrices)
    count = len(similarity)
    return ((similarity.sum() - similarity.diag().sum()) / (count * (count - 1))).item() if count > 1 else float("nan")


def draw_parallel(parallel: Parallel) -> Figure:
    """Draw cosine similarities of the weights and of their magnitude spectra, and their profiles over frequency."""
    figure = Figure(figsize=(15, 4.6))
    axes = figure.subplots(1, 3)
    for axis, vectors, what in zip(
        axes, (parallel.matrices, magnitudes(parallel.matrices)), ("weights", "magnitude spectra"), strict=False
    ):
        similarity = cosine_similarity(vectors)
        image = axis.imshow(similarity.numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(
            f"{what} of {len(similarity)} {parallel.noun}s\nmean {mean_similarity(vectors):.2f}, "
            f"largest {largest_off_diagonal(similarity):.2f} off the diagonal"
        )
        axis.set(xlabel=parallel.noun, ylabel=parallel.noun)
    figure.colorbar(image, ax=axes[:2], label="cosine similarity", shrink=0.8)
    if parallel.kernel_size == (1, 1):
        planes = magnitudes(parallel.matrices)
        radius, unit = plane_radius(*parallel.matrices.shape[1:], half=True), "cycles/sample"
    else:
        planes = kernel_response(parallel.matrices, parallel.kernel_size)
        radius, unit = plane_radius(*planes.shape[1:]), "cycles/pixel"
    rings, profiles = radial_profile(planes, radius)
    for number, profile in enumerate(profiles[:SHOWN]):
        axes[2].plot(
            rings, profile / profile.nan_to_num().amax().clamp_min(1e-12), label=str(number + 1), linewidth=1.5
        )
    axes[2].set(xlabel=f"frequency ({unit})", ylim=(0, 1.05), title=f"response of each {parallel.noun} (peak = 1)")
    axes[2].legend(fontsize=8, ncols=4)
    return figure


def parallel_pictures(layer: DynamicLayer) -> tuple[list[Picture], str]:
    """Draw what a layer mixes; return the pictures and a line on its similarity."""
    parallel = parallel_weights(layer)
    similar = (
        f"mean cosine between the weights of two {parallel.noun}s: {mean_similarity(parallel.matrices):.2f}, of their "
        f"magnitude spectra: {mean_similarity(magnitudes(parallel.matrices)):.2f}"
    )
    picture = Picture(
        file="similarity.png",
        title="Similarity of the parallel weights (after Figs. 1 and 5 of the paper)",
        caption=(
            f"Cosine similarity between the {parallel.noun}s that {layer.method} mixes for each sample, of the weights "
            "and of the magnitudes of their spectra, and how strongly each passes a frequency. FDConv's groups share "
            f"no coefficient: their cosine is 0. Here: {similar}."
        ),
        figure=draw_parallel(parallel),
    )
    return [picture], similar
