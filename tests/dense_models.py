"""The three architectures of the model cards, narrow: by keywords, and by name for transformers, which takes none."""

import timm
from timm.models import register_model

NARROW = {
    "resnet50_fdconv": dict(layers=(1, 1, 2, 1), channels=(20, 24, 32, 40)),
    "convnext_tiny_fdconv": dict(depths=(1, 1, 2, 1), dims=(24, 32, 48, 64)),
    "swin_tiny_fdconv": dict(window_size=4, embed_dim=24, depths=(2, 2, 2, 1), num_heads=(2, 2, 4, 4)),
}
MODELS = tuple(NARROW)


@register_model
def narrow_resnet50_fdconv(pretrained=False, **kwargs):
    return timm.create_model("resnet50_fdconv", **(NARROW["resnet50_fdconv"] | kwargs))


@register_model
def narrow_convnext_tiny_fdconv(pretrained=False, **kwargs):
    return timm.create_model("convnext_tiny_fdconv", **(NARROW["convnext_tiny_fdconv"] | kwargs))


@register_model
def narrow_swin_tiny_fdconv(pretrained=False, **kwargs):
    return timm.create_model("swin_tiny_fdconv", **(NARROW["swin_tiny_fdconv"] | kwargs))
