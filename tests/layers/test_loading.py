"""Every way in which weights come into a layer leaves it right: the gain map is in no checkpoint."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fdconv_zoo import FDConv2d, FDLinear, convert_to_fdconv
from fdconv_zoo.layers.dynamic import CondConv2d, DYConv2d, ODConv2d
from tests.compare import randomise, relative_error


def on_meta(make):
    with torch.device("meta"):
        return make()


def without_weights(make):
    """A layer that was on the meta device and has memory with whatever is in it: NaN, or the largest integers."""
    torch.use_deterministic_algorithms(True)
    try:
        return on_meta(make).to_empty(device="cpu")
    finally:
        torch.use_deterministic_algorithms(False)


def loaded(layer, state, **kwargs):
    layer.load_state_dict(state, **kwargs)
    return layer


def set_one_by_one(layer, state):
    for name, tensor in state.items():
        parent, _, key = name.rpartition(".")
        module = layer.get_submodule(parent)
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(tensor)
        else:
            module._buffers[key] = tensor
    return layer


def averaged(layer, average):
    """The layer's average over updates in which nothing changed, buffers included."""
    model = AveragedModel(layer, use_buffers=True, **average)
    for _ in range(3):
        model.update_parameters(layer)
    return model.module


def of_one_vector(layer):
    """Parameters as pieces of one vector that begin at odd places, as FSDP and DDP's buckets have them."""
    pieces, start = nn.Parameter(torch.zeros(1)), [*layer.parameters()]
    everything = [pieces, *start]
    vector_to_parameters(parameters_to_vector(everything).detach().clone(), everything)
    assert any(parameter.storage_offset() % 2 for parameter in layer.parameters())
    return layer


