"""State dicts of static models and official checkpoints, moved into the Fourier domain."""

import pytest
import timm
import torch
from torch import nn

from fdconv_zoo import (
    FDConv2d,
    FDLinear,
    convert_official_state_dict,
    convert_static_state_dict,
    convert_to_fdconv,
)
from fdconv_zoo.conversion import filter_pretrained, named_fd_layers
from fdconv_zoo.layers.ops import literal
from tests.compare import randomise, relative_error
from tests.small_net import Net, images, net, small_resnet

# --- static state dicts


def test_converting_a_state_dict_twice_changes_nothing_and_leaves_the_source():
    source, model = net(), convert_to_fdconv(Net())
    state = source.state_dict()
    copy = {key: value.clone() for key, value in state.items()}
    once = convert_static_state_dict(state, model)
    twice = convert_static_state_dict(once, model)
    assert once.keys() == twice.keys() == model.state_dict().keys()
    assert all(torch.equal(once[key], twice[key]) for key in once)
    assert state.keys() == copy.keys()
    assert all(torch.equal(state[key], copy[key]) for key in state)
    model.load_state_dict(once)
    assert relative_error(model.eval()(images()), source(images())) < 1e-5


def test_the_order_of_keys_does_not_matter():
    state, model = net().state_dict(), convert_to_fdconv(Net())
    forwards = convert_static_state_dict(state, model)
    backwards = convert_static_state_dict(dict(reversed(state.items())), model)
    assert forwards.keys() == backwards.keys()
    assert all(torch.equal(forwards[key], backwards[key]) for key in forwards)


def test_own_weights_pass_through_and_half_converted_ones_are_completed():
    model = randomise(convert_to_fdconv(Net()))
    own = model.state_dict()
    same = convert_static_state_dict(own, model)
    assert same.keys() == own.keys()
    assert all(torch.equal(same[key], own[key]) for key in own)
    half = {key: value for key, value in own.items() if not key.startswith("conv2.")}
    half["conv2.weight"] = model.conv2.static_twin().weight.detach()
    completed = convert_static_state_dict(half, model)
    assert completed.keys() == own.keys()
    assert relative_error(completed["conv2.fdw.spectrum"], own["conv2.fdw.spectrum"]) > 0
    assert torch.equal(completed["mlp.0.fdw.spectrum"], own["mlp.0.fdw.spectrum"])


def test_static_weights_set_a_trained_models_gates_to_one():
    """Back to the start, for the next fold: modulation that training moved must not stay."""
    source = net()
    model = randomise(convert_to_fdconv(Net())).eval()
    assert relative_error(model(images()), source(images())) > 0.01
    model.load_state_dict(convert_static_state_dict(source.state_dict(), model))
    assert relative_error(model(images()), source(images())) < 1e-5


def test_nothing_but_the_new_keys_is_filled_in():
    state, model = net().state_dict(), convert_to_fdconv(Net())
    for key in ("fc.bias", "conv3.bias", "conv2.weight"):
        del state[key]
    missing = set(model.state_dict()) - set(convert_static_state_dict(state, model))
    assert missing == {"fc.bias", "conv3.bias", *(key for key in model.state_dict() if key.startswith("conv2."))}


