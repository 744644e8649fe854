"""Models converted to each of the methods: which layers, exactly, and what their state dicts do."""

import pytest
import timm
import torch
import torchvision
from torch import nn

import fdconv_zoo
from fdconv_zoo import convert, convert_official_state_dict, convert_static_state_dict
from fdconv_zoo.choice import named_dynamic_layers
from fdconv_zoo.conversion import init_static
from fdconv_zoo.cost import count_parameters
from fdconv_zoo.default_cfgs import is_zoo_model
from fdconv_zoo.layers.dynamic import KWConv2d
from fdconv_zoo.methods import METHODS
from tests.compare import randomise_norms, relative_error

PEERS = [name for name in METHODS if name != "fdconv"]
# Of ResNet-50, beyond the static one: the papers' figures, exactly.
ADDED = {
    "resnet50_condconv": 89_981_000,
    "resnet50_dyconv": 75_338_144,
    "resnet50_dcd": 4_049_032,
    "resnet50_odconv": 65_113_856,
    "resnet50_odconv_1x": 3_078_080,
    "resnet50_kw": 2_495_278,
    "resnet50_kw_4x": 76_458_112,
    "resnet50_fdconv": 3_647_120,
}


def static_net():
    torch.manual_seed(0)
    net = timm.create_model("resnet18", channels=(20, 40, 40, 80), layers=(1, 1, 1, 1), num_classes=5)
    return randomise_norms(net).eval().double()


def images():
    return torch.randn(2, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ADDED)
def test_parameters_are_the_papers(name):
    with torch.device("meta"):
        model, static = timm.create_model(name), timm.create_model("resnet50")
    assert count_parameters(model) - count_parameters(static) == ADDED[name]


@pytest.mark.parametrize("method", PEERS)
def test_conversion_keeps_the_function(method):
    expected = static_net()(images())
    model = convert(static_net(), method)
    assert relative_error(model(images()), expected) < 1e-12
    layers = dict(named_dynamic_layers(model))
    assert len(layers) == {"dyconv": 12, "kw": 10}.get(method, 8)
    assert sum(report.replaced for report in fdconv_zoo.summary(model)) == len(layers)
    assert {report.kind for report in fdconv_zoo.summary(model) if report.replaced} == {METHODS[method].title}
    assert list(fdconv_zoo.modulation_parameters(model))


@pytest.mark.parametrize("method", PEERS)
def test_a_trained_model_takes_static_weights(method):
    """A state dict of the static model brings a stirred one back to its function; its own passes unchanged."""
    static, model = static_net(), convert(static_net(), method)
    with torch.no_grad():
        for _, layer in named_dynamic_layers(model):
            layer.reset_parameters()
    assert relative_error(model(images()), static(images())) > 1e-3
    own = model.state_dict()
    assert all(torch.equal(value, own[key]) for key, value in convert_static_state_dict(own, model).items())
    model.load_state_dict(convert_static_state_dict(static.state_dict(), model))
    assert relative_error(model(images()), static(images())) < 1e-12
    init_static(model, lambda: None)
    assert relative_error(model(images()), static(images())) < 1e-12
    with pytest.raises(ValueError, match=r"layer2\.0\.conv2\.weight \(3, 3\) instead of"):
        convert_static_state_dict({**static.state_dict(), "layer2.0.conv2.weight": torch.zeros(3, 3)}, model)


def test_grouped_layers_are_left_and_may_be_insisted_on():
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(20, 40, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(40, 20, 1)).eval()

    x = torch.randn(2, 20, 6, 6)
    for method in PEERS:
        plan = fdconv_zoo.summary(net(), method=method)
        assert [(report.reason, report.kind) for report in plan] == [
            ("groups=4", METHODS[method].title),
            ("", METHODS[method].title),
        ]
        if METHODS[method].groups:
            model = convert(net(), method, lambda name, module: True)
            assert len(list(named_dynamic_layers(model))) == 2
            assert relative_error(model(x), net()(x)) < 1e-5
        else:
            with pytest.raises(ValueError, match=f"{METHODS[method].title} has no layer for: groups=4"):
                convert(net(), method, lambda name, module: True)


def test_biases_are_converted_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(20, 20, 3, padding=1), nn.Conv2d(20, 20, 3, padding=1)).double()
    x = torch.randn(2, 20, 5, 5, dtype=torch.float64)
    for method in PEERS:
        model = convert(nn.Sequential(*(nn.Conv2d(20, 20, 3, padding=1).double() for _ in net)), method).eval()
        model.load_state_dict(convert_static_state_dict(net.state_dict(), model))
        assert relative_error(model(x), net(x)) < 1e-12, method


def test_a_state_dict_that_lacks_biases_does_not_pass_for_whole():
    bare = nn.Conv2d(20, 20, 3, padding=1, bias=False)
    for method in METHODS:
        model = convert(nn.Sequential(nn.Conv2d(20, 20, 3, padding=1)), method)
        state = convert_static_state_dict({"0.weight": bare.weight}, model)
        with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\..*bias"):
            model.load_state_dict(state)


def test_layers_that_share_a_weight_are_refused_where_they_can_t():
    for method in PEERS:
        net = nn.Sequential(nn.Conv2d(20, 20, 1, bias=False), nn.ReLU(), nn.Conv2d(20, 20, 1, bias=False))
        net[2].weight = net[0].weight
        with pytest.raises(ValueError, match="two layers share a weight"):
            convert(net, method)


