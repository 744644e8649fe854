"""Pretrained configurations: each ImageNet tag of a timm model, converted on load; names of the zoo's models."""

from typing import Any

import timm
from timm.models import get_pretrained_cfg

DATASETS = ("in1k", "in12k", "in21k", "in22k")
SUFFIX = "_converted"
# Last parts of the models' names: what they are converted to.
KINDS = ("fdconv", "condconv", "dyconv", "dcd", "odconv", "odconv_1x", "kw", "kw_4x")


def converted_cfgs(base: str, name: str, default: str) -> dict[str, dict[str, Any]]:
    """Configurations of a converted model from those of its static base, in the form of timm's `generate_default_cfgs`.

    Args:
        base: timm's name of the static model.
        name: Name of the converted model.
        default: Tag of `base` that `pretrained=True` takes when none is given.

    Returns:
        A configuration for each ImageNet tag that has weights on the Hugging Face Hub, the default first.
        Preprocessing, licence and origin are those of the base; the weights are the base's own file.
    """
    tags = [full_name.partition(".")[2] for full_name in timm.list_pretrained(f"{base}.*")]
    tags.sort(key=lambda tag: (tag != default, tag))
    cfgs = {}
    for tag in tags:
        cfg = get_pretrained_cfg(f"{base}.{tag}").to_dict()
        if not cfg.get("hf_hub_id") or not any(dataset in tag for dataset in DATASETS):
            continue
        for key in ("url", "file", "architecture", "tag"):
            cfg.pop(key, None)
        cfg.update(hf_hub_id=f"timm/{base}.{tag}", hf_hub_filename="model.safetensors")
        cfgs[f"{name}.{tag}{SUFFIX}"] = cfg
    return cfgs


def is_zoo_model(name: str) -> bool:
    """Whether a registered name, with a tag or without, is that of a model of this package."""
    return timm.is_model(name) and name.partition(".")[0].endswith(tuple(f"_{kind}" for kind in KINDS))


def zoo_tags() -> list[str]:
    """Names, with tags, of all models of this package that have pretrained weights."""
    return [name for name in timm.list_pretrained() if is_zoo_model(name)]


def static_name(model_name: str) -> str:
    """timm's name of the static model that a model of this package is made from, with a tag if that has one."""
    twin = get_pretrained_cfg(model_name).hf_hub_id.removeprefix("timm/")
    return twin if "." in model_name else twin.partition(".")[0]
