"""Modulation's parameters: found in whole models, parts and lone layers, and trained where the rest is frozen."""

import pytest
import timm
import torch

from fdconv_zoo import FDConv2d, FDLinear, freeze_static, modulation_parameters

SMALL = {"layers": (1, 1, 1, 1), "channels": (20, 24, 32, 40), "num_classes": 5}


@pytest.mark.parametrize("features_only", [False, True])
def test_they_are_what_a_static_model_lacks(features_only):
    model = timm.create_model("resnet18_fdconv", features_only=features_only, **SMALL)
    found = dict(modulation_parameters(model))
    parameters = dict(model.named_parameters())
    assert all(parameters[name] is parameter for name, parameter in found.items())
    assert found.keys() == {name for name in parameters if ".ksm." in name or ".fbm." in name}
    assert len(found) > 20


def test_layers_without_a_part():
    assert {name.partition(".")[0] for name, _ in modulation_parameters(FDConv2d(18, 18, 3))} == {"ksm", "fbm"}
    assert not any(name.startswith("fbm") for name, _ in modulation_parameters(FDConv2d(18, 18, 3, fbm=False)))
    assert all(name.startswith("ksm.") for name, _ in modulation_parameters(FDLinear(18, 18)))
    assert list(modulation_parameters(torch.nn.Conv2d(3, 3, 3))) == []


def test_a_layer_of_two_names_gives_its_parameters_once():
    layer = FDConv2d(18, 18, 3)
    model = torch.nn.ModuleDict({"one": layer, "other": layer})
    names = [name for name, _ in modulation_parameters(model)]
    assert names == [f"one.{name}" for name, _ in modulation_parameters(layer)]


def test_a_frozen_stage_moves_its_modulation_alone():
    model = timm.create_model("resnet18_fdconv", zero_init_last=False, **SMALL)
    for stage in (model.conv1, model.bn1, model.layer1):
        freeze_static(stage)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.randn(4, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    frozen = ("conv1.", "bn1.", "layer1.")
    assert all(".ksm." in name or ".fbm." in name for name in moved if name.startswith(frozen))
    assert "layer1.0.conv1.ksm.heads.weight" in moved and "layer2.0.conv1.fdw.spectrum" in moved


@pytest.mark.parametrize("call", [freeze_static, lambda model: list(modulation_parameters(model))])
def test_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"a model \(nn.Module\) is wanted, got 'resnet18_fdconv'"):
        call("resnet18_fdconv")
