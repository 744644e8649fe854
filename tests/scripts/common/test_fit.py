"""The public training loop: any model, any data sets, a recipe; what it does is what its parts do by hand."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import ClassificationTask
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from train_runs import photos

from common.fit import fit
from common.loop import DivergedError, Trainer
from common.training_recipe import Recipe
from fdconv_zoo import FDConv2d, modulation_parameters

SMALL = Recipe(batch_size=4, opt="momentum", lr=0.05, weight_decay=0.0, epochs=3, warmup_epochs=0)


@pytest.fixture(scope="module")
def crops():
    """Crops of three photos and which of them each is from: 60 to train on, 30 others to evaluate on."""
    generator = torch.Generator().manual_seed(0)
    images, labels = [], []
    for label, path in enumerate(photos()[:3]):
        picture = resize(pil_to_tensor(Image.open(path).convert("RGB")), [96, 96]).float() / 128 - 1
        for y, x in torch.randint(0, 64, (30, 2), generator=generator).tolist():
            images.append(picture[:, y : y + 32, x : x + 32])
            labels.append(label)
    order = torch.randperm(90, generator=generator)
    images, labels = torch.stack(images)[order], torch.tensor(labels)[order]
    return TensorDataset(images[:60], labels[:60]), TensorDataset(images[60:], labels[60:])


def small_net():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), FDConv2d(8, 16, 3, num_bands=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


def test_any_module_learns_to_tell_photos_apart(crops):
    recipe = Recipe(batch_size=10, opt="adamw", lr=5e-3, epochs=12, warmup_epochs=1)
    rows = list(fit(small_net(), *crops, recipe, seed=0))
    assert [row["epoch"] for row in rows] == list(range(1, 13))
    assert rows[0].keys() == {"epoch", "train_loss", "loss", "top1", "top5"}
    assert rows[-1]["train_loss"] < 0.5 * rows[0]["train_loss"]
    assert rows[-1]["top1"] > 80  # a constant answer has 33


def test_updates_are_those_of_torch_by_hand(crops):
    train_set, _ = crops
    losses, model, twin = [], small_net(), small_net()
    list(fit(model, *crops, SMALL, seed=5, on_update=lambda epoch, loss: losses.append((epoch, loss))))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    torch.manual_seed(5)
    loader = DataLoader(train_set, 4, shuffle=True, drop_last=True)
    expected = []
    for epoch in (1, 2, 3):
        for images, labels in loader:
            loss = F.cross_entropy(twin(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append((epoch, loss.item()))
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (1 + math.cos(math.pi * len(expected) / 45)) / 2
        torch.empty((), dtype=torch.int64).random_()  # what the loader of an evaluation draws
    assert len(losses) == 45
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_frozen_modulation_stays_and_then_moves(crops):
    recipe = replace(SMALL, epochs=1, weight_decay=0.1, modulation_frozen_epochs=0.5)
    model = small_net()
    before = {name: parameter.detach().clone() for name, parameter in modulation_parameters(model)}
    spectrum, unmoved = model[3].fdw.spectrum.detach().clone(), []

    def look(epoch, loss):
        found = dict(modulation_parameters(model))
        unmoved.append(all(torch.equal(found[name], before[name]) for name in before))

    list(fit(model, *crops, recipe, seed=0, on_update=look))
    assert unmoved == [True] * 8 + [False] * 7  # of 15 updates
    assert not torch.equal(model[3].fdw.spectrum, spectrum)


def test_modulation_is_clipped_apart(crops):
    def first_step(**options):
        recipe = replace(SMALL, momentum=0.0, epochs=1, **options)
        model, moved = small_net(), {}
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        def look(epoch, loss):
            for name, parameter in model.named_parameters():
                moved.setdefault(name, (parameter.detach() - before[name]).norm().item())

        list(fit(model, *crops, recipe, seed=0, on_update=look))
        own = {f"3.{name}" for name, _ in modulation_parameters(model[3])}
        return [math.hypot(*(moved[name] for name in moved if (name in own) == part)) for part in (True, False)]

    modulation, others = first_step()
    assert first_step(clip_modulation=modulation / 0.05 / 4) == [pytest.approx(modulation / 4, rel=1e-3), others]
    apart = first_step(clip_modulation=100.0, clip_grad=others / 0.05 / 2)
    assert apart == [pytest.approx(modulation, rel=1e-3), pytest.approx(others / 2, rel=1e-3)]


def test_a_seed_repeats_and_another_does_not(crops):
    first, again, other = (list(fit(small_net(), *crops, SMALL, seed=seed)) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_maps_of_labels_and_metrics_of_the_caller():
    images = torch.randn(8, 3, 6, 6)
    dataset = TensorDataset(images, (images[:, 0] > 0).long())
    recipe = Recipe(batch_size=2, opt="adam", lr=0.1, epochs=10, warmup_epochs=0, smoothing=0.1, channels_last=True)
    torch.manual_seed(0)
    model = nn.Conv2d(3, 2, 1)

    def metrics():
        return MetricCollection({"accuracy": MulticlassAccuracy(2, average="micro")})

    *_, last = fit(model, dataset, dataset, recipe, seed=0, metrics=metrics)
    assert last.keys() == {"epoch", "train_loss", "accuracy"}
    assert last["accuracy"] > 0.9


def test_smoothing_is_timms(crops):
    losses = []
    smooth = Recipe(batch_size=4, lr=0.0, epochs=1, warmup_epochs=0, smoothing=0.2)
    model = small_net()
    list(fit(model, *crops, smooth, seed=3, on_update=lambda epoch, loss: losses.append(loss)))
    torch.manual_seed(3)
    images, labels = next(iter(DataLoader(crops[0], 4, shuffle=True)))
    expected = LabelSmoothingCrossEntropy(0.2)(small_net()(images), labels)
    assert losses[0] == pytest.approx(expected.item(), rel=1e-5)


def test_divergence_is_an_error(crops):
    recipe = Recipe(batch_size=4, lr=1e30, epochs=2, warmup_epochs=0)
    with pytest.raises(DivergedError, match="not finite in epoch 1"):
        list(fit(small_net(), *crops, recipe, seed=0))


def test_too_few_images_are_an_error(crops):
    with pytest.raises(ValueError, match="60 images to train on, fewer than one batch of 64"):
        next(fit(small_net(), *crops, Recipe(batch_size=64), seed=0))


def test_recipe_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match="learning_rate"):
        Recipe(learning_rate=0.1)
    with pytest.raises(ValueError, match="batch_size is 0, it must be at least 1"):
        Recipe(batch_size=0)


def test_an_epoch_can_be_left_and_gone_on_with(crops):
    """The same updates, whether in one go or begun by one trainer and ended by another."""
    batches = list(DataLoader(crops[0], 4))

    def trainer(model, **options):
        task = ClassificationTask(model, nn.CrossEntropyLoss(), verbose=False)
        return Trainer(task=task, recipe=SMALL, epoch_batches=15, grad_accum_steps=2, **options)

    whole = trainer(small_net())
    expected = torch.stack(list(whole.train_epoch(iter(batches))))
    assert (len(expected), whole.updates_per_epoch, whole.images_per_update) == (8, 8, 8)
    model = small_net()
    first = trainer(model, steps=3)
    losses = list(first.train_epoch(iter(batches)))
    assert first.finished and not first.next_epoch()
    second = trainer(model, progress=first.progress)
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    losses += list(second.train_epoch(iter(batches[6:])))
    assert torch.stack(losses).equal(expected)
    assert second.next_epoch() and second.progress.epoch == 1