WAYS = {
    "assign to a meta layer": lambda make, state: loaded(on_meta(make), state, assign=True),
    "assign, then move": lambda make, state: loaded(on_meta(make), state, assign=True).to(torch.float32),
    "to_empty": lambda make, state: loaded(without_weights(make), state),
    "to_empty, assign": lambda make, state: loaded(without_weights(make), state, assign=True),
    "to_empty of a real layer": lambda make, state: loaded(make().to_empty(device="cpu"), state),
    "to meta and back": lambda make, state: loaded(make().to("meta").to_empty(device="cpu"), state),
    "parameters set one by one": lambda make, state: set_one_by_one(on_meta(make), state),
    "set one by one, then moved": lambda make, state: set_one_by_one(on_meta(make), state).to("cpu"),
    "shared memory": lambda make, state: loaded(make(), state).share_memory(),
    "averaged": lambda make, state: averaged(loaded(make(), state), dict(multi_avg_fn=get_ema_multi_avg_fn(0.9999))),
    "averaged one by one": lambda make, state: averaged(
        loaded(make(), state), dict(avg_fn=lambda average, value, _: 0.9999 * average + (1 - 0.9999) * value)
    ),
    "cast to a type": lambda make, state: loaded(make(), state).type(torch.float32),
    "pieces of a vector": lambda make, state: of_one_vector(loaded(make(), state)),
    "a copy of an assigned layer": lambda make, state: copy.deepcopy(loaded(on_meta(make), state, assign=True)),
}
LAYERS = {
    "conv": (lambda: FDConv2d(18, 20, 3, num_bands=8), (2, 18, 6, 7)),
    "official order": (lambda: FDConv2d(18, 20, 3, num_bands=8, mask_grid=64), (2, 18, 6, 7)),
    "linear": (lambda: FDLinear(18, 20, num_bands=8), (2, 5, 18)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_loading_gives_the_layer_that_was_saved(way, kind):
    make, shape = LAYERS[kind]
    source, x = randomise(make()).eval(), torch.randn(shape)
    layer = WAYS[way](make, source.state_dict()).eval()
    assert relative_error(layer(x), source(x)) <= (1e-5 if "averaged" in way else 0)
    make().load_state_dict(layer.state_dict())
    assert not any(buffer.is_meta for buffer in layer.buffers())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_meta_layer_called_with_real_weights(kind):
    make, shape = LAYERS[kind]
    source, x = randomise(make()).eval(), torch.randn(shape)
    assert torch.equal(functional_call(on_meta(make).eval(), source.state_dict(), (x,)), source(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_skip_init(kind):
    make, shape = LAYERS[kind]
    source, x = randomise(make()).eval(), torch.randn(shape)
    args = (18, 20) if kind == "linear" else (18, 20, 3)
    kwargs = {"num_bands": 8} | ({"mask_grid": 64} if kind == "official order" else {})
    layer = loaded(nn.utils.skip_init(type(source), *args, **kwargs), source.state_dict()).eval()
    assert torch.equal(layer(x), source(x))


def test_a_model_that_was_built_on_the_meta_device():
    make = lambda: timm.create_model("mobilenetv2_100_fdconv", num_classes=4)  # noqa: E731
    source, x = randomise(make().eval()), torch.randn(1, 3, 32, 32)
    model = loaded(on_meta(make), source.state_dict(), assign=True).eval()
    assert torch.equal(model(x), source(x))


def test_conversion_of_a_static_model_on_the_meta_device():
    static = nn.Sequential(nn.Conv2d(18, 20, 3), nn.Flatten(2))
    source = randomise(convert_to_fdconv(copy.deepcopy(static))).eval()
    model = convert_to_fdconv(static.to("meta"))
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    x = torch.randn(2, 18, 6, 7)
    assert torch.equal(loaded(model, source.state_dict(), assign=True).eval()(x), source(x))


def test_parameters_alone_on_the_meta_device_leave_the_gain_map_real(monkeypatch):
    """As under accelerate's init_empty_weights."""
    register = nn.Module.register_parameter

    def on_registering(module, name, parameter):
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"))

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", on_registering)
        model = convert_to_fdconv(nn.Sequential(nn.Conv2d(18, 20, 3), nn.Linear(18, 20)), include=lambda *_: True)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_is_first_called_in_inference_mode_can_be_trained(kind):
    make, shape = LAYERS[kind]
    layer = set_one_by_one(on_meta(make), make().state_dict())
    with torch.inference_mode():
        layer(torch.randn(shape))
    layer.train()(torch.randn(shape)).sum().backward()
    assert layer.fdw.spectrum.grad is not None


def test_the_static_weight_of_a_piece_of_a_vector():
    layer = FDConv2d(5, 7, 3, num_bands=4)
    expected = layer.static_weight()
    assert torch.equal(of_one_vector(layer).static_weight(), expected)
    layer(torch.randn(2, 5, 6, 6)).sum().backward()
    expected = layer.weight.grad.clone()
    flat = torch.zeros(layer.fdw.spectrum.numel() + 1)
    flat[1:] = layer.fdw.spectrum.grad.flatten()
    layer.fdw.spectrum.grad = flat[1:].view_as(layer.fdw.spectrum)
    assert torch.equal(layer.weight.grad, expected)


@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (FDConv2d, "fdw.spectrum"), (FDConv2d, "ksm.local_conv.weight"), (FDConv2d, "fbm.weight"), (FDConv2d, "bias"),
        (CondConv2d, "conv.weight"), (DYConv2d, "kernels"), (ODConv2d, "kernels"),
    ],
)  # fmt: skip
def test_a_parameter_that_is_left_on_the_meta_device_makes_no_numbers(cls, name):
    """The dispatcher takes the fake implementation then, whose results are memory that nobody wrote."""
    layer = cls(17, 20, 3).eval()
    owner, _, leaf = name.rpartition(".")
    module = layer.get_submodule(owner)
    setattr(module, leaf, nn.Parameter(getattr(module, leaf).to("meta")))
    with pytest.raises(RuntimeError, match="meta"):
        layer(torch.randn(2, 17, 5, 5))
