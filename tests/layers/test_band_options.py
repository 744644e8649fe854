"""What no shape tells is in the checkpoint, and compared on load."""

import copy

import pytest
import timm
import torch
from safetensors.torch import load_model, save_model
from timm.models import load_checkpoint
from timm.utils import ModelEmaV3
from torch import nn
from torch.overrides import TorchFunctionMode

from fdconv_zoo import FDConv2d, FDLinear, convert_static_state_dict, convert_to_fdconv
from tests.compare import randomise, relative_error

KEY = "band_options.values"


def conv(kernel=3, **kwargs):
    return FDConv2d(18, 20, kernel, num_bands=8, **kwargs)


def old_state(layer):
    """As it was saved before."""
    return {key: value for key, value in layer.state_dict().items() if not key.endswith(KEY)}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    ("saved", "own", "message"),
    [
        (
            conv(mask_grid=64),
            conv(),
            "has mask_grid=None, .* was saved, which has mask_grid=64, cutoffs=.1/4, 1/8, 1/16",
        ),
        (conv(), conv(mask_grid=64), "has mask_grid=64, .* which has mask_grid=None, cutoffs=.1/4, 1/8, 1/16"),
        (conv(mask_grid=32), conv(mask_grid=64), "has mask_grid=64, .* which has mask_grid=32"),
        (conv(cutoffs=(1 / 3, 1 / 8, 1 / 16)), conv(), r"which has mask_grid=None, cutoffs=\(1/3, 1/8, 1/16\)"),
        (conv(1, mask_grid=64), conv(1), "has mask_grid=None and .* which has mask_grid=64: build it with that"),
        (conv(1), conv(1, mask_grid=64), "has mask_grid=64 and .* which has mask_grid=None: build it with that"),
    ],
)
def test_a_layer_with_other_bands_is_refused(saved, own, message, assign, strict):
    with pytest.raises(RuntimeError, match=message):
        own.load_state_dict(saved.state_dict(), strict=strict, assign=assign)
    own.load_state_dict(own.state_dict())


def test_the_layers_are_named():
    net, other = nn.Sequential(nn.Identity(), conv()), nn.Sequential(nn.Identity(), conv(mask_grid=64))
    with pytest.raises(RuntimeError, match=r"\b1 has mask_grid=None"):
        net.load_state_dict(other.state_dict())


def test_pointwise_layers_know_no_masks_and_linear_ones_no_options():
    conv(1, mask_grid=64).load_state_dict(conv(1, mask_grid=32, cutoffs=(1 / 3,)).state_dict())
    conv(fbm=False).load_state_dict(conv(fbm=False, cutoffs=(1 / 3,)).state_dict())
    assert not any(key.endswith(KEY) for key in FDLinear(18, 20).state_dict())


@pytest.mark.parametrize("empty", ["", "meta", "to_empty"])
@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("kwargs", [{}, {"mask_grid": 64}, {"cutoffs": (1 / 3,)}])
def test_checkpoints_without_them_load_strictly(kwargs, assign, empty):
    source, x = randomise(conv(**kwargs)).eval(), torch.randn(2, 18, 6, 7)
    layer = conv(**kwargs)
    if empty:
        layer.to("meta")
    if empty == "to_empty" or (empty and not assign):
        layer.to_empty(device="cpu")
    found = layer.eval().load_state_dict(old_state(source), assign=assign)
    assert not found.missing_keys
    assert not found.unexpected_keys
    assert torch.equal(layer(x), source(x))
    # What is saved next is whole again.
    conv(**kwargs).load_state_dict(layer.state_dict())


def test_safetensors_and_timm_read_and_write_them(tmp_path):
    path = str(tmp_path / "model.safetensors")
    kwargs = {"num_classes": 3, "features_only": False}
    source = timm.create_model("mobilenetv2_100_fdconv", **kwargs)
    save_model(source, path)
    load_model(timm.create_model("mobilenetv2_100_fdconv", **kwargs), path)
    load_checkpoint(timm.create_model("mobilenetv2_100_fdconv", **kwargs), path)
    other = timm.create_model("mobilenetv2_100_fdconv", mask_grid=64, **kwargs)
    for load in (load_model, load_checkpoint):
        with pytest.raises(RuntimeError, match="was saved, which has mask_grid=None"):
            load(other, path)
    old = {key: value for key, value in source.state_dict().items() if not key.endswith(KEY)}
    torch.save(old, tmp_path / "old.pth")
    load_checkpoint(other, str(tmp_path / "old.pth"))


def test_averages_and_roundings_of_checkpoints_load():
    one, two = randomise(conv()), randomise(conv())
    states = one.state_dict(), two.state_dict()
    mean = {key: (states[0][key] + states[1][key]) / 2 for key in states[0]}
    conv().load_state_dict(mean)
    conv().load_state_dict({key: value.half() for key, value in states[0].items()})
    ema = ModelEmaV3(one, decay=0.5)
    ema.update(two)
    assert torch.equal(ema.module.state_dict()[KEY], states[0][KEY])


def test_scripted_layers_have_them():
    layer = conv(mask_grid=64)
    scripted = torch.jit.script(layer)
    layer.load_state_dict(scripted.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="was saved, which has mask_grid=64"):
        conv().load_state_dict(scripted.state_dict(), strict=False)


def test_state_dicts_of_static_layers_are_completed():
    static = nn.Conv2d(18, 20, 3)
    layer = conv(cutoffs=(1 / 3,))
    layer.load_state_dict(convert_static_state_dict(static.state_dict(), layer))
    completed = convert_static_state_dict(old_state(layer), layer)
    assert completed.keys() == layer.state_dict().keys()
    assert relative_error(layer.static_twin().weight, static.weight) < 1e-6


def test_copies_and_conversions_keep_them():
    model = convert_to_fdconv(nn.Sequential(nn.Conv2d(18, 20, 3)), mask_grid=64)
    twin = copy.deepcopy(model).half()
    assert twin.state_dict()[f"0.{KEY}"].tolist() == [64, 1, 4, 1, 8, 1, 16]
    assert not any("band_options" in name for name, _ in twin.named_parameters())


def test_saving_copies_nothing_from_the_host():
    """An average of the weights saves twice an update: a copy from the CPU would wait for the device each time."""
    layer = conv()
    layer.state_dict()

    class Made(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            made.append(function)
            return function(*args, **(kwargs or {}))

    made = []
    with Made():
        layer.state_dict()
    assert torch.tensor not in made
