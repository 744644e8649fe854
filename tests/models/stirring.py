"""Models whose norms and gates are off the values at which they do nothing."""

import torch
from torch import nn

from fdconv_zoo.choice import named_fd_layers
from fdconv_zoo.layers.dynamic import DCDConv2d
from tests.compare import randomise_norms

# Batch norms, KSM's among them, above which random branches blow up float32's rounding errors, and then overflow.
DEEP = 30


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Moves every norm and every gate off the values at which they do nothing, in place.

    Batch norms are quieter in a deep network: a ResNet-18 with others is no closer than 1e-4 to itself in float64.
    """
    randomise_norms(model)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if len(norms) > DEEP:
        for norm in norms:
            norm.weight.mul_(0.5)
    for _, layer in named_fd_layers(model):
        for module in (layer.ksm.heads, layer.ksm.local_conv, layer.fbm):
            for parameter in module.parameters() if module is not None else ():
                parameter.normal_(std=0.05)
    for module in model.modules():
        if isinstance(module, DCDConv2d):
            # Its latent part is a product of two functions of the input: it would square from layer to layer where
            # the statistics are not the batch's.
            module.attention.phi.weight.normal_(std=1e-3)
    return model