def test_one_layer_in_two_places_is_one():
    layer = nn.Conv2d(20, 20, 3, padding=1)
    net = nn.Sequential(layer, nn.ReLU(), layer).eval()
    x = torch.randn(2, 20, 6, 6)
    expected = net(x)
    for method in PEERS:
        layer = nn.Conv2d(20, 20, 3, padding=1)
        layer.load_state_dict(net[0].state_dict())
        model = convert(nn.Sequential(layer, nn.ReLU(), layer).eval(), method)
        assert model[0] is model[2]
        assert relative_error(model(x), expected) < 1e-5


def test_warehouses_are_stages():
    """The first convolution and the strided shortcut of a stage belong to the stage before."""
    with torch.device("meta"):
        model = convert(timm.create_model("resnet50"), "kw")
    layers = {name: layer for name, layer in named_dynamic_layers(model) if isinstance(layer, KWConv2d)}
    members = {}
    for name, layer in layers.items():
        members.setdefault(next(key for key, other in layers.items() if other is layer.first()), []).append(name)
    assert list(members) == ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2", "layer4.0.conv2"]
    assert members["layer1.0.conv2"][-2:] == ["layer2.0.conv1", "layer2.0.downsample.0"]
    assert [len(layers[name].bank()) for name in members] == [87, 104, 138, 47]
    assert [layers[name].bank().shape[1] for name in members] == [64, 128, 256, 512]
    reasons = {report.name: report.reason for report in fdconv_zoo.summary(model)}
    assert "layer1.0.conv1" in reasons and "layer1.0.downsample.0" in reasons


@pytest.mark.parametrize("method", ["odconv", "kw"])
def test_torchvision_and_mobile_networks(method):
    for net in (torchvision.models.resnet18(weights=None), timm.create_model("mobilenetv2_100")):
        net = net.eval()
        x = torch.randn(1, 3, 64, 64)
        expected = net(x)
        assert relative_error(convert(net, method)(x), expected) < 1e-4


def test_what_a_method_has_no_layer_for():
    with pytest.raises(ValueError, match="method 'involution', but there are fdconv, condconv"):
        convert(static_net(), "involution")
    with pytest.raises(ValueError, match="no keyword argument num_bands"):
        convert(static_net(), "odconv", num_bands=4)
    with pytest.raises(ValueError, match=r"nn\.Conv1d: ODConv has none"):
        convert(nn.Sequential(nn.Conv1d(20, 20, 3), nn.ReLU()), "odconv")
    with pytest.raises(ValueError, match=r"nn\.Linear: ODConv has none"):
        convert(timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32), "odconv")


def test_official_names_of_a_whole_model():
    """A model's keys under its authors' names come back as the model's own."""
    torch.manual_seed(0)
    model = convert(static_net(), "odconv")
    official = {}
    for key, value in model.state_dict().items():
        layer_name = next((name for name, _ in named_dynamic_layers(model) if key.startswith(f"{name}.")), None)
        if layer_name is None:
            official[key] = value
            continue
        layer, part = model.get_submodule(layer_name), key.removeprefix(f"{layer_name}.")
        if part.startswith("attention.heads."):
            names = ("channel_fc", "filter_fc", "spatial_fc", "kernel_fc")
            for head, piece in zip(names, value.split(layer.attention.sections), strict=True):
                if len(piece):
                    suffix = part.rpartition(".")[2]
                    official[f"{layer_name}.attention.{head}.{suffix}"] = (
                        piece[:, :, None, None] if suffix == "weight" else piece
                    )
        elif part == "kernels":
            gates = sum(section > 0 for section in layer.attention.sections[:3])
            official[f"{layer_name}.weight"] = value * 2**gates
        elif part == "attention.hidden.fc.weight":
            official[f"{layer_name}.attention.fc.weight"] = value[:, :, None, None]
        else:
            official[f"{layer_name}.{part.replace('attention.hidden.norm.', 'attention.bn.')}"] = value
    back = convert_official_state_dict({"state_dict": {f"module.{k}": v for k, v in official.items()}}, model)
    assert back.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in back.items())


def test_models_know_that_they_are_the_zoo_s():
    assert is_zoo_model("resnet50_kw_4x") and is_zoo_model("resnet50_fdconv.a1_in1k_converted")
    assert not is_zoo_model("resnet50") and not is_zoo_model("tf_efficientnet_cc_b0_4e")
    assert fdconv_zoo.static_name("resnet18_odconv_1x.a1_in1k_converted") == "resnet18.a1_in1k"
    with pytest.raises(TypeError, match="num_kernel; those of its dynamic layers are"):
        timm.create_model("resnet18_odconv", num_kernel=2)


def test_models_start_as_their_papers_have_it():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_odconv", layers=(1, 1, 1, 1), channels=(20, 20, 20, 20))
    kernels = model.layer1[0].conv1.kernels.flatten(1)
    assert torch.corrcoef(kernels).triu(1).abs().max() < 0.1
    model.init_weights()
    assert torch.corrcoef(model.layer1[0].conv1.kernels.flatten(1)).triu(1).abs().max() < 0.1


def test_experts_start_at_the_scale_of_the_static_model_s_weights():
    torch.manual_seed(0)
    options = {"layers": (1, 1, 1, 1), "channels": (20, 20, 20, 40)}
    static, model = (timm.create_model(name, **options) for name in ("resnet18", "resnet18_condconv"))
    for _ in range(2):
        for name, layer in named_dynamic_layers(model):
            scale = static.get_submodule(name).weight.std()
            experts = layer.bank().flatten(1)
            assert ((experts.std(dim=1) / scale - 1).abs() < 0.05).all()
            assert torch.corrcoef(experts).triu(1).abs().max() < 0.1
        model.init_weights()
