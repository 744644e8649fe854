"""How far a trained network's gates have moved, and what KSM's batch statistics do to its answers."""

from statistics import mean

import torch
from torch import Tensor, nn

from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.layers.ops.types import Gates


def _moves(gates: Tensor) -> dict[str, float]:
    """Of gates (B, ...): mean distance from 1, and the part of it that differs from image to image."""
    return {
        "from_one": (gates - 1).abs().mean().item(),
        "mean_from_one": (gates.mean(0) - 1).abs().mean().item(),
        "over_images": gates.std(0).mean().item(),
    }


@torch.no_grad()
def gate_moves(model: nn.Module, images: Tensor) -> dict[str, dict[str, float]]:
    """How far the gates of each kind are from 1, on average over layers, in eval mode.

    Args:
        model: With FDConv layers, or without: then there is nothing to tell.
        images: (B, 3, H, W).

    Returns:
        For `bands`, `channels`, `filters`, `positions`, `dense`, as far as there are: `from_one`, the mean of
        |gate - 1|; `mean_from_one`, that of the images' mean gate; `over_images`, the standard deviation over images.
    """
    found: dict[str, list[dict[str, float]]] = {}

    def look(module: nn.Module, args: tuple[Tensor, ...], gates: Gates) -> None:
        parts = {kind: getattr(gates, kind) for kind in ("bands", "channels", "filters", "positions")}
        parts["dense"] = module.dense_gate(gates)
        for kind, values in parts.items():
            if values is not None:
                found.setdefault(kind, []).append(_moves(values))

    handles = [layer.ksm.register_forward_hook(look) for _, layer in named_fd_layers(model)]
    model.eval()
    model(images)
    for handle in handles:
        handle.remove()
    return {kind: {key: mean(each[key] for each in layers) for key in layers[0]} for kind, layers in found.items()}


@torch.no_grad()
def disagreement(model: nn.Module, batches: list[Tensor]) -> dict[str, float]:
    """How much the answers change where KSM's norms take a batch's statistics, as in training, all else in eval mode.

    Args:
        model: Gives logits (B, classes) or (B, classes, H, W).
        batches: Images (B, 3, H, W) of training's batch size.

    Returns:
        `total_variation`, half the mean sum of |difference of probabilities|, and `answers`, the share of changed ones.
    """
    norms = [layer.ksm.norm for _, layer in named_fd_layers(model)]
    momenta = [getattr(norm, "momentum", None) for norm in norms]
    model.eval()
    distances, changes = [], []
    for images in batches:
        expected = model(images).softmax(1)
        for norm in norms:
            norm.train()
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0
        found = model(images).softmax(1)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval()
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = momentum
        distances.append((found - expected).abs().sum(1).mean().item() / 2)
        changes.append((found.argmax(1) != expected.argmax(1)).float().mean().item())
    return {"total_variation": mean(distances), "answers": mean(changes)}
