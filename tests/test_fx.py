"""FDConv layers are leaves of torch.fx, whoever traces."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.fx.experimental.optimization import fuse
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from fdconv_zoo import FDConv2d, FDLinear, convert_to_fdconv
from tests.compare import randomise, relative_error


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(2)  # of the first eight, the one that eight bits round least
    model = convert_to_fdconv(
        resnet18(num_classes=4), num_bands=8, include=lambda n, _: False if "layer1" in n else None
    )
    for layer in model.modules():
        if isinstance(layer, FDConv2d):
            with torch.no_grad():
                layer.ksm.heads.bias.normal_(std=0.1)
    return model.eval()


@torch.no_grad()
def test_torchvision_extracts_features(model):
    x = torch.randn(2, 3, 64, 64)
    extractor = create_feature_extractor(model, {"layer2.0.conv1": "inside", "layer4": "last"})
    found = extractor(x)
    stem = model.maxpool(model.relu(model.bn1(model.conv1(x))))
    inside = model.layer2[0].conv1(model.layer1(stem))
    assert relative_error(found["inside"], inside) < 1e-6
    assert found["last"].shape == (2, 512, 2, 2)
    assert isinstance(extractor.get_submodule("layer2.0.conv1"), FDConv2d)


@torch.no_grad()
@pytest.mark.parametrize("trace", [fx.symbolic_trace, fuse], ids=["symbolic_trace", "fuse"])
def test_a_traced_model_computes_the_same(model, trace):
    x = torch.randn(2, 3, 64, 64)
    traced = trace(copy.deepcopy(model))
    assert relative_error(traced(x), model(x)) < 1e-5
    assert sum(isinstance(module, FDConv2d) for module in traced.modules()) == 12


def test_linear_layers_and_lone_layers():
    net = nn.Sequential(FDLinear(20, 24, num_bands=8), nn.ReLU())
    randomise(net).eval()
    x = torch.randn(2, 5, 20)
    assert torch.equal(fx.symbolic_trace(net)(x), net(x))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_quantisation_leaves_fdconv_in_floating_point(model):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = torch.randn(2, 3, 64, 64)
    prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
    prepared(x)
    quantised = convert_fx(prepared)
    assert sum(isinstance(module, FDConv2d) for module in quantised.modules()) == 12
    assert relative_error(quantised(x), model(x)) < 0.1


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_eager_quantisation_leaves_fdconv_and_its_parts_in_floating_point():
    from torch.ao import quantization

    layer = randomise(FDConv2d(20, 20, 3, padding=1, num_bands=8))
    parts = quantization.QuantStub(), nn.Conv2d(20, 20, 1), quantization.DeQuantStub(), layer
    net, x = nn.Sequential(*parts).eval(), torch.randn(2, 20, 8, 8)
    expected = net(x)
    net.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(net)
    prepared(x)
    quantised = quantization.convert(prepared)
    assert not isinstance(quantised[1], nn.Conv2d)
    assert type(quantised[3].ksm.norm) is nn.BatchNorm2d
    assert relative_error(quantised(x), expected) < 0.1
