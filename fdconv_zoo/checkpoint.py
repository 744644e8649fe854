"""State dicts from elsewhere: the prefixes that wrappers leave, and why one does not fit a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ["describe_misfits", "fits", "strip_prefixes"]

# Of DDP, torch.compile, Lightning modules, averaged models, and modules that hold a backbone under a usual name.
WRAPPERS = ("module.", "_orig_mod.", "model.", "ema_model.", "ema.", "net.", "network.", "backbone.", "encoder.")
EXTRA = ("n_averaged",)  # the counter of torch's AveragedModel
# Missing from checkpoints of before torch 0.4.1, and of before layers kept their options beside their weights.
# And what says that BatchNorm was absorbed into a layer's filters, which loading sets and takes away.
SCALE = "filter_scale"
OPTIONAL = ("num_batches_tracked", "band_options.values", SCALE)


def strip_prefixes(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state dict without the prefixes of wrappers, where all keys have one that the model's own keys lack.

    Args:
        state_dict: Weights, of a wrapped model perhaps.
        model: What they are for.
    """
    own = model.state_dict()
    state = {key: value for key, value in state_dict.items() if key not in EXTRA or key in own}
    while state:
        prefix = next((wrapper for wrapper in WRAPPERS if all(key.startswith(wrapper) for key in state)), None)
        if prefix is None or any(key.startswith(prefix) for key in own):
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def fits(key: str, own: Mapping[str, Tensor]) -> bool:
    """Whether a model takes a key: its own, or absorbed BatchNorm's for any FDConv layer.

    Args:
        key: Of a state dict.
        own: The model's state dict.
    """
    return key in own or (key.endswith(SCALE) and f"{key.removesuffix(SCALE)}fdw.spectrum" in own)


def describe_misfits(state_dict: Mapping[str, Tensor], model: nn.Module) -> str:
    """Say why weights do not load into a model, with the first key of a kind; empty if they do.

    Args:
        state_dict: Weights without the prefixes of wrappers.
        model: What they are for.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state_dict and not key.endswith(OPTIONAL)]
    unexpected = [key for key in state_dict if not fits(key, own)]
    shapes = [
        f"{key} {tuple(state_dict[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in state_dict and state_dict[key].shape != own[key].shape
    ]
    kinds = {"missing keys": missing, "unexpected keys": unexpected, "other shapes": shapes}
    found = [
        f"{kind} ({len(keys)}): {keys[0]}{', ...' if len(keys) > 1 else ''}" for kind, keys in kinds.items() if keys
    ]
    if not found:
        return ""
    cause = _guess_cause(state_dict, model, missing, unexpected, shapes)
    return "; ".join(found) + (f". {cause}" if cause else "")


def _guess_cause(
    state_dict: Mapping[str, Tensor], model: nn.Module, missing: list[str], unexpected: list[str], shapes: list[str]
) -> str:
    """What such misfits come from as a rule; empty where nothing is likely."""
    own = model.state_dict()
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    classifier = tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))
    if classifier and not unexpected and all(text.startswith(classifier) for text in (*missing, *shapes)):
        return "The classifier only: the weights are of a model with other classes, or without a classifier"
    absorbed = [any(key.endswith(SCALE) for key in keys) for keys in (state_dict, own)]
    if absorbed[0] != absorbed[1]:
        here, there = ("these weights", "this model") if absorbed[0] else ("this model", "these weights")
        return f"BatchNorm was absorbed into layers of {here} (fuse()), not of {there}: fuse both, or load before it"
    parts = (".fdw.", ".ksm.")
    if any(part in key for key in unexpected for part in parts) and not any(
        part in key for key in own for part in parts
    ):
        return "They are weights of an FDConv model, and this is a static one: its name with _fdconv takes them"
    static = {f"{key.partition('.fdw.')[0]}.weight" for key in missing if ".fdw." in key}
    if unexpected and static.issuperset(unexpected):
        return "They are weights of a static model, or with fewer FDConv layers: convert_static_state_dict moves them"
    if any("dft_weight" in key for key in unexpected):
        return "The names are the official FDConv code's: convert_official_state_dict reads them"
    if any(key.startswith("features.") for key in unexpected) and not any(key.startswith("features.") for key in own):
        return "The names are torchvision's: timm's model of this name has others; convert torchvision's model instead"
    if any(key.startswith(("optimizer", "lr_scheduler", "epoch", "param_groups")) for key in state_dict):
        return "It is a training state, not weights: give the file of weights beside it"
    if not (missing or unexpected):
        if all(any(part in text for part in parts) for text in shapes):
            return "The FDConv layers have other options there, such as num_bands: give the model the same"
        if all("position" in text or "pos_embed" in text for text in shapes):
            return "The weights are of a model of another img_size or window_size: give the model the same"
    shared = len(own) - len(missing)
    if shared < len(own) / 2:
        return "Most names differ: the weights are another architecture's"
    if len(shapes) > shared / 4 or missing or unexpected:
        return "Most names are the same: the weights are of a model of another width or depth, or with other options"
    return ""
