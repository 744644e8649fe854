"""Back to a static model: each FDConv layer becomes the convolution of its mean weight.

Paper: Frequency Dynamic Convolution for Dense Image Prediction, CVPR 2025, https://arxiv.org/abs/2503.18783

A static model is fast everywhere. Where images differ little in their gates it costs little accuracy; how much, only a
measurement tells (`scripts/export.py --static --calibrate DIR`).
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from .build import ConvertedModel
from .choice import FDLayer, named_fd_layers
from .conversion import place
from .default_cfgs import SUFFIX, static_name
from .handover import hand_over, refuse_held
from .layers.fourier import matrix_to_weight
from .layers.ops.traced import gated_weights
from .layers.ops.types import Gates
from .reparameterize import fuse_again


class MeanWeight:
    """Mean of the weights that a layer makes for its samples, and of what FBM does to each input channel.

    FBM's gates differ by band and place, which no small kernel can do. What is kept of them is a factor for each
    channel, the least-squares fit of FBM's output by its input: the gates' mean, weighted by what is in the bands.

    Args:
        layer: It is watched until :meth:`remove`.
    """

    def __init__(self, layer: FDLayer) -> None:
        self.layer = layer
        self.samples = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None
        self.squares: Tensor | None = None
        self.handles = [layer.ksm.register_forward_hook(self._add_weights)]
        if layer.fbm is not None:
            self.handles.append(layer.fbm.register_forward_hook(self._add_maps))

    def remove(self) -> None:
        """Stops watching."""
        for handle in self.handles:
            handle.remove()

    def _add_weights(self, module: nn.Module, inputs: Sequence[Tensor], gates: Gates) -> None:
        layer, spectrum = self.layer, self.layer.fdw()
        for i in range(len(gates.bands)):  # weights of a whole batch may be much
            bands, channels, filters, positions, local = (
                None if gate is None else gate[i : i + 1] for gate in gates[:5]
            )
            sample = Gates(bands, channels, filters, positions, local, gates.local_weight)
            weight = gated_weights(sample, spectrum, layer.kernel_shape, layer.static_shape[1], False)[0].double()
            if filters is not None:
                weight = weight * (2 * filters[0].double())[:, None]
            self.total = weight if self.total is None else self.total + weight
        self.samples += len(gates.bands)

    def _add_maps(self, module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        x, made = inputs[0].double(), output.double()
        others = [dim for dim in range(x.dim()) if dim != 1]
        products, squares = (made * x).sum(others), (x * x).sum(others)
        self.products = products if self.products is None else self.products + products
        self.squares = squares if self.squares is None else self.squares + squares

    def static_twin(self) -> nn.Module:
        """Static layer of the mean weight; of the weight at gates of one if the layer met no sample."""
        layer, twin = self.layer, self.layer.static_twin()
        if self.total is None:
            return twin
        kh = layer.kernel_shape[0]
        weight = matrix_to_weight((self.total / self.samples).view(len(self.total) * kh, -1), layer.kernel_shape)
        if self.products is not None:
            factor = torch.where(self.squares > 0, self.products / self.squares, 1)
            weight = weight * factor[:, None, None]
        weight = weight.view(layer.static_shape)
        if layer.filter_scale is not None:
            weight = weight * layer.filter_scale.view(-1, *[1] * (weight.dim() - 1))
        with torch.no_grad():
            twin.weight.copy_(weight)
        return twin


def to_static(model: nn.Module, batches: Iterable[Any] | None = None) -> nn.Module:
    """Replaces a model's FDConv layers by static ones, in place: :func:`convert_to_fdconv` undone.

    A model whose gates are at one, as after conversion, computes the same function as before. A trained one does not:
    its layers made a weight for each image. The static layer has the mean of those over the images of `batches`, or
    the weight at gates of one. Fine-tuning goes on from there as for any static model.

    Args:
        model: A model with FDConv layers, or a lone layer. A registered model becomes one of timm's class; a class of
            one's own, derived from the zoo's, stays.
        batches: Inputs of the model, or tuples and lists that begin with one, such as a DataLoader's of images and
            targets; a few hundred images are enough. The model runs in eval mode.

    Returns:
        The model; of a lone layer its static counterpart. Hooks of layers, and lists that hold them, go over. Layers
        that share a spectrum have gates of their own, and become layers with a weight each.

    Raises:
        ValueError: If there is no FDConv layer, or `batches` is empty, a tensor itself, or of something else; or
            something else in the model holds parameters of the layers: an optimiser, a list, DistributedDataParallel.
    """
    found = [layer for _, layer in named_fd_layers(model)]
    refuse_held(model, found)
    layers = {layer: MeanWeight(layer) for layer in found}
    try:
        if not layers:
            raise ValueError(f"{type(model).__name__} has no FDConv layer")
        if isinstance(batches, Tensor):
            raise ValueError("batches is a tensor, but it is to hold tensors, a batch each: [x] for one batch")
        if batches is not None:
            _run(model, batches)
    finally:
        for mean in layers.values():
            mean.remove()
    replaced = {layer: mean.static_twin() for layer, mean in layers.items()}
    names = [(name, replaced[layer]) for name, layer in named_fd_layers(model)]
    hand_over(model, replaced)
    if model in replaced:
        return replaced[model]
    for name, twin in names:
        place(model, name, twin)
    fuse_again(model)
    if isinstance(model, ConvertedModel):
        _become_timms(model)
    return model


@torch.no_grad()
def _run(model: nn.Module, batches: Iterable[Any]) -> None:
    modes = {module: module.training for module in model.modules()}
    device, count = next(model.parameters()).device, 0
    model.eval()
    try:
        for batch in batches:
            images = batch[0] if isinstance(batch, tuple | list) else batch
            if not isinstance(images, Tensor):
                found = type(batch).__name__ + (f" of {type(images).__name__}" if images is not batch else "")
                raise ValueError(f"batches gives a {found}, not a tensor, or a tuple or list that begins with one")
            model(images.to(device))
            count += len(images)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not count:
        raise ValueError("no images to take the mean of: batches is empty")


def _become_timms(model: ConvertedModel) -> None:
    """Gives a model of the zoo the class, and one with its cfg the name, of the static one that it is now."""
    order = type(model).__mro__
    if order[1] is not ConvertedModel:
        return  # a class of one's own, whose methods stay
    model.__class__ = order[2]
    cfg = getattr(model, "pretrained_cfg", None) or {}
    registered = get_pretrained_cfg(cfg.get("architecture") or "")
    if registered is None or not (registered.hf_hub_id or "").startswith("timm/"):
        return
    name, tag = static_name(cfg["architecture"]), (cfg.get("tag") or "").removesuffix(SUFFIX)
    model.pretrained_cfg = model.default_cfg = {**cfg, "architecture": name, "tag": tag}
