"""Models that were not trained, with gates away from 1 and residual branches away from 0, as training leaves them."""

import torch
from torch import nn

from fdconv_zoo.conversion import named_fd_layers

GATE_STD = 0.02
BRANCH_SCALE = 0.2


@torch.no_grad()
def move_gates(model: nn.Module, seed: int) -> nn.Module:
    """Draw what makes the gates, which starts at zero, from a narrow normal distribution: no gate stays at 1."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in named_fd_layers(model):
        for name, parameter in layer.named_parameters():
            if name.startswith(("ksm.heads.", "ksm.local_conv.", "fbm.")):
                parameter.normal_(std=GATE_STD, generator=generator)
    return model


@torch.no_grad()
def open_branches(model: nn.Module) -> nn.Module:
    """Give weight to residual branches that start at zero or nearly: the output then depends on the layers in them.

    They end in a norm with a weight of zero in timm's ResNets, and in a layer scale of 1e-6 in ConvNeXts.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith(("weight", "gamma")) and parameter.abs().max() < 1e-3:
            parameter.fill_(BRANCH_SCALE)
    return model
