"""timm's re-parameterisation for inference, around FDConv layers.

`timm.utils.reparameterize_model` asks blocks to replace their layers and norms by one new static layer. With an FDConv
layer inside that can't be exact: the block stays as it is, and everything else is fused.
"""

from functools import partial

from torch import nn

METHODS = ("fuse", "reparameterize", "switch_to_deploy")


def _stay(block: nn.Module) -> nn.Module:
    """Stands for a method that would make static layers: the block in place of its fused form."""
    return block


def keep_unfused(model: nn.Module, name: str) -> None:
    """Lets the block of timm's that would fuse a layer into a static one stay as it is.

    Args:
        model: A converted model.
        name: Name of an FDConv layer in it.
    """
    while name:
        name = name.rpartition(".")[0]
        block = model.get_submodule(name)
        methods = [method for method in METHODS if hasattr(block, method)]
        if methods and type(block).__module__.startswith("timm."):
            for method in methods:
                # An attribute of the block, that is copied and pickled with it.
                setattr(block, method, partial(_stay, block))
            return


def fuse_again(model: nn.Module) -> None:
    """Gives the blocks of a model that is static again their methods back."""
    for block in model.modules():
        for method in METHODS:
            stand_in = vars(block).get(method)
            if isinstance(stand_in, partial) and stand_in.func is _stay:
                delattr(block, method)
