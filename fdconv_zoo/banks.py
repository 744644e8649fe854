"""Banks of FDConv's layers, kept between passes in eval: memory for time, on a GPU.

A sample's weight is a sum of the frequency groups' weights, the bank, times the sample's gains. Making a bank takes a
Fourier transform for each of the n groups; kept, a pass reads it instead. It is n times as large as the weights, 64 by
default: 3 GB for a ResNet-50 in bfloat16.
"""

import torch
from torch import nn

from .choice import named_fd_layers
from .layers.fdw import FDW
from .layers.ops import triton


def keep_banks(model: nn.Module, dtype: torch.dtype) -> int:
    """Makes and keeps the banks of a model's layers on GPUs, for passes without gradients; others are left as they are.

    A layer uses its bank for inputs of that dtype, which under autocast is autocast's. It gives the bank up when it is
    trained, moved, cast or loaded, or records a gradient for its spectrum, as an update may follow that nothing tells
    of (fused optimisers'); and it does not use the bank once its spectrum has changed in place. A change through
    `.data` is not noticed, nor a fused optimiser's by gradients from before: call this again then. A captured CUDA
    graph reads the bank that was there: capture it again after the bank was given up. Banks are not saved.

    Args:
        model: Model in eval mode, or a lone layer.
        dtype: That of the layers' inputs.

    Returns:
        Bytes that all kept banks take. A bank that would take more than an eighth of the device's free memory is not
        kept, nor one of a layer that was made in inference mode, where nothing tells that a spectrum changed, nor one
        that nothing would read: of `fused=False`, of FDConv3d, in float64, and where Triton's kernels do not run.

    Raises:
        ValueError: If a layer is in training mode.
    """
    layers = [layer for _, layer in named_fd_layers(model)]
    if any(layer.fdw.training for layer in layers):
        raise ValueError("banks are kept in eval only, where the spectrum stays as it is: call model.eval() first")
    kept = 0
    for layer in layers:
        fdw = layer.fdw
        fdw.drop_bank()
        size = fdw.num_bands * fdw.rows * fdw.columns * dtype.itemsize
        exact_dtype = torch.promote_types(fdw.spectrum.dtype, torch.float32)
        is_read = layer.reads_bank and triton.computes(fdw.spectrum.device, dtype, exact_dtype)
        if is_read and not fdw.spectrum.is_inference() and triton.can_keep(size, fdw.spectrum.device):
            fdw.keep_bank(dtype)
            kept += size
    return kept


def drop_banks(model: nn.Module) -> None:
    """Gives up what :func:`keep_banks` keeps."""
    for module in model.modules():
        if isinstance(module, FDW):
            module.drop_bank()
