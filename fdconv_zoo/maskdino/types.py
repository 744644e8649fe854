"""What goes into the head and comes out of it. Boxes are (cx, cy, w, h) in [0, 1] of the padded images."""

from typing import NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """Objects of one image.

    Attributes:
        labels: (n,), from 0.
        boxes: (n, 4).
        masks: (n, H, W) of the padded image, 0 and 1 of any dtype.
    """

    labels: Tensor
    boxes: Tensor
    masks: Tensor


class NoisedTargets(NamedTuple):
    """Targets with noise, in slots: target j of an image has slot `g * (slots / groups) + j` in group g.

    Attributes:
        labels: (B, slots).
        boxes: (B, slots, 4).
        filled: (B, slots), bool; the other slots are empty.
        groups: Number of groups, which do not see each other.
    """

    labels: Tensor
    boxes: Tensor
    filled: Tensor
    groups: int


class Prediction(NamedTuple):
    """What is said of each query.

    Attributes:
        logits: (B, Q, K), with softmax classes (B, Q, K + 1), the last one "none".
        boxes: (B, Q, 4).
        masks: Logits (B, Q, h, w) at stride 4.
    """

    logits: Tensor
    boxes: Tensor
    masks: Tensor


class Outputs(NamedTuple):
    """All predictions.

    Attributes:
        predictions: Before any layer and after each one, the last is the result; in eval mode the last alone.
        noised: The same of the noised slots; empty without them.
        selection: Of the selected queries as they were in the encoder, in training; else None.
    """

    predictions: list[Prediction]
    noised: list[Prediction]
    selection: Prediction | None


class Instances(NamedTuple):
    """Objects found in one image, best first.

    Attributes:
        scores: (n,).
        labels: (n,).
        boxes: (n, 4), x1 y1 x2 y2 in pixels.
        masks: (n, H, W), bool.
    """

    scores: Tensor
    labels: Tensor
    boxes: Tensor
    masks: Tensor


class Panoptic(NamedTuple):
    """A segment for each pixel of one image.

    Attributes:
        segments: (H, W), 0 for none, else 1 and up, int32.
        classes: Class of segment 1, 2, and so on.
    """

    segments: Tensor
    classes: list[int]
