import pkgutil
import re
import types
from copy import deepcopy
from functools import partial

import pytest
import timm
import torch
import torchvision
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torchvision.models.convnext import CNBlockConfig

import fdconv_zoo
from fdconv_zoo import (
    FDConv2d,
    FDLinear,
    convert_official_state_dict,
    convert_static_state_dict,
    convert_to_fdconv,
    summary,
)
from fdconv_zoo.conversion import init_static, named_fd_layers
from tests.compare import randomise, randomise_norms, relative_error
from tests.small_net import Net, images, small_resnet

# The smallest of each family; names are timm's, classes torchvision's.
TIMM = {
    "resnet18": (partial(timm.create_model, "resnet18"), 64),
    "resnet26d": (partial(timm.create_model, "resnet26d"), 64),
    "regnetx": (partial(timm.create_model, "regnetx_002"), 64),
    "regnety": (partial(timm.create_model, "regnety_002"), 64),
    "convnext": (partial(timm.create_model, "convnext_atto", conv_mlp=False), 64),
    "convnext of convolutions": (partial(timm.create_model, "convnext_atto", conv_mlp=True), 64),
    "swin": (partial(timm.create_model, "swin_tiny_patch4_window7_224", embed_dim=48, depths=(2, 2), img_size=56), 56),
    "vit": (partial(timm.create_model, "vit_tiny_patch16_224", depth=2, img_size=64), 64),
    "efficientnet": (partial(timm.create_model, "efficientnet_b0"), 64),
    "mobilenetv2": (partial(timm.create_model, "mobilenetv2_100"), 64),
}
TORCHVISION = {
    "resnet18": (torchvision.models.resnet18, 64),
    "resnext": (partial(torchvision.models.ResNet, torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], groups=4), 64),
    "regnet": (torchvision.models.regnet_y_400mf, 64),
    "efficientnet": (torchvision.models.efficientnet_b0, 64),
    "convnext": (
        partial(torchvision.models.ConvNeXt, [CNBlockConfig(24, 48, 2), CNBlockConfig(48, None, 2)], layer_scale=0.5),
        64,
    ),
    "swin": (
        partial(
            torchvision.models.SwinTransformer,
            [4, 4],
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=[7, 7],
        ),
        56,
    ),
    "vit": (partial(torchvision.models.VisionTransformer, 64, 16, 2, 4, 48, 96), 64),
}
MODELS = {f"timm {key}": value for key, value in TIMM.items()}
MODELS |= {f"torchvision {key}": value for key, value in TORCHVISION.items()}


