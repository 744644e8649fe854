"""The models that are checked and measured, each in several kinds with the same weights."""

import copy
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common.gates import move_gates, open_branches
from fdconv_zoo import keep_banks, static_name
from fdconv_zoo.conversion import named_fd_layers


class Spec(NamedTuple):
    """A model: its name, keyword arguments of it and of its static twin, those of its FDConv layers, image size."""

    name: str
    model: dict[str, Any]
    layers: dict[str, Any]
    size: int


def specs(small: bool) -> list[Spec]:
    """The models of all parts, the most important first; without stochastic depth, so that steps can be compared."""
    if small:
        tiny = {"channels": (17, 18, 18, 20), "layers": (1, 1, 1, 1), "num_classes": 5}
        return [Spec("resnet18_fdconv", tiny, {"num_bands": 3}, 32)]
    return [
        Spec("resnet50_fdconv", {}, {}, 224),
        Spec("convnext_tiny_fdconv", {}, {}, 224),
        Spec("swin_tiny_fdconv", {"drop_path_rate": 0.0}, {}, 224),
    ]


def fdconv_model(spec: Spec) -> nn.Module:
    """The model with random weights, no gate at 1, no residual branch at 0, and norms with statistics."""
    torch.manual_seed(0)
    model = open_branches(timm.create_model(spec.name, **spec.model, **spec.layers))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.running_mean.normal_(std=0.1, generator=generator)
                module.running_var.uniform_(0.6, 1.4, generator=generator)
    return move_gates(model, seed=0)


def static_twin(spec: Spec) -> nn.Module:
    """The static model, with random weights."""
    torch.manual_seed(0)
    return open_branches(timm.create_model(static_name(spec.name), **spec.model))


def unfused(model: nn.Module) -> nn.Module:
    """A copy of an FDConv model that computes with PyTorch's operations, as `create_model(name, fused=False)` would."""
    model = copy.deepcopy(model)
    for _, layer in named_fd_layers(model):
        layer.fused = False
        if getattr(layer, "fbm", None) is not None:
            layer.fbm.fused = False
    return model


def with_kept_banks(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of an FDConv model in eval mode that keeps its layers' banks in a dtype."""
    model = copy.deepcopy(model).eval()
    keep_banks(model, dtype)
    return model


def images_and_labels(spec: Spec, batch: int, model: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise (B, 3, size, size) and labels, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, spec.size, spec.size, generator=generator)
    return images.to(device), torch.randint(model.num_classes, (batch,), generator=generator).to(device)
