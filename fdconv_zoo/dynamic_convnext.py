"""ConvNeXt with KernelWarehouse in its MLPs.

Paper: KernelWarehouse: Rethinking the Design of Dynamic Convolution, ICML 2024, https://arxiv.org/abs/2406.07879
ConvNeXt: A ConvNet for the 2020s, CVPR 2022, https://arxiv.org/abs/2201.03545

Both layers of every MLP, pointwise convolutions here, share one warehouse a stage; depthwise 7x7 convolutions, stem,
downsampling and head stay static. The placement is ours: the paper's was not there to be read.
"""

from typing import Any

from timm.models import generate_default_cfgs, register_model
from timm.models.convnext import ConvNeXt
from timm.models.convnext import checkpoint_filter_fn as static_filter_fn
from torch import Tensor, nn

from .build import ConvertedModel, build_fdconv
from .conversion import filter_pretrained, static_shapes
from .default_cfgs import converted_cfgs
from .methods import METHODS


class KWConvNeXt(ConvertedModel, ConvNeXt):
    """timm's ConvNeXt with KWConv2d in its MLPs, one warehouse for each stage."""

    method = "kw"
    options = frozenset(METHODS["kw"].options)

    @staticmethod
    def _include(name: str, module: nn.Module) -> bool:
        return ".mlp." in name


def checkpoint_filter_fn(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Makes a static ConvNeXt's weights, timm's or the original ones, the dynamic one's."""
    return filter_pretrained(static_filter_fn(state_dict, static_shapes(model)), model)


default_cfgs = generate_default_cfgs(converted_cfgs("convnext_tiny", "convnext_tiny_kw", default="fb_in1k"))


@register_model
def convnext_tiny_kw(pretrained: bool = False, **kwargs: Any) -> KWConvNeXt:
    """ConvNeXt-Tiny with KernelWarehouse, as many cells as static weights."""
    model_args = dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768), conv_mlp=True)
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build_fdconv(
        KWConvNeXt,
        "convnext_tiny_kw",
        pretrained,
        checkpoint_filter_fn,
        feature_cfg=feature_cfg,
        **dict(model_args, **kwargs),
    )
