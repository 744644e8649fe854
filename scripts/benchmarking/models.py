"""What is compared: models of the zoo beside their static twins, and the paper's equations as literally written."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from common.gates import move_gates, open_branches
from common.models import expand_names
from fdconv_zoo import FDConv2d, FDLinear, convert_to_fdconv, static_name
from fdconv_zoo.conversion import named_fd_layers
from fdconv_zoo.default_cfgs import is_zoo_model
from fdconv_zoo.layers.ops import literal


@dataclass(frozen=True)
class Pair:
    """An FDConv model and the static one it is compared with.

    Attributes:
        name: Name of the FDConv model.
        static_name: Name of the static one.
        fdconv: The FDConv model, its gates away from 1.
        static: The static one.
        input_size: One image, (channels, height, width).
    """

    name: str
    static_name: str
    fdconv: nn.Module
    static: nn.Module
    input_size: tuple[int, int, int]


def expand_fdconv_names(patterns: Iterable[str]) -> list[str]:
    """Resolve wildcards and refuse what timm does not know or what has no static twin.

    Raises:
        ValueError: Names the model.
    """
    names = expand_names(patterns, weights_needed=False)
    for name in names:
        if not is_zoo_model(name):
            hint = f"{name.partition('.')[0]}_fdconv"
            raise ValueError(
                f"{name} has no static twin: it is no FDConv model"
                + (f", did you mean {hint}?" if timm.is_model(hint) else "")
            )
    return names


def model_pair(name: str, img_size: int, seed: int, model_kwargs: Mapping[str, Any]) -> Pair:
    """Create a registered model of the zoo, with its keyword arguments, and its static twin, with random weights.

    Raises:
        ValueError: The model can't be had with that image size or these arguments.
    """
    twin = static_name(name)
    models = []
    for model_name, kwargs in ((name, model_kwargs), (twin, {})):
        torch.manual_seed(seed)
        try:
            model = timm.create_model(model_name, **kwargs)
            if hasattr(model, "set_input_size"):
                model.set_input_size(img_size=img_size)
        except (TypeError, RuntimeError, AssertionError) as error:
            raise ValueError(f"{model_name}: {error}") from error
        models.append(open_branches(model))
    return Pair(name, twin, move_gates(models[0], seed), models[1], (3, img_size, img_size))


def parts_pair(name: str, parts: str, img_size: int, seed: int, **options: Any) -> Pair:
    """A static model of timm and the same with some parts converted.

    Args:
        name: Of the static model.
        parts: What is converted, as `include` names it.
        img_size: Side of the images in pixels.
        seed: Of weights and gates.
        **options: Of the FDConv layers.
    """
    torch.manual_seed(seed)
    static = open_branches(timm.create_model(name))
    fdconv = convert_to_fdconv(copy.deepcopy(static), include=parts, **options)
    title = ", ".join([f"{name}, {parts} converted", *(f"{key}={value}" for key, value in options.items())])
    return Pair(title, name, move_gates(fdconv, seed), static, (3, img_size, img_size))


def layer_pair(seed: int) -> Pair:
    """One 3x3 layer of 512 to 512 channels on 7x7 maps: many weights for few pixels, the hardest case."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(512, 512, 3, padding=1, bias=False)
    layer = move_gates(FDConv2d.from_conv(conv), seed)
    return Pair("FDConv2d(512, 512, 3)", "nn.Conv2d(512, 512, 3)", layer, conv, (512, 7, 7))


def small_net_pair(seed: int) -> Pair:
    """A ResNet of one BasicBlock a stage for 28x28 grey images, 16 frequency groups.

    timm's ResNet with channels (32, 64, 96, 128), and the stem that is usual for images so small: 3x3 at stride 1
    without pooling, so the maps have 28, 14, 7 and 4 pixels a side.
    """
    torch.manual_seed(seed)
    net = ResNet(BasicBlock, layers=(1, 1, 1, 1), channels=(32, 64, 96, 128), num_classes=10, in_chans=1)
    net.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    fdconv = convert_to_fdconv(copy.deepcopy(net), include="layer*", num_bands=16)
    return Pair("small net, FDConv", "small net", move_gates(fdconv, seed), net, (1, 28, 28))


def _literal_forward(layer: FDConv2d | FDLinear, x: Tensor) -> Tensor:
    state = dict(layer.named_parameters()) | dict(layer.named_buffers())
    arguments = {"num_bands": layer.fdw.num_bands, "ksm": layer.ksm.modulate_weight, "training": layer.training}
    if isinstance(layer, FDLinear):
        return literal.fdlinear(state, x, layer.static_shape[:2], **arguments)
    arguments |= {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    if layer.fbm is not None:
        arguments["cutoffs"] = tuple(numerator / denominator for numerator, denominator in layer.fbm.cutoffs)
    return literal.fdconv2d(state, x, layer.static_shape, **arguments)


def literal_model(model: nn.Module) -> nn.Module:
    """Return a copy of an FDConv model, with the same weights, whose FDConv layers compute the equations as written.

    One sample, one frequency group and one band at a time, on the CPU: what the paper says in plain PyTorch. It is
    not the authors' code.

    Raises:
        ValueError: No layer is FDConv, or one has the masks and the order of the official code (`mask_grid`), which the
            equations lack.
    """
    written_out = copy.deepcopy(model)
    if not any(True for _ in named_fd_layers(written_out)):
        raise ValueError("--reference has the equations of FDConv alone, and the model has no such layer")
    for name, layer in named_fd_layers(written_out):
        if layer.fdw.official_order:
            raise ValueError(f"--reference has no mask_grid, which {name or 'the layer'} has")
        layer.forward = partial(_literal_forward, layer)
    return written_out