def test_keys_that_fit_nothing_are_all_listed():
    state, model = net().state_dict(), convert_to_fdconv(Net())
    state |= {"conv9.weight": torch.zeros(1), "mlp.0.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"2 keys of the static state dict fit nothing .*: conv9.weight, mlp.0.extra$"):
        convert_static_state_dict(state, model)
    state |= {f"extra.{index}": torch.zeros(1) for index in range(90)}
    with pytest.raises(ValueError, match=r"92 keys of .*: conv9.weight, mlp.0.extra, extra.0, \.\.\.$"):
        convert_static_state_dict(state, model)


def test_weights_of_another_shape_are_all_listed():
    state, model = net().state_dict(), convert_to_fdconv(Net())
    state |= {"conv2.weight": torch.zeros(24, 20, 1, 1), "mlp.0.weight": torch.zeros(39, 20)}
    with pytest.raises(ValueError, match="2 static weights do not fit") as error:
        convert_static_state_dict(state, model)
    assert "conv2.weight (24, 20, 1, 1) instead of (24, 20, 3, 3)" in str(error.value)
    assert "mlp.0.weight (39, 20)" in str(error.value)


def test_state_dict_of_a_lone_layer():
    for static, layer in (
        (nn.Conv2d(20, 24, 3), FDConv2d(20, 24, 3)),
        (nn.Linear(20, 24, bias=False), FDLinear(20, 24, bias=False)),
    ):
        layer.load_state_dict(convert_static_state_dict(static.state_dict(), layer))
        twin = layer.static_twin()
        assert relative_error(twin.weight, static.weight) < 1e-6


def test_linear_weights_fit_pointwise_convolutions_and_the_reverse():
    linear, conv = nn.Linear(20, 24), nn.Conv2d(20, 24, 1)
    for static, layer in ((linear, FDConv2d(20, 24, 1)), (conv, FDLinear(20, 24))):
        layer.load_state_dict(convert_static_state_dict(static.state_dict(), layer))
        assert relative_error(layer.static_twin().weight.flatten(), static.weight.flatten()) < 1e-6


def test_the_dtype_of_the_weights_is_kept():
    state = {key: value.to(torch.bfloat16) for key, value in nn.Conv2d(20, 24, 3).state_dict().items()}
    layer = FDConv2d(20, 24, 3)
    assert convert_static_state_dict(state, layer)["fdw.spectrum"].dtype == torch.bfloat16


def test_a_classifier_of_another_size_is_left_to_timm():
    channels = (24, 24, 32, 32)
    model = timm.create_model("resnet18_fdconv", num_classes=7, channels=channels)
    state = timm.create_model("resnet18", channels=channels).state_dict()
    filtered = filter_pretrained(state, model)
    assert torch.equal(filtered["fc.weight"], state["fc.weight"])
    assert filtered.keys() == model.state_dict().keys()
    headless = timm.create_model("resnet18_fdconv", num_classes=0, channels=channels)
    assert filter_pretrained(state, headless).keys() - headless.state_dict().keys() == {"fc.weight", "fc.bias"}


# --- official checkpoints

HEADS = ("kernel_fc", "channel_fc", "filter_fc", "spatial_fc")


def official_layer(layer):
    """The state of a layer under the official names and in the official units."""
    state = layer.state_dict()
    factor = literal.parseval_factor(layer.fdw.rows, layer.fdw.columns).float()
    half_spectrum = state["fdw.spectrum"] / factor[:, None]
    out = {"dft_weight": half_spectrum[None] / (min(layer.static_shape[:2]) // 2)}
    for kind in ("weight", "bias"):
        for head, part in zip(HEADS, state[f"ksm.heads.{kind}"].split(layer.ksm.sections), strict=False):
            out[f"KSM_Global.{head}.{kind}"] = part[:, :, None, None] if kind == "weight" else part
    out["KSM_Global.fc.weight"] = state["ksm.fc.weight"][:, :, None, None]
    for official, own in (("KSM_Global.bn", "norm"), ("KSM_Global.relu", "act"), ("KSM_Local.norm", "local_norm")):
        for name, value in layer.ksm.get_submodule(own).state_dict().items():
            out[f"{official}.{name}"] = value
    out["KSM_Local.conv.weight"] = state["ksm.local_conv.weight"]
    for band in range(3 if layer.fbm is not None else 0):
        for kind in ("weight", "bias"):
            out[f"FBM.freq_weight_conv_list.{band}.{kind}"] = state[f"fbm.{kind}"][band : band + 1]
    if layer.bias is not None:
        out["bias"] = state["bias"]
    return out


def official_checkpoint(model, static=()):
    """The state of a model as the official code would have saved it, some layers static."""
    out = dict(model.state_dict())
    for name, layer in named_fd_layers(model):
        own = {key: out.pop(key) for key in list(out) if key.startswith(f"{name}.")}
        if name in static:
            out[f"{name}.weight"] = layer.static_twin().weight.detach()
        else:
            assert len(official_layer(layer)) > len(own) // 2
            out |= {f"{name}.{key}": value for key, value in official_layer(layer).items()}
    return out


@pytest.fixture
def backbone():
    return randomise(small_resnet(mask_grid=64)).eval()


WRAPPERS = {
    "plain": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "meta": {"epoch": 12}},
    "model": lambda state: {"model": state, "optimizer": {"state": {}}},
    "module": lambda state: {f"module.{key}": value for key, value in state.items()},
    "detector": lambda state: (
        {f"backbone.{key}": value for key, value in state.items()}
        | {"neck.convs.0.weight": torch.zeros(1), "roi_head.fc.weight": torch.zeros(1)}
    ),
    "detector of a distributed run": lambda state: {
        "state_dict": {f"module.backbone.{key}": value for key, value in state.items()}
        | {"module.rpn_head.conv.weight": torch.zeros(1)}
    },
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_official_checkpoints_however_wrapped(backbone, wrap):
    state = wrap(official_checkpoint(backbone))
    model = small_resnet(mask_grid=64).eval()
    converted = convert_official_state_dict(state, model)
    own = backbone.state_dict()
    assert converted.keys() == own.keys()
    assert all(relative_error(converted[key], own[key]) < 1e-6 for key in own)
    model.load_state_dict(converted)
    assert relative_error(model(images(64)), backbone(images(64))) < 1e-4


def test_official_checkpoints_of_a_detector_have_no_classifier(backbone):
    state = {f"backbone.{k}": v for k, v in official_checkpoint(backbone).items() if not k.startswith("fc.")}
    model = small_resnet(mask_grid=64)
    assert model.state_dict().keys() - convert_official_state_dict(state, model).keys() == {"fc.weight", "fc.bias"}
    model.reset_classifier(0)
    model.load_state_dict(convert_official_state_dict(state, model))


def test_official_checkpoints_with_static_layers_among_them(backbone):
    static = ["layer1.0.conv1", "layer3.0.conv2"]
    model = small_resnet(mask_grid=64)
    converted = convert_official_state_dict(official_checkpoint(backbone, static), model)
    own = backbone.state_dict()
    assert converted.keys() == own.keys()
    for name in static:
        expected = own[f"{name}.fdw.spectrum"]
        twin = backbone.get_submodule(name).static_twin().weight
        assert relative_error(converted[f"{name}.fdw.spectrum"], literal.spectrum_of(twin)) < 1e-6
        assert not converted[f"{name}.ksm.heads.weight"].any()
        assert expected.shape == converted[f"{name}.fdw.spectrum"].shape
    model.load_state_dict(converted)


def test_the_official_order_of_keys_does_not_matter(backbone):
    state, model = official_checkpoint(backbone), small_resnet(mask_grid=64)
    forwards = convert_official_state_dict(state, model)
    backwards = convert_official_state_dict(dict(reversed(state.items())), model)
    assert forwards.keys() == backwards.keys()
    assert all(torch.equal(forwards[key], backwards[key]) for key in forwards)


def test_official_keys_that_are_missing_are_all_listed(backbone):
    state = official_checkpoint(backbone)
    del state["layer1.0.conv1.KSM_Global.bn.running_var"], state["layer2.0.conv2.KSM_Local.conv.weight"]
    for kind in ("weight", "bias"):
        for band in range(3):
            del state[f"layer4.0.conv1.FBM.freq_weight_conv_list.{band}.{kind}"]
    with pytest.raises(ValueError, match="the official state dict lacks 4 keys of FDConv layers: ") as error:
        convert_official_state_dict(state, small_resnet(mask_grid=64))
    for key in ("layer1.0.conv1.ksm.norm.running_var", "layer2.0.conv2.ksm.local_conv.weight"):
        assert key in str(error.value)
    assert "layer4.0.conv1.fbm.weight, layer4.0.conv1.fbm.bias" in str(error.value)


def test_official_keys_that_fit_nothing_are_all_listed(backbone):
    state = official_checkpoint(backbone) | {
        "layer1.0.conv1.KSM_Global.extra": torch.zeros(1),
        "aux.weight": torch.ones(1),
    }
    with pytest.raises(ValueError, match="2 keys of the static state dict fit nothing in the model") as error:
        convert_official_state_dict(state, small_resnet(mask_grid=64))
    assert "aux.weight" in str(error.value)
    assert "layer1.0.conv1.KSM_Global.extra" in str(error.value)


def test_a_lone_official_layer_and_the_source_left_as_it_was():
    source = randomise(FDConv2d(20, 24, 3, mask_grid=64, num_bands=16)).eval()
    state = official_layer(source)
    keys = list(state)
    layer = FDConv2d(20, 24, 3, mask_grid=64, num_bands=16).eval()
    layer.load_state_dict(convert_official_state_dict(state, layer))
    assert list(state) == keys
    x = torch.randn(2, 20, 8, 9)
    assert relative_error(layer(x), source(x)) < 1e-5


@pytest.mark.parametrize("method", ["fdconv", "odconv"])
def test_static_weights_alone_do_not_bring_a_model_off_the_meta_device(method):
    static = timm.create_model("resnet18", num_classes=3)
    with torch.device("meta"):
        model = timm.create_model(f"resnet18_{method}", num_classes=3)
    with pytest.raises(RuntimeError, match="is on the meta device and would stay there"):
        model.load_state_dict(static.state_dict(), assign=True)


def test_what_is_no_tensor_is_an_unexpected_key():
    static = timm.create_model("resnet18", num_classes=3)
    model = timm.create_model("resnet18_fdconv", num_classes=3)
    found = model.load_state_dict({**static.state_dict(), "epoch": 3}, strict=False)
    assert found.unexpected_keys == ["epoch"]
