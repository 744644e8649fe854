"""FDConv's gates moved away from 1, where a model that was not trained has them."""

import torch
from torch import nn

from fdconv_zoo.convert import named_fd_layers

GATE_STD = 0.02


@torch.no_grad()
def move_gates(model: nn.Module, seed: int) -> nn.Module:
    """Draw what makes the gates, which starts at zero, from a narrow normal distribution: no gate stays at 1."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in named_fd_layers(model):
        for name, parameter in layer.named_parameters():
            if name.startswith(("ksm.heads.", "ksm.local_conv.", "fbm.")):
                parameter.normal_(std=GATE_STD, generator=generator)
    return model
