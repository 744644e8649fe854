"""The parameters of modulation, which no static model has: to train them alone, or at a rate of their own."""

from collections.abc import Iterator

from torch import nn

from .choice import check_module, named_dynamic_layers

__all__ = ["freeze_static", "modulation_parameters"]


def modulation_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and parameters of KSM and FBM in all FDConv layers, and of the attention in other dynamic ones.

    Each comes once, as of `named_parameters`, however many names it has. The spectra, and the kernels in their place,
    are not among them.

    A converted model starts with them at no effect, and with everything else trained. A rate of their own::

        new = {id(parameter) for _, parameter in modulation_parameters(model)}
        groups = [
            {"params": [p for p in model.parameters() if id(p) in new], "lr": 1e-3},
            {"params": [p for p in model.parameters() if id(p) not in new], "lr": 1e-4},
        ]

    Args:
        model: A model with dynamic layers, a part of one, or a lone layer.

    Raises:
        TypeError: It is no module.
    """
    check_module(model)
    seen: set[nn.Parameter] = set()
    for name, layer in named_dynamic_layers(model):
        for key, parameter in layer.modulation():
            if parameter not in seen:
                seen.add(parameter)
                yield f"{name}.{key}" if name else key, parameter


def freeze_static(module: nn.Module) -> None:
    """Freeze all parameters but the modulation's, which goes on training.

    For the early stages that detectors freeze as a rule, whose modulation would never move from no effect::

        for stage in (model.conv1, model.bn1, model.layer1):
            freeze_static(stage)

    Layers of a KernelWarehouse share its cells, which are frozen with the layer that holds them, the first one. So the
    first layers of a stage, which take theirs from the stage before, are frozen with that and not with their own.

    BatchNorm's statistics are buffers and go on as they were; an optimiser made before keeps what it was given.

    Args:
        module: A model or a part of one.

    Raises:
        TypeError: It is no module.
    """
    check_module(module)
    module.requires_grad_(False)
    for _, parameter in modulation_parameters(module):
        parameter.requires_grad_(True)
