"""What the experiments' tasks have in common: images to train on and to test on, a network, measures."""

from typing import Any, NamedTuple, Protocol

import numpy as np
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.transforms import v2

from common.demo_data import STATIC, read_static_weights

# MobileNetV2 up to a stride of 16: four steps of two, five stages.
TRUNK_STRIDES, TRUNK_STAGES = 4, 5
# Of grey images: the networks know colour photos.
PREPARE = [
    v2.ToDtype(torch.float32, scale=True),
    v2.Lambda(lambda image: image.expand(3, -1, -1)),
    v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
]
Outcome = dict[str, Any]


class Data(NamedTuple):
    """Data of a run.

    Attributes:
        train: Images to train on, with augmentation.
        plain: The same without it, to calibrate and to measure on.
        curve: Images to test on after each epoch.
        test: Images to test on after the last.
        test_facts: What the outcome of a run tells of the test images beside the answers.
    """

    train: Dataset
    plain: Dataset
    curve: Dataset
    test: Dataset
    test_facts: dict[str, Any]


class Task(Protocol):
    """A data set with its network.

    Attributes:
        measures: Names, the first of which decides.
        facts: Data's digests, for the record.
    """

    measures: tuple[str, ...]
    facts: dict[str, Any]

    def data(self, phase: str, fold: int, seed: int) -> Data:
        """Data of a run: phases `tune` and `search` never see what `claim` tests on."""

    def create_model(self, seed: int) -> nn.Module:
        """Static network with ImageNet weights and a head that the seed draws."""

    def outcome(self, outputs: Tensor, labels: Tensor, facts: dict[str, Any]) -> Outcome:
        """What is kept of the answers to all test images: enough to compute the measures of any draw of them."""

    def measure(self, outcome: Outcome, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Measures, of each row of weights (draws, images): how often each test image is counted."""

    def clusters(self, outcome: Outcome) -> np.ndarray:
        """What each test image belongs to (images,): the bootstrap draws these."""


def load_trunk(full: bool) -> nn.Module:
    """timm's MobileNetV2 with torchvision's ImageNet weights, without a classifier.

    Args:
        full: Whole, or its first stages up to a stride of 16 (96 channels), without the last two and the head's
            convolution, which have three quarters of the weights and work on maps of 3x3 at 96 pixels.
    """
    model = timm.create_model(STATIC)
    model.load_state_dict(read_static_weights())
    if not full:
        model.prune_intermediate_layers([TRUNK_STRIDES - 1])
    return model


def create_classifier(classes: int, seed: int, full: bool) -> nn.Module:
    """MobileNetV2 with ImageNet weights and a classifier that the seed draws.

    Args:
        classes: Of the data.
        seed: Of the classifier's weights.
        full: As for :func:`load_trunk`.
    """
    model = load_trunk(full)
    torch.manual_seed(seed)
    model.reset_classifier(classes, "avg")
    return model
