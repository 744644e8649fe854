"""Weighted measures against scikit-learn, and intervals of paired differences."""

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from experiments.finetune.bootstrap import draw_weights, paired_difference
from experiments.finetune.elpv import SolarCells, weighted_auroc
from experiments.finetune.fashion import FashionMnist
from experiments.finetune.landcover import LandCover

RANDOM = np.random.default_rng(0)


@pytest.fixture
def cells():
    """The task without its photos."""
    return SolarCells.__new__(SolarCells)


def outcome(images=60, right=0.0):
    labels = RANDOM.integers(2, size=images)
    scores = np.clip(RANDOM.random(images) * (1 - right) + labels * right, 0, 1).round(1)
    return {"scores": scores.tolist(), "labels": labels.tolist(), "modules": (np.arange(images) // 6).tolist()}


def test_weights_count_images_as_often(cells):
    found = outcome()
    weights = RANDOM.integers(0, 4, size=(3, 60)).astype(float)
    measures = cells.measure(found, weights)
    for row, draw in enumerate(weights.astype(int)):
        labels, scores = (np.repeat(found[key], draw) for key in ("labels", "scores"))
        assert measures["AUROC"][row] == pytest.approx(roc_auc_score(labels, scores))
        assert measures["accuracy"][row] == pytest.approx(np.mean((scores > 0.5) == labels))
        assert measures["macro F1"][row] == pytest.approx(f1_score(labels, scores > 0.5, average="macro"))


def test_an_area_without_a_class_is_none():
    assert np.isnan(weighted_auroc(np.array([0.1, 0.9]), np.array([0, 1]), np.array([[1.0, 0.0]]))).all()


def test_iou_is_that_of_the_groups_that_occur():
    counts = np.zeros((2, 64), int)
    counts[0, 0], counts[0, 1], counts[1, 9] = 30, 10, 40  # 10 pixels of group 0 are taken for 1
    measures = LandCover.measure(LandCover.__new__(LandCover), {"counts": counts.tolist()}, np.ones((1, 2)))
    assert measures["mIoU"][0] == pytest.approx((30 / 40 + 40 / 50) / 2)
    assert measures["accuracy"][0] == pytest.approx(70 / 80)


def test_clusters_are_drawn_whole():
    clusters = np.array([5, 5, 7, 9, 9, 9])
    weights = draw_weights(clusters, 200, np.random.default_rng(1))
    assert (weights[:, 0] == weights[:, 1]).all() and (weights[:, 3] == weights[:, 5]).all()
    assert (weights[:, [0, 2, 3]].sum(1) == 3).all()


def test_a_better_variant_is_ahead_and_chance_is_undecided(cells):
    runs = [(fold, seed) for fold in (0, 1) for seed in (0, 1, 2)]
    base = {run: outcome() for run in runs}
    better = {run: {**found, "scores": [(s + 2 * y) / 3 for s, y in zip(found["scores"], found["labels"], strict=True)]}
              for run, found in base.items()}  # fmt: skip
    chance = {run: {**found, "scores": RANDOM.random(60).tolist()} for run, found in base.items()}
    gain = paired_difference(cells, better, base, "AUROC", draws=300)
    assert gain.low > 0
    once = np.ones((1, 60))
    gains = [cells.measure(better[run], once)["AUROC"] - cells.measure(base[run], once)["AUROC"] for run in runs]
    assert gain.mean == pytest.approx(np.mean(gains))
    assert paired_difference(cells, base, better, "AUROC", draws=300).high < 0
    undecided = paired_difference(cells, chance, base, "AUROC", draws=300)
    assert undecided.low <= 0 <= undecided.high


def test_nothing_in_common_is_an_error(cells):
    with pytest.raises(ValueError, match="no runs of equal fold and seed"):
        paired_difference(cells, {(0, 0): outcome()}, {(0, 1): outcome()}, "AUROC")


def test_the_quadratic_score_is_briers():
    task = FashionMnist.__new__(FashionMnist)
    logits, labels = torch.randn(5, 10, generator=torch.Generator().manual_seed(0)), torch.arange(5)
    brier = (logits.softmax(1) - torch.eye(10)[labels]).square().sum(1)
    found = task.outcome(logits, labels, {})
    assert found["quadratic"] == pytest.approx((1 - brier).tolist(), abs=6e-3)
    measures = task.measure(found, np.array([[1.0, 0, 0, 0, 3]]))
    assert measures["quadratic score"][0] == pytest.approx((1 - brier[0] + 3 - 3 * brier[4]).item() / 4, abs=6e-3)
    right = (logits.argmax(1) == labels).float()
    assert measures["accuracy"][0] == pytest.approx(((right[0] + 3 * right[4]) / 4).item())
