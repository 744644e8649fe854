"""Fashion-MNIST from ImageNet weights: 2,000 images to train on, all 10,000 test images."""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from experiments.fashion_data import FILES, FOLDER, read_split
from experiments.finetune.tasks import PREPARE, Data, Outcome, create_classifier
from experiments.image_tensors import ImageTensors

TRAIN_IMAGES = 2000
CURVE_IMAGES = 500
# Parts of the training set: what rates and variants are chosen with is not trained on for claims.
CLAIM_POOL, CHOICE_POOL, CHOICE_TEST = slice(0, 40000), slice(40000, 57000), slice(57000, 60000)


class FashionMnist:
    """Ten kinds of clothes; each seed draws training images of its own.

    Args:
        img_size: Side of the images, enlarged from 28 pixels.
    """

    measures = ("accuracy", "quadratic score")

    def __init__(self, img_size: int) -> None:
        self.size = [img_size, img_size]
        self.splits = {split: read_split(FOLDER, split) for split in FILES}
        names = [name for names in FILES.values() for name in names]
        self.facts = {name: hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() for name in names}

    def data(self, phase: str, fold: int, seed: int) -> Data:
        """A claim tests on the test images; other phases on 3,000 training images. There is one fold."""
        images, labels = self.splits["train"]
        pool, test = (CLAIM_POOL, self.splits["t10k"])
        if phase != "claim":
            pool, test = CHOICE_POOL, (images[CHOICE_TEST], labels[CHOICE_TEST])
        images, labels = images[pool], labels[pool]
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:TRAIN_IMAGES]
        train_images, train_labels = self._enlarge(images[chosen]), labels[chosen]
        test_images, test_labels = self._enlarge(test[0]), test[1]
        shift = v2.RandomCrop(self.size, padding=self.size[0] // 14)
        augment, plain = v2.Compose([shift, v2.RandomHorizontalFlip(), *PREPARE]), v2.Compose(PREPARE)
        return Data(
            train=ImageTensors(train_images, train_labels, augment),
            plain=ImageTensors(train_images, train_labels, plain),
            curve=ImageTensors(test_images[:CURVE_IMAGES], test_labels[:CURVE_IMAGES], plain),
            test=ImageTensors(test_images, test_labels, plain),
            test_facts={},
        )

    def _enlarge(self, images: Tensor) -> Tensor:
        return v2.functional.resize(images, self.size)

    def create_model(self, seed: int) -> nn.Module:
        """MobileNetV2's trunk with ten classes."""
        return create_classifier(10, seed, full=False)

    def outcome(self, outputs: Tensor, labels: Tensor, facts: dict[str, Any]) -> Outcome:
        """Whether each answer is right, a digit an image, and each quadratic score (Brier's, the higher the better)."""
        shares = outputs.softmax(1)
        right = (outputs.argmax(1) == labels).int().tolist()
        scores = 2 * shares.gather(1, labels[:, None])[:, 0] - shares.square().sum(1)
        return {"right": "".join(map(str, right)), "quadratic": [round(score, 2) for score in scores.tolist()]}

    def measure(self, outcome: Outcome, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Accuracy and mean quadratic score."""
        right, scores = np.array(list(outcome["right"]), dtype=float), np.array(outcome["quadratic"])
        total = weights.sum(1)
        return {"accuracy": weights @ right / total, "quadratic score": weights @ scores / total}

    def clusters(self, outcome: Outcome) -> np.ndarray:
        """Images."""
        return np.arange(len(outcome["right"]))
