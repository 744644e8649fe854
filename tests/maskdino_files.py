"""MaskDINO run by the original code: inputs, predictions, losses and gradients, in tests/golden/maskdino."""

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from fdconv_zoo.maskdino import MaskDino, MaskDinoConfig, Target, convert_official_state_dict

FOLDER = Path(os.environ.get("FDCONV_GOLDEN_MASKDINO", Path(__file__).parent / "golden" / "maskdino"))
FILES = ("semantic_learnt_queries", "instance_selected_queries", "panoptic_selected_queries")
SAME_NAMES = (
    "mask_dim", "encoder_layers", "decoder_layers", "num_queries", "noise_scale", "num_points", "hidden_dim",
    "encoder_ffn_dim", "decoder_ffn_dim", "num_classes", "softmax_classes", "denoising_queries",
)  # fmt: skip


@dataclass(frozen=True)
class Golden:
    """A file: its metadata and its tensors."""

    facts: dict
    tensors: dict[str, Tensor]

    def below(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def config(self) -> MaskDinoConfig:
        facts = self.facts
        maps = len(facts["encoder_features"])
        assert facts["encoder_features"] == ["res2", "res3", "res4", "res5"][-maps:]
        weights = {"classes": "ce", "mask": "mask", "dice": "dice", "box": "bbox", "giou": "giou"}
        assert all(facts["costs"][cost] == facts["weights"][f"loss_{loss}"] for cost, loss in weights.items())
        return MaskDinoConfig(
            **{name: facts[name] for name in SAME_NAMES},
            in_channels=tuple(facts["in_channels"]),
            encoder_maps=maps,
            extra_levels=facts["num_levels"] - maps,
            coarse_first=facts["feature_order"] == "high2low",
            select_queries=facts["two_stage"],
            initial_boxes=None if facts["initial_boxes"] == "no" else facts["initial_boxes"],
        )

    def head(self) -> MaskDino:
        head = MaskDino(self.config())
        head.load_state_dict(convert_official_state_dict(self.below("state."), head))
        return head

    def features(self) -> list[Tensor]:
        return [self.tensors[f"input.res{stage}"].clone() for stage in (2, 3, 4, 5)]

    def targets(self) -> list[Target]:
        keys = ("labels", "boxes", "masks")
        found = [[self.tensors[f"target.{image}.{key}"] for key in keys] for image in range(2)]
        return [Target(labels.long(), boxes, masks) for labels, boxes, masks in found]


@cache
def read(name: str) -> Golden:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return Golden(json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def fixed_chance(patch) -> None:
    """Make every random tensor what the files' were: numpy's first numbers of seed 1, whatever was drawn before."""

    def draw(*shape: int) -> Tensor:
        return torch.from_numpy(np.random.RandomState(1).random_sample(shape)).float()

    def rand(*shape, device=None, **_):
        return draw(*(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape))

    patch.setattr(torch, "rand", rand)
    patch.setattr(torch, "rand_like", lambda x: draw(*x.shape))
    patch.setattr(torch, "randint_like", lambda x, high: (high * draw(*x.shape)).long())
