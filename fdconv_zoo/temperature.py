"""The temperature of a run: what DY-Conv, ODConv and KernelWarehouse anneal in the first epochs of a training."""

from torch import nn

from .layers.dynamic import Annealed


def set_temperature(model: nn.Module, value: float) -> int:
    """Sets the temperature of all layers of a model that have one, in place.

    DY-Conv's and ODConv's divides the logits of their attention and ends at 1. KernelWarehouse's, its beta, is the
    share of the cells that mixtures start from and ends at 0. A new model is at the end. It is state of a run: no state
    dict has it, and loading one leaves it as it is; a copied or pickled model keeps its own. A compiled model is not
    compiled anew.

    Args:
        model: A model with dynamic layers, or a lone layer.
        value: The temperature.

    Returns:
        How many layers have one: 0 for FDConv, CondConv and DCD.

    Raises:
        ValueError: It is out of a layer's range.
    """
    layers = [module for module in model.modules() if isinstance(module, Annealed)]
    for layer in layers:
        layer.set_temperature(value)
    return len(layers)
