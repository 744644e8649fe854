"""The temperature's schedule: a line from update to update, in the model and in its average, and what it refuses."""

import pytest
import timm
import torch
from timm.task import ClassificationTask
from torch.utils.data import TensorDataset

from common.fit import fit
from common.loop import Trainer
from common.temperature import temperature_at
from common.training_recipe import Recipe
from fdconv_zoo.layers.dynamic import Annealed

RECIPE = {"batch_size": 4, "opt": "momentum", "lr": 0.01, "epochs": 3, "warmup_epochs": 0}


def model(name="resnet18_odconv_1x"):
    torch.manual_seed(0)
    return timm.create_model(name, layers=(1, 1, 1, 1), channels=(20, 20, 20, 20), num_classes=3)


def temperatures(module):
    return {layer.temperature.item() for layer in module.modules() if isinstance(layer, Annealed)}


def test_a_line_and_then_its_end():
    recipe = Recipe(**RECIPE, temperature=[30.0, 1.0], temperature_epochs=2.0)
    assert [temperature_at(recipe, epochs) for epochs in (0, 0.5, 1, 2, 3)] == [30, 22.75, 15.5, 1, 1]
    assert temperature_at(Recipe(**{**RECIPE, "epochs": 20}, temperature=[1, 0], temperature_epochs=20), 5) == 0.75
    assert temperature_at(Recipe(**RECIPE), 1) is None


def test_training_anneals_the_model_and_its_average():
    task = ClassificationTask(model(), device=torch.device("cpu"), verbose=False)
    task.setup_ema(decay=0.9)
    recipe = Recipe(**RECIPE, temperature=[30.0, 1.0], temperature_epochs=1.0)
    trainer = Trainer(task=task, recipe=recipe, epoch_batches=2)
    seen = [temperatures(task.get_trainable_module())]
    batches = [(torch.randn(4, 3, 32, 32), torch.randint(3, (4,))) for _ in range(2)]
    for _ in trainer.train_epoch(iter(batches)):
        seen.append(temperatures(task.get_trainable_module()))
        assert temperatures(task.get_trainable_module(ema=True)) == seen[-1]
    assert seen == [{30}, {15.5}, {1}]


def test_a_model_without_temperature_and_half_a_schedule_are_refused():
    images = TensorDataset(torch.randn(4, 3, 32, 32), torch.zeros(4, dtype=torch.long))
    recipe = Recipe(**RECIPE, temperature=[30.0, 1.0], temperature_epochs=1.0)
    with pytest.raises(ValueError, match="--temperature is for DY-Conv, ODConv and KernelWarehouse"):
        next(fit(model("resnet18"), images, images, recipe, seed=0))
    with pytest.raises(ValueError, match="a temperature of 30"):
        next(fit(model("resnet18_kw"), images, images, recipe, seed=0))
    to_zero = Recipe(**RECIPE, temperature=[30.0, 0.0], temperature_epochs=1.0)
    with pytest.raises(ValueError, match="ends at 0, but weights of ODAttention load at 1"):
        next(fit(model(), images, images, to_zero, seed=0))
    for half in ({"temperature": [30.0, 1.0]}, {"temperature_epochs": 1.0}):
        with pytest.raises(ValueError, match="go together"):
            Recipe(**RECIPE, **half)
    with pytest.raises(ValueError, match="temperature_epochs is 0"):
        Recipe(**RECIPE, temperature=[30.0, 1.0], temperature_epochs=0)
    with pytest.raises(ValueError, match="temperature_epochs is 4, but the run has 3 epochs"):
        Recipe(**RECIPE, temperature=[30.0, 1.0], temperature_epochs=4)
    assert Recipe(**RECIPE, cooldown_epochs=1, temperature=[30.0, 1.0], temperature_epochs=4).temperature_epochs == 4
