"""Land cover by a U-Net on the ImageNet MobileNetV2: dense prediction from ImageNet weights, the paper's setting."""

import hashlib
from typing import Any

import numpy as np
import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn

from common.demo_data import STATIC, read_static_weights
from common.wheels import wheel_file
from experiments.finetune.tasks import TRUNK_STAGES, Data, Outcome
from experiments.landcover_data import GROUPS, IMAGE, LABELS, VALIDATION, LandCoverTiles, cut_tiles, read_map

# Strips to choose rates on; those of a claim are left out meanwhile.
TUNING_STRIP = 4
# Tiles below one another that the bootstrap draws together.
BLOCK_ROWS = 3
ENCODER_DEPTH = 4
DECODER_CHANNELS = (96, 64, 32, 16)


class LandCover:
    """Groups of land cover of each pixel, on strips of the earth that training has not seen.

    Args:
        img_size: Side of the tiles.
    """

    measures = ("mIoU", "accuracy")

    def __init__(self, img_size: int) -> None:
        paths = wheel_file(*IMAGE), wheel_file(*LABELS)
        self.size, self.map = img_size, read_map(*paths)
        self.facts = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def data(self, phase: str, fold: int, seed: int) -> Data:
        """A claim tests on every fifth strip, other phases on other strips; there is one fold."""
        strips = (
            {"validation": VALIDATION} if phase == "claim" else {"validation": TUNING_STRIP, "left_out": VALIDATION}
        )
        train, test, corners = cut_tiles(*self.map, self.size, **strips)
        blocks = corners[:, 1] * 1000 + corners[:, 0] // (BLOCK_ROWS * self.size)
        plain = LandCoverTiles(train.images, train.groups, train.center, train.spread, augment=False)
        return Data(train, plain, test, test, {"blocks": blocks.tolist()})

    def create_model(self, seed: int) -> nn.Module:
        """U-Net on MobileNetV2's stages up to a stride of 16, with a decoder that the seed draws."""
        torch.manual_seed(seed)
        model = smp.Unet(
            f"tu-{STATIC}",
            encoder_depth=ENCODER_DEPTH,
            encoder_weights=None,
            decoder_channels=DECODER_CHANNELS,
            classes=len(GROUPS),
        )
        weights = read_static_weights()
        encoder = model.encoder.model
        encoder.blocks = encoder.blocks[:TRUNK_STAGES]  # the others would be computed, and not looked at
        encoder.load_state_dict({key: weights[key] for key in encoder.state_dict()})
        # what starts untrained, to the parameter groups
        model.pretrained_cfg = {"classifier": ("decoder", "segmentation_head")}
        return model

    def outcome(self, outputs: Tensor, labels: Tensor, facts: dict[str, Any]) -> Outcome:
        """Counts of true and answered groups, 64 numbers a tile."""
        pairs = (labels * len(GROUPS) + outputs.argmax(1)).flatten(1)
        return {"counts": [row.bincount(minlength=len(GROUPS) ** 2).tolist() for row in pairs], **facts}

    def measure(self, outcome: Outcome, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Mean intersection over union of the groups that occur, and pixel accuracy."""
        counts = (weights @ np.array(outcome["counts"])).reshape(len(weights), len(GROUPS), len(GROUPS))
        hits = np.einsum("dgg->dg", counts)
        union = counts.sum(1) + counts.sum(2) - hits
        with np.errstate(invalid="ignore"):
            return {"mIoU": np.nanmean(hits / union, axis=1), "accuracy": hits.sum(1) / counts.sum((1, 2))}

    def clusters(self, outcome: Outcome) -> np.ndarray:
        """Blocks of three tiles of a strip."""
        return np.array(outcome["blocks"])
