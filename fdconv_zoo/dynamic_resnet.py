"""ResNets with the dynamic convolutions that the paper compares FDConv with, each where its own paper has it.

Papers: CondConv https://arxiv.org/abs/1904.04971, DY-Conv https://arxiv.org/abs/1912.03458, DCD
https://arxiv.org/abs/2103.08756, ODConv https://arxiv.org/abs/2209.07947, KernelWarehouse
https://arxiv.org/abs/2406.07879

| model | dynamic | parameters beyond the static ResNet-50 |
|---|---|---:|
| `_condconv` | branches of the last stage | 89,981,000 |
| `_dyconv` | all but the stem | 75,338,144 |
| `_dcd` | branches | 4,049,032 |
| `_odconv`, `_odconv_1x` | branches | 65,113,856, 3,078,080 |
| `_kw`, `_kw_4x` | branches and strided shortcuts | 2,495,278, 76,458,112 |
"""

from functools import partial
from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .build import ConvertedModel, build_fdconv
from .conversion import filter_pretrained, init_static
from .default_cfgs import converted_cfgs
from .methods import METHODS


class DynamicResNet(ConvertedModel, ResNet):
    """timm's ResNet with dynamic convolutions in its stages."""

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        return name.startswith("layer")

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialises as the static model would be, and the dynamic layers as their paper does."""
        init_static(self, partial(super().init_weights, zero_init_last=zero_init_last))
        self._start_from_scratch()


class CondConvResNet(DynamicResNet):
    """timm's ResNet with CondConv2d in the branches of its last stage."""

    method = "condconv"
    options = frozenset(METHODS["condconv"].options)

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        return name.startswith("layer4")


class DYConvResNet(DynamicResNet):
    """timm's ResNet with DYConv2d in all of its stages, shortcuts included."""

    method = "dyconv"
    options = frozenset(METHODS["dyconv"].options)


class DCDResNet(DynamicResNet):
    """timm's ResNet with DCDConv2d in its residual branches."""

    method = "dcd"
    options = frozenset(METHODS["dcd"].options)


class ODConvResNet(DynamicResNet):
    """timm's ResNet with ODConv2d in its residual branches."""

    method = "odconv"
    options = frozenset(METHODS["odconv"].options)


class KWResNet(DynamicResNet):
    """timm's ResNet with KWConv2d in its stages, one warehouse for each."""

    method = "kw"
    options = frozenset(METHODS["kw"].options)


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Makes a static ResNet's weights the dynamic one's; such weights stay as they are."""
    return filter_pretrained(state_dict, model)


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "resnet18": dict(block=BasicBlock, layers=(2, 2, 2, 2)),
    "resnet50": dict(block=Bottleneck, layers=(3, 4, 6, 3)),
}
SUFFIXES = ("condconv", "dyconv", "dcd", "odconv", "odconv_1x", "kw", "kw_4x")

default_cfgs = generate_default_cfgs(
    {
        tag: cfg
        for base in ARCHITECTURES
        for suffix in SUFFIXES
        for tag, cfg in converted_cfgs(base, f"{base}_{suffix}", default="a1_in1k").items()
    }
)


def _create(
    model_cls: type[DynamicResNet], variant: str, pretrained: bool, kwargs: dict[str, Any], **options: Any
) -> DynamicResNet:
    model_args = {**ARCHITECTURES[variant.partition("_")[0]], **options}
    return build_fdconv(model_cls, variant, pretrained, checkpoint_filter_fn, **{**model_args, **kwargs})


@register_model
def resnet18_condconv(pretrained: bool = False, **kwargs: Any) -> CondConvResNet:
    """ResNet-18 with CondConv."""
    return _create(CondConvResNet, "resnet18_condconv", pretrained, kwargs)


@register_model
def resnet18_dyconv(pretrained: bool = False, **kwargs: Any) -> DYConvResNet:
    """ResNet-18 with DY-Conv."""
    return _create(DYConvResNet, "resnet18_dyconv", pretrained, kwargs)


@register_model
def resnet18_dcd(pretrained: bool = False, **kwargs: Any) -> DCDResNet:
    """ResNet-18 with DCD in its form for BasicBlocks."""
    return _create(DCDResNet, "resnet18_dcd", pretrained, kwargs, pool=2)


@register_model
def resnet18_odconv(pretrained: bool = False, **kwargs: Any) -> ODConvResNet:
    """ResNet-18 with ODConv, four kernels."""
    return _create(ODConvResNet, "resnet18_odconv", pretrained, kwargs)


@register_model
def resnet18_odconv_1x(pretrained: bool = False, **kwargs: Any) -> ODConvResNet:
    """ResNet-18 with ODConv, one kernel."""
    return _create(ODConvResNet, "resnet18_odconv_1x", pretrained, kwargs, num_kernels=1)


@register_model
def resnet18_kw(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-18 with KernelWarehouse, as many cells as static weights."""
    return _create(KWResNet, "resnet18_kw", pretrained, kwargs)


@register_model
def resnet18_kw_4x(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-18 with KernelWarehouse, four times as many cells."""
    return _create(KWResNet, "resnet18_kw_4x", pretrained, kwargs, cell_num_ratio=4)


@register_model
def resnet50_condconv(pretrained: bool = False, **kwargs: Any) -> CondConvResNet:
    """ResNet-50 with CondConv."""
    return _create(CondConvResNet, "resnet50_condconv", pretrained, kwargs)


@register_model
def resnet50_dyconv(pretrained: bool = False, **kwargs: Any) -> DYConvResNet:
    """ResNet-50 with DY-Conv."""
    return _create(DYConvResNet, "resnet50_dyconv", pretrained, kwargs)


@register_model
def resnet50_dcd(pretrained: bool = False, **kwargs: Any) -> DCDResNet:
    """ResNet-50 with DCD."""
    return _create(DCDResNet, "resnet50_dcd", pretrained, kwargs)


@register_model
def resnet50_odconv(pretrained: bool = False, **kwargs: Any) -> ODConvResNet:
    """ResNet-50 with ODConv, four kernels."""
    return _create(ODConvResNet, "resnet50_odconv", pretrained, kwargs)


@register_model
def resnet50_odconv_1x(pretrained: bool = False, **kwargs: Any) -> ODConvResNet:
    """ResNet-50 with ODConv, one kernel."""
    return _create(ODConvResNet, "resnet50_odconv_1x", pretrained, kwargs, num_kernels=1)


@register_model
def resnet50_kw(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-50 with KernelWarehouse, as many cells as static weights."""
    return _create(KWResNet, "resnet50_kw", pretrained, kwargs)


@register_model
def resnet50_kw_4x(pretrained: bool = False, **kwargs: Any) -> KWResNet:
    """ResNet-50 with KernelWarehouse, four times as many cells."""
    return _create(KWResNet, "resnet50_kw_4x", pretrained, kwargs, cell_num_ratio=4)