@torch.no_grad()
def lively(make, size):
    """A static model in eval mode in which every layer counts and every norm has statistics of its own."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    randomise_norms(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    model.train()(torch.randn(8, 3, size, size))
    return model.eval()


REPLACED_IN_NET = ["conv2", "conv3", "mlp.0", "mlp.2"]


# --- models


@pytest.mark.parametrize(("make", "size"), MODELS.values(), ids=MODELS.keys())
@torch.no_grad()
def test_a_converted_model_computes_the_same_function(make, size):
    model = lively(make, size)
    x = images(size)
    expected, state, planned = model(x), deepcopy(model.state_dict()), summary(model)
    assert convert_to_fdconv(model) is model
    assert not any(module.training for module in model.modules())
    assert relative_error(model(x), expected) < 1e-4
    # The comparison would say nothing about a model whose output does not depend on its input.
    assert (expected - expected.mean(0)).norm() > 0.05 * expected.norm()
    assert {(r.name, r.reason) for r in summary(model)} == {(r.name, r.reason) for r in planned}
    assert {name for name, _ in named_fd_layers(model)} == {report.name for report in planned if report.replaced}

    for _, layer in named_fd_layers(model):
        nn.init.zeros_(layer.fdw.spectrum)
    model.load_state_dict(convert_static_state_dict(state, model))
    assert relative_error(model(x), expected) < 1e-4


def reasons(make):
    return {report.name: report.reason for report in summary(make())}


def test_what_is_replaced_in_a_resnet():
    shortcuts = [f"layer{stage}.0.downsample.0" for stage in (2, 3, 4)]
    convs = [f"layer{stage}.{block}.conv{i}" for stage in (1, 2, 3, 4) for block in (0, 1) for i in (1, 2)]
    for make in (TIMM["resnet18"][0], TORCHVISION["resnet18"][0]):
        found = reasons(make)
        assert set(found) == {"conv1", "fc", *shortcuts, *convs}
        assert all(found[name] == "" for name in convs)
        assert all(found[name] == "shortcut or downsampling between stages" for name in shortcuts)
        assert found["conv1"] == "narrow: fewer than 17 channels"
        assert found["fc"] == "classifier"
    deep = reasons(TIMM["resnet26d"][0])
    assert deep["conv1.3"] == "stem"
    assert deep["conv1.6"] == "stem"


def test_what_is_replaced_in_a_regnet():
    found = reasons(TIMM["regnety"][0])
    assert found["s4.b2.conv1.conv"] == found["s4.b2.conv3.conv"] == ""
    assert found["s4.b2.conv2.conv"] == "groups=46"
    assert found["s4.b2.se.fc1"] == found["s4.b2.se.fc2"] == "squeeze and excitation"
    assert found["s4.b1.downsample.conv"] == "shortcut or downsampling between stages"


@pytest.mark.parametrize(
    ("model", "mlp", "others"),
    [
        (TIMM["convnext"], "stages.1.blocks.0.mlp.fc", {"stages.1.blocks.0.conv_dw": "groups=80"}),
        (TIMM["convnext of convolutions"], "stages.1.blocks.0.mlp.fc", {"head.fc": "classifier"}),
        (TIMM["swin"], "layers.0.blocks.1.mlp.fc", {"layers.0.blocks.1.attn.qkv": "linear layer outside an MLP"}),
        (TIMM["vit"], "blocks.1.mlp.fc", {"blocks.1.attn.proj": "linear layer outside an MLP", "head": "classifier"}),
        (
            TORCHVISION["convnext"],
            "features.3.1.block.",
            {"features.2.1": "patch embedding or downsampling between stages"},
        ),
        (TORCHVISION["swin"], "features.1.0.mlp.", {"features.1.0.attn.qkv": "linear layer outside an MLP"}),
        (TORCHVISION["vit"], "encoder.layers.encoder_layer_0.mlp.", {"heads.head": "classifier"}),
    ],
)
def test_what_is_replaced_in_mlps(model, mlp, others):
    found = reasons(model[0])
    assert sum(name.startswith(mlp) and reason == "" for name, reason in found.items()) == 2
    assert all(("mlp" in name or "block." in name) for name, reason in found.items() if not reason)
    assert {name: found[name] for name in others} == others


def test_what_is_replaced_in_an_efficientnet():
    found = reasons(TIMM["efficientnet"][0])
    assert found["blocks.3.1.conv_pw"] == found["blocks.3.1.conv_pwl"] == found["conv_head"] == ""
    assert found["blocks.3.1.conv_dw"].startswith("groups=")
    assert found["blocks.1.0.conv_pw"] == "narrow: fewer than 17 channels"
    assert found["blocks.3.1.se.conv_reduce"] in ("squeeze and excitation", "narrow: fewer than 17 channels")


def test_other_paddings_and_subclasses_stay():
    class Standardised(nn.Conv2d):
        pass

    model = nn.Sequential(
        nn.Conv2d(20, 20, 3, padding_mode="circular", padding=1), Standardised(20, 20, 3), nn.Conv2d(20, 16, 3)
    )
    found = [report.reason for report in summary(model)]
    assert found == [
        "padding_mode='circular'",
        "a subclass (Standardised) that computes something else",
        "narrow: fewer than 17 channels",
    ]


def test_reports_read_as_lines():
    lines = [str(report) for report in summary(Net())]
    assert "conv2: 24x20x3x3 FDConv" in lines
    assert "fc: 5x20 narrow: fewer than 17 channels" in lines
    lines = [str(report) for report in summary(convert_to_fdconv(Net()))]
    assert "conv2: 24x20x3x3 FDConv" in lines
    assert len(lines) == 6


def test_a_summary_prints_as_a_table_in_the_models_order():
    model = convert_to_fdconv(Net(), include="mlp")
    assert str(summary(model)).splitlines() == [
        "conv1  20x3x3x3   static: narrow: fewer than 17 channels",
        "conv2  24x20x3x3  static: left when the model was converted",
        "conv3  20x24x1x3  static: left when the model was converted",
        "mlp.0  40x20      FDConv",
        "mlp.2  20x40      FDConv",
        "fc     5x20       static: narrow: fewer than 17 channels",
        "FDConv: 2 of 6 layers",
    ]
    assert str(summary(nn.ReLU())) == "FDConv: 0 of 0 layers"
    assert str(summary(nn.Linear(4, 4), method="odconv")).endswith("\nODConv: 0 of 1 layers")


def test_include_narrows_what_is_replaced():
    asked = []

    def include(name, module):
        asked.append((name, type(module)))
        return None if name.startswith("conv") else False

    model = convert_to_fdconv(Net(), include)
    assert [name for name, _ in named_fd_layers(model)] == ["conv2", "conv3"]
    layers = [("conv1", nn.Conv2d), ("conv2", nn.Conv2d), ("conv3", nn.Conv2d), ("mlp.0", nn.Linear)]
    assert asked == [*layers, ("mlp.2", nn.Linear), ("fc", nn.Linear)]
    found = {report.name: report.reason for report in summary(Net(), include)}
    assert found["mlp.0"] == found["mlp.2"] == "not included"


def test_converting_again_changes_nothing_or_the_rest():
    model = convert_to_fdconv(Net(), include=lambda name, module: None if name == "conv2" else False)
    conv2 = model.conv2
    convert_to_fdconv(model)
    assert model.conv2 is conv2
    assert [name for name, _ in named_fd_layers(model)] == REPLACED_IN_NET
    with pytest.raises(ValueError, match="nothing to replace in Net: already converted, 4 of its layers are FDConv"):
        convert_to_fdconv(model)


@pytest.mark.parametrize(
    "name", ["resnet18_fdconv", "mobilenetv2_100_fdconv", "convnext_atto_fdconv", "swin_tiny_fdconv"]
)
def test_models_of_the_zoo_are_converted_already(name):
    with pytest.raises(ValueError, match="already converted"), torch.device("meta"):
        convert_to_fdconv(timm.create_model(name))


def test_a_lone_layer_is_converted_already():
    with pytest.raises(ValueError, match="nothing to replace in FDConv2d: already converted, 1 of"):
        convert_to_fdconv(FDConv2d(20, 20, 3))


@pytest.mark.parametrize("call", [summary, convert_to_fdconv])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", r"got 'resnet18'; timm.create_model\(\"resnet18\"\) makes one"),
        (Net, "got <class .*Net'>$"),
        ({}, "got dict"),
    ],
)
def test_what_is_no_model_is_named(call, model, message):
    with pytest.raises(TypeError, match=rf"a model \(nn.Module\) is wanted, {message}"):
        call(model)


def test_keywords_reach_the_layers():
    model = convert_to_fdconv(Net(), num_bands=8, reduction=1, mask_grid=64, cutoffs=(0.3,), recompute=False)
    assert (model.conv2.fdw.num_bands, model.mlp[0].fdw.num_bands) == (8, 8)
    assert (model.conv2.ksm.fc.out_features, model.mlp[0].ksm.fc.out_features) == (20, 20)
    assert (model.conv2.fbm.mask_grid, model.conv2.fbm.cutoffs) == (64, [(3, 10)])
    assert not model.conv2.recompute
    assert not model.mlp[0].recompute
    assert convert_to_fdconv(Net(), fbm=False).conv2.fbm is None


def test_a_lone_layer_is_returned_converted():
    conv, linear = nn.Conv2d(20, 24, 3), nn.Sequential()
    linear.mlp = nn.Linear(20, 24)
    layer = convert_to_fdconv(conv)
    assert isinstance(layer, FDConv2d)
    assert isinstance(convert_to_fdconv(linear).mlp, FDLinear)


def test_unknown_keywords_are_named():
    with pytest.raises(ValueError, match="have no keyword argument bands, num_band"):
        convert_to_fdconv(Net(), num_band=4, bands=3)


def test_nothing_to_replace_is_an_error_that_says_why():
    with pytest.raises(
        ValueError, match="nothing to replace in Sequential: 0: narrow: fewer than 17 channels; 1: groups"
    ):
        convert_to_fdconv(nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3, groups=32)))
    with pytest.raises(ValueError, match="it has no convolution or linear layer"):
        convert_to_fdconv(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="conv2: not included"):
        convert_to_fdconv(Net(), include=lambda name, module: False)


@pytest.mark.parametrize("names", [{}, {"include": "mlp"}])
def test_official_and_mistyped_options_are_named(names):
    with pytest.raises(
        ValueError, match=r"no keyword argument kernel_num \(the official name of num_bands\) to choose"
    ):
        convert_to_fdconv(Net(), kernel_num=4, **names)
    with pytest.raises(TypeError, match="num_bands='8', but it must be an integer"):
        convert_to_fdconv(Net(), num_bands="8", **names)


def test_a_failed_conversion_names_the_value():
    with pytest.raises(ValueError, match="num_bands=100000, but"):
        convert_to_fdconv(Net(), num_bands=100_000)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(20, 20, 3, padding=1)
        self.second = self.first

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_a_module_with_two_names_stays_one():
    model = Tied()
    x = torch.randn(2, 20, 5, 6)
    expected = model(x)
    convert_to_fdconv(model)
    assert isinstance(model.first, FDConv2d)
    assert model.first is model.second
    assert relative_error(model(x), expected) < 1e-5


def test_frozen_weights_stay_frozen_and_gates_train():
    model = Net()
    model.conv2.weight.requires_grad_(False)
    model.mlp[0].weight.requires_grad_(False)
    convert_to_fdconv(model)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"conv2.fdw.spectrum", "mlp.0.fdw.spectrum"}


def test_device_dtype_and_training_mode_are_kept():
    model = Net().to(torch.bfloat16)
    model.mlp.eval()
    convert_to_fdconv(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.conv2.training
    assert not any(module.training for module in model.mlp.modules())
    assert all(parameter.is_meta for parameter in convert_to_fdconv(Net().to("meta")).parameters())


def test_reports_of_linear_layers_have_the_shape_of_their_weight():
    model = nn.Sequential()
    model.mlp = nn.Linear(20, 24)
    before = summary(model)
    assert before == summary(convert_to_fdconv(model))


@pytest.mark.parametrize("shape", [(20, 20, 3, 1), (20, 60)])
def test_static_weights_of_another_shape_but_as_many_elements_are_listed(shape):
    layer = FDConv2d(20, 20, (1, 3))
    state = {"weight": torch.zeros(shape), "bias": torch.zeros(20)}
    with pytest.raises(ValueError, match=re.escape(f"weight {shape} instead of (20, 20, 1, 3)")):
        convert_static_state_dict(state, layer)


def test_the_state_dict_of_a_module_with_two_names_is_converted():
    state, model = Tied().state_dict(), convert_to_fdconv(Tied())
    model.load_state_dict(convert_static_state_dict(state, model))
    assert {report.name: report.reason for report in summary(model)} == {"first": "", "second": ""}


@pytest.mark.parametrize("keyword", ["stride", "in_channels", "bias", "device"])
def test_keywords_that_the_static_layer_decides_are_named(keyword):
    with pytest.raises(ValueError, match=keyword):
        convert_to_fdconv(nn.Sequential(nn.Conv2d(20, 24, 3)), **{keyword: 2})


@pytest.mark.parametrize("shape", [(1, 10, 7, 2), (2, 72, 31, 2)])
def test_official_spectra_of_another_shape_are_listed(shape):
    with pytest.raises(ValueError, match=re.escape(f"dft_weight {shape}")):
        convert_official_state_dict({"dft_weight": torch.zeros(shape)}, FDConv2d(20, 24, 3, mask_grid=64))


def test_a_failed_conversion_leaves_the_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(200, 240, 3), nn.Conv2d(24, 20, 3))
    with pytest.raises(ValueError, match="num_bands=9000"):
        convert_to_fdconv(model, num_bands=9000)
    assert [type(module) for module in model] == [nn.Conv2d, nn.Conv2d]


def test_projection_shortcuts_of_torchvision_regnets_stay_static():
    found = {report.name: report.reason for report in summary(torchvision.models.regnet_y_400mf())}
    assert found["trunk_output.block4.block4-0.proj.0"] == "shortcut or downsampling between stages"


def test_the_classifier_of_a_mobilenetv3_is_called_so():
    found = {report.name: report.reason for report in summary(timm.create_model("mobilenetv3_small_100"))}
    assert found["classifier"] == "classifier"


# --- parameters and initialisation of the zoo's models


@pytest.mark.parametrize(
    ("name", "static", "added"),
    [
        ("resnet50_fdconv", "resnet50", 3_647_120),
        ("convnext_tiny_fdconv", "convnext_tiny", 2_929_464),
        ("swin_tiny_fdconv", "swin_tiny_patch4_window7_224", 3_233_520),
    ],
)
def test_parameters_added(name, static, added):
    with torch.device("meta"):
        dynamic, base = (sum(p.numel() for p in timm.create_model(n).parameters()) for n in (name, static))
    assert dynamic - base == added


def small_swin():
    return timm.create_model("swin_tiny_fdconv", embed_dim=24, depths=(1, 1), num_heads=(2, 4), img_size=56)


@pytest.mark.parametrize("make", [small_resnet, small_swin])
def test_init_weights_leaves_gates_at_one_and_draws_new_spectra(make):
    model = make()
    kept = dict(named_fd_layers(model))
    assert kept
    randomise(model)
    before = {name: layer.fdw.spectrum.clone() for name, layer in kept.items()}
    model.init_weights()
    assert dict(named_fd_layers(model)) == kept
    for name, layer in kept.items():
        assert not torch.equal(layer.fdw.spectrum, before[name])
        gates = layer.ksm.eval()(torch.randn(3, layer.static_shape[1]))
        made = [gate for gate in (gates.bands, gates.channels, gates.filters, gates.positions) if gate is not None]
        assert len(made) == (3 if layer.fbm is None else 4)
        assert all(torch.equal(gate, torch.ones_like(gate)) for gate in made)
        assert not layer.ksm.local_conv.weight.any()
        assert layer.fbm is None or not layer.fbm.weight.any()


@pytest.mark.parametrize(
    ("make", "static_class"), [(small_resnet, ResNet), (small_swin, SwinTransformer)], ids=["resnet", "swin"]
)
def test_init_static_gives_the_weights_of_the_static_initialisation(make, static_class):
    model = make()
    twin = deepcopy(model)
    for name, layer in dict(named_fd_layers(twin)).items():
        parent, _, child = name.rpartition(".")
        setattr(twin.get_submodule(parent), child, layer.static_twin())

    def initialise(target):
        torch.manual_seed(3)
        static_class.init_weights(target)

    init_static(model, partial(initialise, model))
    initialise(twin)
    for name, layer in named_fd_layers(model):
        assert relative_error(layer.static_twin().weight, twin.get_submodule(name).weight) < 1e-6
        if layer.bias is not None:
            assert torch.equal(layer.bias, twin.get_submodule(name).bias)


@pytest.mark.parametrize("make", [small_resnet, small_swin])
def test_a_model_built_on_the_meta_device_gets_its_buffers_back(make):
    real = make()
    with torch.device("meta"):
        model = make()
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.fill_(1)
    for module in model.modules():
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    model.load_state_dict(real.state_dict())
    buffers = dict(real.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    size = 56
    assert torch.equal(model.eval()(images(size)), real.eval()(images(size)))


def test_the_public_names():
    for name in fdconv_zoo.__all__:
        assert hasattr(fdconv_zoo, name)


def test_no_name_of_the_package_hides_one_of_its_modules():
    for module in pkgutil.iter_modules(fdconv_zoo.__path__):
        assert isinstance(getattr(fdconv_zoo, module.name, pkgutil), types.ModuleType), module.name
