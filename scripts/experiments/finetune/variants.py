"""What the fine-tuning experiments compare: a static network, and what is made of it."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from common.optim import classifier_names
from fdconv_zoo import convert_to_fdconv, summary
from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.layers.fourier import from_spectrum, matrix_to_weight, to_spectrum, weight_to_matrix

CALIBRATION_BATCHES = 16


class CalibratedNorm(nn.BatchNorm2d):
    """BatchNorm by its running statistics in training too; :func:`calibrate` sets them."""

    def train(self, mode: bool = True) -> "CalibratedNorm":
        """Stays in eval mode."""
        return super().train(False)


KSM_NORMS = {
    "batch": nn.BatchNorm2d,
    "calibrated": CalibratedNorm,
    "group": partial(nn.GroupNorm, 4),
    "layer": partial(nn.GroupNorm, 1),
}


class FromSpectrum(nn.Module):
    """Parametrisation of a convolution's weight by the spectrum that an FDConv layer keeps: FDConv with gates at 1."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.columns = weight.shape[1] * weight.shape[3]
        self.kernel_size = tuple(weight.shape[2:])

    def forward(self, spectrum: Tensor) -> Tensor:
        return matrix_to_weight(from_spectrum(spectrum, self.columns), self.kernel_size)

    def right_inverse(self, weight: Tensor) -> Tensor:
        return to_spectrum(weight_to_matrix(weight))


def make_variant(model: nn.Module, layer: dict[str, Any] | None, fourier: bool) -> nn.Module:
    """Make a static network a variant, which computes the same function. Heads, which start untrained, stay static.

    Args:
        model: Static network; it is changed.
        layer: Keyword arguments of FDConv2d, `norm_layer` by its name in `KSM_NORMS`; None leaves the network static.
        fourier: Leaves the layers static, but has the spectra as parameters of those that FDConv would replace.

    Raises:
        ValueError: Both are asked for.
    """
    if layer is not None and fourier:
        raise ValueError("a variant is converted or has static layers in the Fourier domain, not both")
    new_parts = tuple(f"{name}." for name in classifier_names(model))

    def include(name: str, module: nn.Module) -> bool | None:
        return False if name.startswith(new_parts) else None

    if fourier:
        for report in summary(model, include):
            if report.replaced:
                convolution = model.get_submodule(report.name)
                parametrization = FromSpectrum(convolution.weight)
                parametrize.register_parametrization(convolution, "weight", parametrization)
        return model
    if layer is None:
        return model
    options = {"recompute": False, **layer}
    options["norm_layer"] = KSM_NORMS[options.get("norm_layer", "batch")]
    return convert_to_fdconv(model, include, **options)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the statistics of all `CalibratedNorm` to those of images (B, 3, H, W), each batch with equal weight."""
    norms = [layer.ksm.norm for _, layer in named_fd_layers(model) if isinstance(layer.ksm.norm, CalibratedNorm)]
    if not norms:
        return
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.training, norm.momentum = True, None
    for images in batches:
        model(images)
    for norm in norms:
        norm.training, norm.momentum = False, 0.1
