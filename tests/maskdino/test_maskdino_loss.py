"""MaskDINO's losses where there is little to match, in low precision, over processes; what is made of predictions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fdconv_zoo.maskdino import MaskDinoLoss, instances, match, noise_targets, one_image, panoptic
from fdconv_zoo.maskdino.matcher import class_cost
from fdconv_zoo.maskdino.types import Prediction
from tests.maskdino_small import SELECTED, maps, objects, small

HEADS = pytest.mark.parametrize("options", [{}, SELECTED], ids=["learnt", "selected"])


def losses(head, features, targets):
    noised = noise_targets(targets, head.config)
    return MaskDinoLoss(head.config)(head(features, noised), targets, noised)


@HEADS
@pytest.mark.parametrize("counts", [[0, 0], [0, 2], [9, 1], [12, 0]], ids=str)
def test_every_parameter_has_a_finite_gradient(options, counts):
    """Also without targets, where DDP would wait for it; with 9 there is one group less than none: no noised slots."""
    head, targets = small(**options), objects(counts)
    terms = losses(head, maps(64, 64), targets)
    MaskDinoLoss(head.config).total(terms).backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    assert any("_dn" in name for name in terms) == (counts == [0, 2])
    if not any(counts):
        assert all(term > 0 if name.startswith("loss_ce") else term == 0 for name, term in terms.items())


def test_terms_of_the_published_depths():
    """9 layers: 95 terms with learnt queries, 105 with selected ones."""
    for options, count in (({}, 95), (SELECTED, 105)):
        head = small(**options, decoder_layers=9)
        terms = losses(head, maps(96, 96, batch=1), objects([1], (96, 96)))
        assert len(terms) == count
        weights = MaskDinoLoss(head.config).weights
        total = sum(weights[f"loss_{name.split('_')[1]}"] * term for name, term in terms.items())
        assert torch.allclose(MaskDinoLoss(head.config).total(terms), total)


@HEADS
def test_bfloat16_losses_are_finite(options):
    head, targets = small(**options), objects([3, 1])
    with torch.autocast("cpu", torch.bfloat16):
        terms = losses(head, maps(64, 64), targets)
        total = MaskDinoLoss(head.config).total(terms)
    total.backward()
    assert all(term.isfinite() and term.dtype == torch.float32 for term in terms.values())
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())


def test_more_targets_than_queries():
    head, targets = small(num_queries=2), objects([5, 1])
    (queries, chosen), _ = match(head(maps(64, 64)).predictions[-1], targets, head.config)
    assert queries.tolist() == [0, 1] and len(set(chosen.tolist())) == 2
    assert all(term.isfinite() for term in losses(head, maps(64, 64), targets).values())


def test_cost_of_softmax_classes_is_of_each_class_alone():
    """ "None" has no cost: queries that are surely nothing are matched as others are."""
    logits = torch.tensor([[1.0, -1, 0], [1, -1, 9]])
    cost = class_cost(logits, torch.tensor([0, 1]))
    assert torch.equal(cost[0], cost[1]) and cost[0, 0] < cost[0, 1]


def test_targets_that_can_not_be_are_named():
    head = small()
    criterion, outputs = MaskDinoLoss(head.config), head(maps(64, 64))

    def refused(message, **changes):
        first, second = objects([2, 1])
        with pytest.raises(ValueError, match=message):
            criterion(outputs, [first, second._replace(**changes)])

    refused(r"image 1 has labels \[4\]: they must be 0 to 3", labels=torch.tensor([4]))
    refused("image 1 has 0 labels, 1 boxes and 1 masks", labels=torch.zeros(0, dtype=torch.int64))
    refused("image 1 has boxes that are not", boxes=torch.tensor([[0.5, 0.5, 0.0, 0.2]]))
    refused("image 1 has boxes that are not", boxes=torch.tensor([[10.0, 20, 30, 40]]))
    refused("all must have the size of the padded images", masks=torch.zeros(1, 64, 60))


def test_diverged_prediction_is_named():
    head, targets = small(), objects([2, 1])
    features = maps(64, 64)
    features[3][1] = torch.nan
    with pytest.raises(RuntimeError, match=r"the cost of matching image . is not finite: the training has diverged"):
        losses(head, features, targets)


def test_losses_of_two_processes_are_those_of_one():
    """Each process has one image and two or no targets: sums are divided by the mean count of both."""
    script = Path(__file__).parents[1] / "maskdino_ranks.py"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("same gradients") == 2


def test_instances_of_a_padded_image_are_in_pixels_of_the_image_as_it_was():
    config = small(**SELECTED).config
    masks = torch.full((1, 2, 16, 24), -9.0)
    masks[0, 0, 4:8, 2:10] = 9
    logits = torch.tensor([[[-9.0, 3, -9, -9], [-9, -9, -9, 0]]])
    boxes = torch.tensor([[[0.25, 0.375, 1 / 3, 0.25], [0.5, 0.5, 0.1, 0.1]]])
    # an image of 96 x 144 pixels, at half the size in a batch padded to 64 x 96
    alone = one_image(Prediction(logits, boxes, masks), 0, (64, 96), (48, 72), (96, 144))
    found = instances(alone, config, top=2)
    assert found.labels.tolist() == [1, 3] and found.masks.shape == (2, 96, 144)
    assert found.boxes[0].tolist() == pytest.approx([16, 32, 80, 64], abs=1e-3)
    # but for its corners, which are cut where maps are resized
    inside = torch.zeros(96, 144, dtype=torch.bool)
    inside[32:64, 16:80] = True
    assert (found.masks[0] & ~inside).sum() == 0 and (inside & ~found.masks[0]).sum() <= 4 * 16
    # a query without a pixel has no score
    assert found.scores[0] == pytest.approx(torch.tensor(3.0).sigmoid(), abs=0.05) and found.scores[1] == 0
    assert instances(alone, config, top=2, things={3}).labels.tolist() == [3]


def test_stuff_of_a_class_is_one_segment():
    config = small(**SELECTED).config
    masks = torch.full((3, 8, 8), -9.0)
    masks[0, :2], masks[1, 3:5], masks[2, 6:] = 9, 9, 9
    logits = torch.full((3, 4), -9.0)
    logits[:, 2] = 3
    prediction = Prediction(logits, torch.zeros(3, 4), masks)
    segments, classes = panoptic(prediction, config, things={0})
    assert classes == [2] and segments[:, 0].tolist() == [1, 1, 0, 1, 1, 0, 1, 1]
    segments, classes = panoptic(prediction, config, things={2})
    assert classes == [2, 2, 2] and segments[:, 0].tolist() == [1, 1, 0, 2, 2, 0, 3, 3]
    segments, classes = panoptic(prediction._replace(logits=torch.full((3, 4), -9.0)), config, things={2})
    assert classes == [] and not segments.any()


def test_instances_of_softmax_classes_are_refused():
    head = small().eval()
    alone = one_image(head(maps(64, 64)).predictions[0], 0, (64, 64), (64, 64), (64, 64))
    for ask in (lambda: instances(alone, head.config), lambda: panoptic(alone, head.config, {0})):
        with pytest.raises(ValueError, match="softmax_classes=False"):
            ask()
