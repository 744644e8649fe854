"""Random weights that leave no term trivial, and comparison of a layer with the literal."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def randomise(module: nn.Module) -> nn.Module:
    """Fills every parameter and every BatchNorm statistic of a module with random numbers of moderate size."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.4)
        randomise_norms(module)
    return module


@torch.no_grad()
def randomise_norms(model: nn.Module) -> nn.Module:
    """Gives a static model norm layers and layer scales that are neither 0 nor 1, in place."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.6, 1.4)
        if isinstance(module, _BatchNorm | nn.LayerNorm) and module.weight is not None:
            module.weight.uniform_(0.6, 1.4)
            if module.bias is not None:
                module.bias.normal_(std=0.2)
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("gamma", "layer_scale"):
            parameter.uniform_(0.3, 0.9)
    return model


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected, or over 1 where that vanishes."""
    scale = expected.double().norm().item()
    return (actual.double() - expected.double()).norm().item() / (scale if scale > 1e-12 else 1.0)


def assert_matches(layer: nn.Module, x: Tensor, reference: Callable[[dict[str, Tensor], Tensor], Tensor], tol: float):
    """Compares output, input gradient and the gradient of every parameter with a reference run in float64.

    Args:
        layer: Layer under test.
        x: Its input.
        reference: Takes the layer's parameters and buffers by name, and the input.
        tol: Largest relative error of each.
    """
    state = {key: value.detach().double() for key, value in layer.state_dict().items()}
    parameters = {name: state[name].requires_grad_() for name, _ in layer.named_parameters()}
    wide = x.detach().double().requires_grad_()
    expected = reference(state, wide)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, [wide, *parameters.values()], direction)

    x = x.detach().requires_grad_()
    output = layer(x)
    assert output.shape == expected.shape
    assert output.dtype == x.dtype
    got = torch.autograd.grad(output, [x, *layer.parameters()], direction.to(output.dtype))
    errors = {"output": relative_error(output.detach(), expected.detach())}
    names = ["input", *parameters]
    errors |= {name: relative_error(a, b) for name, a, b in zip(names, got, wanted, strict=True)}
    assert max(errors.values()) < tol, {name: error for name, error in errors.items() if error >= tol}
