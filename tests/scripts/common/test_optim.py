"""Rates: scaling with the batch, and parameter groups."""

import pytest
import timm

import fdconv_zoo  # noqa: F401  (registers the models)
from common.optim import create_optimizer, create_schedule, parameter_groups, scaled_learning_rate
from common.training_recipe import Recipe
from training.args import parse_args


@pytest.mark.parametrize(("scale", "rate"), [("linear", 0.4), ("sqrt", 0.2)])
def test_rate_follows_the_batch(scale, rate):
    assert scaled_learning_rate(0.1, 256, 1024, scale) == pytest.approx(rate)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("resnet18_fdconv", num_classes=7)


def rates(model, *options):
    """Learning rate and decay that each parameter gets at rate 1, by name."""
    given = ["--synthetic", "--opt", "adamw", "--weight-decay", "0.05", "--lr", "1", "--warmup-epochs", "0", *options]
    recipe = Recipe.of(parse_args(given))
    optimizer = create_optimizer(model, recipe, global_batch=128)
    create_schedule(optimizer, recipe, updates_per_epoch=1)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    assert len(found) == len(list(model.parameters()))
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


def is_new(name):
    """Whether fine-tuning starts a parameter from nothing: FDConv's modulation and the classifier."""
    return ".ksm." in name or ".fbm." in name or name.startswith("fc.")


def test_inherited_parameters_get_the_lower_rate(model):
    found = rates(model, "--static-lr-scale", "0.1")
    assert {name: rate for name, (rate, _) in found.items()} == {name: 1 if is_new(name) else 0.1 for name in found}
    assert sum(map(is_new, found)) > 100
    assert found["layer1.0.conv1.fdw.spectrum"] == (0.1, 0.05)
    assert found["layer1.0.conv1.ksm.fc.weight"] == (1, 0.05)
    assert found["layer1.0.conv1.fbm.bias"] == (1, 0)
    assert found["bn1.weight"] == (0.1, 0)


def test_modulation_has_a_rate_and_a_decay_of_its_own(model):
    found = rates(model, "--static-lr-scale", "0.1", "--modulation-lr-scale", "0.3", "--modulation-weight-decay", "0.5")
    assert found["layer1.0.conv1.ksm.heads.weight"] == (0.3, 0.5)
    assert found["layer1.0.conv1.ksm.heads.bias"] == found["layer1.0.conv1.fbm.bias"] == (0.3, 0)
    assert found["layer1.0.conv1.fdw.spectrum"] == (0.1, 0.05)
    assert found["fc.weight"] == (1, 0.05)
    assert rates(model, "--modulation-lr-scale", "0.3")["layer1.0.conv1.fdw.spectrum"] == (1, 0.05)


def test_without_scales_the_groups_are_timms(model):
    assert {rate for rate, _ in rates(model).values()} == {1}
    assert len(parameter_groups(model, weight_decay=0.05)) == 2


def test_layer_decay_multiplies_the_scale(model):
    plain = rates(model, "--layer-decay", "0.5")
    found = rates(model, "--layer-decay", "0.5", "--static-lr-scale", "0.1")
    assert plain["conv1.weight"][0] < plain["layer1.0.conv1.fdw.spectrum"][0] < plain["fc.weight"][0] == 1
    for name, (rate, decay) in found.items():
        assert (rate, decay) == (pytest.approx(plain[name][0] * (1 if is_new(name) else 0.1)), plain[name][1])


def test_schedule_runs_over_updates_and_ends_with_its_cooldown(model):
    args = parse_args(
        ["--synthetic", "--lr-base", "0.1", "--epochs", "4", "--warmup-epochs", "1", "--cooldown-epochs", "1"]
    )
    recipe = Recipe.of(args)
    optimizer = create_optimizer(model, recipe, global_batch=512)
    scheduler, epochs = create_schedule(optimizer, recipe, updates_per_epoch=10)
    assert epochs == 5
    followed = []
    for update in (0, 5, 10, 40):
        scheduler.step_update(update)
        followed.append(optimizer.param_groups[0]["lr"])
    assert followed == pytest.approx([1e-5, 0.1, 0.17071, 0], abs=1e-4)
