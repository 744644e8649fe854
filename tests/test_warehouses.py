"""Which layers share a KernelWarehouse, whatever the model is wrapped in."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import fdconv_zoo
from fdconv_zoo import convert
from fdconv_zoo.choice import named_dynamic_layers


class Wrapper(nn.Module):
    """A network under a name with a digit, beside a classifier."""

    def __init__(self, net):
        super().__init__()
        self.resnet18, self.head1 = net, nn.Linear(1000, 5)


class Detector(nn.Module):
    """A network two levels down, beside nothing."""

    def __init__(self, net):
        super().__init__()
        self.model1 = nn.ModuleDict({"body2": net})


@pytest.fixture(params=[lambda: timm.create_model("resnet18"), lambda: torchvision.models.resnet18(weights=None)])
def build(request):
    with torch.device("meta"):
        yield request.param


def warehouses(model, prefix="", **options):
    """Names of the layers of each warehouse."""
    members = {}
    for name, layer in named_dynamic_layers(convert(model, "kw", **options)):
        members.setdefault(layer.first(), []).append(name.removeprefix(prefix))
    return list(members.values())


def test_a_wrapper_changes_no_warehouse(build):
    expected = warehouses(build())
    assert [len(names) for names in expected] == [6, 5, 5, 3]
    wrapped = [(nn.Sequential(build(), nn.Identity()), "0."), (Wrapper(build()), "resnet18.")]
    for model, prefix in [*wrapped, (Detector(build()), "model1.body2.")]:
        assert warehouses(model, prefix) == expected, prefix


def test_two_networks_have_their_own_warehouses():
    with torch.device("meta"):
        towers = nn.ModuleDict({f"tower{i}": timm.create_model("resnet18") for i in (1, 2)})
        expected = warehouses(timm.create_model("resnet18"))
    found = warehouses(towers)
    assert found == [[f"tower{i}.{name}" for name in names] for i in (1, 2) for names in expected]


def test_a_stage_alone_leaves_what_has_the_channels_before():
    with torch.device("meta"):
        left = {r.name: r.reason for r in fdconv_zoo.summary(timm.create_model("resnet18"), "layer3", "kw")}
    for name in ("layer3.0.conv1", "layer3.0.downsample.0"):
        assert left[name] == "takes the channels of what is before the first warehouse"
    assert not left["layer3.0.conv2"]
