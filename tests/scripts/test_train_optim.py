"""Rates: scaling with the batch, and parameter groups."""

import pytest
import timm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from train_optim import parameter_groups, scaled_learning_rate

import fdconv_zoo  # noqa: F401  (registers the models)


@pytest.mark.parametrize(("scale", "rate"), [("linear", 0.4), ("sqrt", 0.2)])
def test_rate_follows_the_batch(scale, rate):
    assert scaled_learning_rate(0.1, 256, 1024, scale) == pytest.approx(rate)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet18_fdconv", num_classes=7)


def rates(model, **options):
    """Learning rate and decay that each parameter gets at rate 1, by name."""
    optimizer = create_optimizer_v2(
        model, "adamw", 1.0, 0.05, param_group_fn=lambda model: parameter_groups(model, weight_decay=0.05, **options)
    )
    create_scheduler_v2(optimizer, "constant", num_epochs=1, step_on_epochs=False, updates_per_epoch=1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def is_new(name):
    """Whether fine-tuning starts a parameter from nothing: FDConv's modulation and the classifier."""
    return ".ksm." in name or ".fbm." in name or name.startswith("fc.")


def test_inherited_parameters_get_the_lower_rate(model):
    found = rates(model, static_lr_scale=0.1)
    assert {name: rate for name, (rate, _) in found.items()} == {name: 1 if is_new(name) else 0.1 for name in found}
    assert sum(map(is_new, found)) > 100
    assert found["layer1.0.conv1.fdw.spectrum"] == (0.1, 0.05)
    assert found["layer1.0.conv1.ksm.fc.weight"] == (1, 0.05)
    assert found["layer1.0.conv1.fbm.bias"] == (1, 0)
    assert found["bn1.weight"] == (0.1, 0)


def test_without_scales_the_groups_are_timms(model):
    assert {rate for rate, _ in rates(model).values()} == {1}
    assert len(parameter_groups(model, weight_decay=0.05)) == 2


def test_layer_decay_multiplies_the_scale(model):
    plain = rates(model, layer_decay=0.5)
    found = rates(model, layer_decay=0.5, static_lr_scale=0.1)
    assert plain["conv1.weight"][0] < plain["layer1.0.conv1.fdw.spectrum"][0] < plain["fc.weight"][0] == 1
    for name, (rate, decay) in found.items():
        assert (rate, decay) == (pytest.approx(plain[name][0] * (1 if is_new(name) else 0.1)), plain[name][1])
