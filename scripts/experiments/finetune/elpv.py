"""Solar cells: four folds over the modules, each photo tested once."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from common.wheels import wheel_file
from experiments.elpv_data import WHEEL, fold_modules, guess_modules, read_cells
from experiments.finetune.tasks import PREPARE, Data, Outcome, create_classifier
from experiments.image_tensors import ImageTensors

FOLDS = 4
# Fold to train on and fold to choose a rate on, for the two folds that neither is.
TUNING = {0: (2, 3), 1: (2, 3), 2: (0, 1), 3: (0, 1)}


def weighted_auroc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve of each row of weights (draws, images); ties count half; NaN without a class."""
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    positive = np.add.reduceat(weights[:, order] * labels[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * (1 - labels[order]), starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative / 2
    with np.errstate(invalid="ignore"):
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


class SolarCells:
    """elpv-dataset, 2,624 photos of cells of 44 modules; is there a defect?

    Args:
        img_size: Side of the images.
        full: Takes the whole MobileNetV2 instead of its trunk.
    """

    measures = ("AUROC", "accuracy", "macro F1")

    def __init__(self, img_size: int, full: bool = False) -> None:
        folder = wheel_file("elpv_dataset", "data/labels.csv", WHEEL).parent
        photos, self.labels, types, digest = read_cells(folder)
        self.modules = guess_modules(types)
        self.folds = fold_modules(self.modules, types, FOLDS)
        self.size, self.full = [img_size, img_size], full
        # a crop of three quarters of a larger photo has as many pixels as the network takes
        self.larger = v2.functional.resize(photos, [img_size * 4 // 3] * 2)
        self.photos = v2.functional.resize(photos, self.size)
        self.facts = {"labels.csv and photos in its order": digest}

    def data(self, phase: str, fold: int, seed: int) -> Data:
        """A claim tests on the fold and trains on the others; a rate for it is tuned on two of these."""
        train_folds, test_fold = [each for each in range(FOLDS) if each != fold], fold
        if phase != "claim":
            train_fold, test_fold = TUNING[fold]
            train_folds = [train_fold]
        train, test = torch.isin(self.folds, torch.tensor(train_folds)), self.folds == test_fold
        augment = v2.Compose(
            [
                # a cell has no upright, and a small crop would cut the crack out of the photo that it labels
                v2.RandomResizedCrop(self.size, scale=(0.7, 1.0)),
                v2.RandomHorizontalFlip(),
                v2.RandomVerticalFlip(),
                *PREPARE,
            ]
        )
        test_set = ImageTensors(self.photos[test], self.labels[test], v2.Compose(PREPARE))
        return Data(
            train=ImageTensors(self.larger[train], self.labels[train], augment),
            plain=ImageTensors(self.photos[train], self.labels[train], v2.Compose(PREPARE)),
            curve=test_set,
            test=test_set,
            test_facts={"modules": self.modules[test].tolist()},
        )

    def create_model(self, seed: int) -> nn.Module:
        """MobileNetV2 with two classes."""
        return create_classifier(2, seed, self.full)

    def outcome(self, outputs: Tensor, labels: Tensor, facts: dict[str, Any]) -> Outcome:
        """Probability of a defect, label and module of each photo."""
        scores = [round(score, 5) for score in outputs.softmax(1)[:, 1].tolist()]
        return {"scores": scores, "labels": labels.tolist(), **facts}

    def measure(self, outcome: Outcome, weights: np.ndarray) -> dict[str, np.ndarray]:
        """AUROC, accuracy and macro F1."""
        scores, labels = np.array(outcome["scores"]), np.array(outcome["labels"])
        answers = (scores > 0.5).astype(int)
        f1 = []
        for each in (0, 1):
            hits = weights @ ((answers == each) & (labels == each))
            f1.append(2 * hits / (weights @ (answers == each) + weights @ (labels == each)).clip(1))
        return {
            "AUROC": weighted_auroc(scores, labels, weights),
            "accuracy": weights @ (answers == labels) / weights.sum(1),
            "macro F1": (f1[0] + f1[1]) / 2,
        }

    def clusters(self, outcome: Outcome) -> np.ndarray:
        """Modules."""
        return np.array(outcome["modules"])
