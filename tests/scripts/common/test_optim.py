"""Rates: scaling with the batch, and parameter groups."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import timm
from torch import nn

import fdconv_zoo
from common.optim import create_optimizer, create_schedule, parameter_groups, scaled_learning_rate
from common.training_recipe import Recipe
from training.args import parse_args
from training.run import Run


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


def decays(model, **options):
    groups = parameter_groups(model, weight_decay=0.1, **options)
    found = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    return {name: found[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"layer_decay": 0.7}], ids=str)
def test_no_part_s_own_exceptions_are_decayed(options):
    """A network within another, as feature extractors and detectors hold one; biases of which a layer has several."""
    swin = timm.create_model("swin_tiny_fdconv", img_size=32, window_size=2, depths=(1, 1, 1, 1), embed_dim=24)
    if not options:  # timm's layer groups are for whole models
        swin = nn.Sequential(OrderedDict(backbone=swin))
    found = decays(swin, **options)
    tables = [decay for name, decay in found.items() if name.endswith("relative_position_bias_table")]
    assert tables == [0] * 4
    assert {decay for name, decay in found.items() if name.endswith("attn.qkv.weight")} == {0.1}


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swin_tiny_fdconv"])
@pytest.mark.parametrize("feature_cls", [None, "list", "getter"])
def test_no_position_table_of_a_feature_extractor_is_decayed(name, feature_cls):
    """A list of the stages has lost what the network says of them."""
    options = {"feature_cls": feature_cls} if feature_cls else {}
    features = timm.create_model(
        name, features_only=True, img_size=32, window_size=2, depths=(1, 1, 1, 1), embed_dim=24, **options
    )
    found = decays(nn.Sequential(features))
    assert [decay for name, decay in found.items() if name.endswith("relative_position_bias_table")] == [0] * 4


def test_biases_of_several_kernels_are_not_decayed():
    found = decays(nn.Sequential(fdconv_zoo.convert(nn.Conv2d(24, 32, 3), "dyconv")))
    assert found["0.biases"] == 0 and found["0.kernels"] == 0.1
    lone = decays(fdconv_zoo.convert(nn.Conv2d(24, 32, 3), "dyconv"))
    assert lone["biases"] == 0


@pytest.mark.parametrize("sched", ["step", "multistep", "constant"])
def test_no_cooldown_after_a_schedule_without_an_end(sched):
    """timm would leave the epochs out."""
    with pytest.raises(ValueError, match=f"cooldown_epochs is 2, but the schedule {sched} has no end"):
        Recipe(epochs=4, sched=sched, cooldown_epochs=2)


@pytest.mark.parametrize("sched", ["cosine", "tanh", "poly", "wsd", "rsqrt"])
def test_cooldown_is_part_of_the_run(model, sched):
    recipe = Recipe(epochs=4, sched=sched, warmup_epochs=1, cooldown_epochs=2)
    assert create_schedule(create_optimizer(model, recipe, 8), recipe, updates_per_epoch=3)[1] == 6


def test_the_rate_that_is_logged_is_without_the_groups_scales(model):
    recipe = Recipe(lr=0.01, modulation_lr_scale=10.0, static_lr_scale=0.1, warmup_epochs=0)
    optimizer = create_optimizer(model, recipe, 8)
    create_schedule(optimizer, recipe, updates_per_epoch=3)
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(0.1)
    assert Run._rate(SimpleNamespace(optimizer=optimizer)) == pytest.approx(0.01)


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
