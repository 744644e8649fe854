"""Official MaskDINO checkpoints: their keys in this head, and its configuration from their sizes.

None was ever loaded here: names and shapes are those of the specification.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .config import MaskDinoConfig

PREFIX = "sem_seg_head."
OFFICIAL = (
    (r"pixel_decoder\.level_embed", "pixel_decoder.transformer.level_embed"),
    (r"pixel_decoder\.layers\.(.+)", r"pixel_decoder.transformer.encoder.layers.\1"),
    (r"pixel_decoder\.lateral\.0\.(.+)", r"pixel_decoder.adapter_1.\1"),
    (r"pixel_decoder\.lateral\.1\.(.+)", r"pixel_decoder.adapter_1.norm.\1"),
    (r"pixel_decoder\.output\.0\.(.+)", r"pixel_decoder.layer_1.\1"),
    (r"pixel_decoder\.output\.1\.(.+)", r"pixel_decoder.layer_1.norm.\1"),
    (r"(pixel_decoder\..+)", r"\1"),
    (r"layers\.(.+)", r"predictor.decoder.layers.\1"),
    (r"ref_point_head\.(.+)", r"predictor.decoder.ref_point_head.layers.\1"),
    (r"box_embed\.(.+)", r"predictor._bbox_embed.layers.\1"),
    (r"mask_embed\.(.+)", r"predictor.mask_embed.layers.\1"),
    (r"norm\.(.+)", r"predictor.decoder_norm.\1"),
    (r"(.+)", r"predictor.\1"),
)
COPIES = (
    (r"predictor\.decoder\.norm\.", "predictor.decoder_norm."),
    (r"predictor\.(decoder\.)?bbox_embed\.\d+\.", "predictor._bbox_embed."),
)


def official_name(name: str) -> str:
    """Return the official name, without `sem_seg_head.`, of a parameter of the head."""
    pattern, template = next(each for each in OFFICIAL if re.fullmatch(each[0], name))
    official = re.sub(pattern, template, name)
    if name.startswith(("ref_point_head.", "box_embed.", "mask_embed.")):
        # torchvision's MLP counts a ReLU and a dropout after each linear layer
        official = re.sub(r"(?<=layers\.)\d+", lambda number: str(int(number[0]) // 3), official)
    return official


def _of_copy(key: str) -> str:
    """Return the official name of the weight that a key is a copy of; other keys stay."""
    for pattern, original in COPIES:
        key = re.sub(f"^{pattern}", original, key)
    return key


def head_weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the head's weights by their official names without `sem_seg_head.`.

    Args:
        checkpoint: The file's content, `{"model": ...}`, or the state dict in it; may also be the head's weights alone.

    Raises:
        ValueError: There are neither.
    """
    state = checkpoint.get("model", checkpoint)
    # weights saved by an early version of the code may be arrays
    state = {key: torch.as_tensor(value) for key, value in state.items() if not key.startswith("criterion.")}
    if any(key.startswith(PREFIX) for key in state):
        # the backbone's weights are another matter
        state = {key: value for key, value in state.items() if not key.startswith("backbone.")}
    state = {key.removeprefix(PREFIX): value for key, value in state.items()}
    if not any(key.startswith("predictor.") for key in state):
        raise ValueError(f"no MaskDINO head: no key begins with {PREFIX}predictor., but there are {list(state)[:3]}")
    return state


def convert_official_state_dict(checkpoint: Mapping[str, Any], head: nn.Module) -> dict[str, Tensor]:
    """Return an official checkpoint's weights by the names of a head.

    Args:
        checkpoint: As for `head_weights`.
        head: The head that is to load it.

    Raises:
        ValueError: Keys fit nothing or are missing, shapes differ, or copies of a weight do; names them.
    """
    weights = head_weights(checkpoint)
    shapes = {name: value.shape for name, value in head.state_dict().items()}
    names = {official_name(name): name for name in shapes}
    converted: dict[str, Tensor] = {}
    misfits: list[str] = []
    for key, value in weights.items():
        name = names.get(_of_copy(key))
        if name is None:
            misfits.append(f"{key} fits nothing")
        elif value.shape != shapes[name]:
            misfits.append(f"{key} is {tuple(value.shape)}, not {tuple(shapes[name])}")
        elif name in converted and not torch.equal(converted[name], value):
            misfits.append(f"{key} differs from its copy")
        else:
            converted[name] = value
    found = {_of_copy(key) for key in weights}
    misfits += [f"{key} is missing" for key in names if key not in found]
    if misfits:
        more = f", and {len(misfits) - 5} more" if len(misfits) > 5 else ""
        raise ValueError(f"the checkpoint does not fit the head: {'; '.join(misfits[:5])}{more}")
    return converted


def official_config(checkpoint: Mapping[str, Any], **choices: Any) -> MaskDinoConfig:
    """Return the configuration of an official checkpoint, read from its sizes.

    Args:
        checkpoint: As for `head_weights`.
        **choices: What no weight tells: `initial_boxes` and `num_queries` of selected queries (300 in all published
            ones), and what concerns training.

    Raises:
        ValueError: It is no MaskDINO head.
    """
    state = head_weights(checkpoint)

    def count(pattern: str) -> int:
        return len({match[1] for key in state if (match := re.match(pattern, key))})

    try:
        kernels = [
            state[f"pixel_decoder.input_proj.{i}.0.weight"] for i in range(count(r"pixel_decoder\.input_proj\.(\d)"))
        ]
        channels = [kernel.shape[1] for kernel in kernels if kernel.shape[-1] == 1]
        coarse_first = channels[0] > channels[-1]
        finest_first = channels[::-1] if coarse_first else channels
        finest = state["pixel_decoder.adapter_1.weight"].shape[1]
        learnt = "predictor.query_feat.weight" in state
        classes, width = state["predictor.label_enc.weight"].shape
        encoder_layer, decoder_layer = "pixel_decoder.transformer.encoder.layers", "predictor.decoder.layers"
        sizes = {
            "num_classes": classes,
            "in_channels": tuple(finest_first) if len(channels) == 4 else (finest, *finest_first),
            "encoder_maps": len(channels),
            "extra_levels": len(kernels) - len(channels),
            "coarse_first": coarse_first,
            "select_queries": not learnt,
            "softmax_classes": len(state["predictor.class_embed.weight"]) > classes,
            "num_queries": len(state["predictor.query_feat.weight"]) if learnt else 300,
            "hidden_dim": width,
            "mask_dim": len(state["pixel_decoder.mask_features.weight"]),
            "encoder_layers": count(rf"{re.escape(encoder_layer)}\.(\d+)"),
            "decoder_layers": count(rf"{re.escape(decoder_layer)}\.(\d+)"),
            "encoder_ffn_dim": len(state[f"{encoder_layer}.0.linear1.weight"]),
            "decoder_ffn_dim": len(state[f"{decoder_layer}.0.linear1.weight"]),
        }
    except KeyError as error:
        raise ValueError(f"no whole MaskDINO head: it has no {error}") from error
    return MaskDinoConfig(**{**sizes, **choices})
