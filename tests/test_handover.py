"""Hooks, shared parameters and lists go over to the replacement; computed weights stay static."""

import copy
from collections import OrderedDict, deque, namedtuple
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fdconv_zoo import FDConv2d, convert_static_state_dict, convert_to_fdconv, summary
from fdconv_zoo.choice import named_fd_layers
from tests.compare import randomise, relative_error


def conv():
    return nn.Conv2d(20, 20, 3, padding=1)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


COMPUTED = {
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "pruning": pruned,
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("wrap", COMPUTED.values(), ids=COMPUTED.keys())
def test_a_computed_weight_stays_static_and_normalised(wrap):
    torch.manual_seed(0)
    trained = nn.Sequential(wrap(conv()), nn.ReLU(), conv())
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.7).add_(0.05)
    x = torch.randn(2, 20, 8, 8)
    expected = trained.eval()(x)
    model = nn.Sequential(wrap(conv()), nn.ReLU(), conv()).eval()
    model.load_state_dict(trained.state_dict())
    reason = {report.name: report.reason for report in summary(model)}["0"]
    assert "computed" in reason or "Parametrized" in reason
    convert_to_fdconv(model, num_bands=8)
    assert [name for name, _ in named_fd_layers(model)] == ["2"]
    assert relative_error(model(x), expected) < 1e-5


@dataclass
class Node:
    parent: object
    children: list
    layer: nn.Module | None = None


def test_a_tree_whose_branches_know_their_root():
    model = nn.Sequential(conv(), nn.ReLU())
    root = Node(None, [], model[0])
    root.children += [Node(root, []), Node(root, [], model[0])]
    model.tree, model.others = root, {"all": [root, model[0]]}
    convert_to_fdconv(model, num_bands=8)
    assert type(model[0]) is FDConv2d
    assert root.layer is model[0] and root.children[1].layer is model[0] and root.children[1].parent is root
    assert model.others["all"][0] is root and model.others["all"][1] is model[0]


def test_hooks_go_over_with_their_handles():
    model = nn.Sequential(conv(), conv())
    calls = []
    handles = [
        model[0].register_forward_hook(lambda module, args, output: calls.append(type(module)) or output + 1),
        model[0].register_forward_pre_hook(lambda module, args, kwargs: calls.append("before"), with_kwargs=True),
        model[0].register_full_backward_hook(lambda module, grad_in, grad_out: calls.append("backward")),
    ]
    x = torch.randn(2, 20, 6, 6, requires_grad=True)
    expected = model(x)
    convert_to_fdconv(model, num_bands=8)
    calls.clear()
    output = model(x)
    assert relative_error(output, expected) < 1e-5
    output.sum().backward()
    assert calls == ["before", FDConv2d, "backward"]
    for handle in handles:
        handle.remove()
    model(x)
    assert len(calls) == 3


class Twins(nn.Module):
    """Two layers of one weight, and a third of one bias."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = conv(), conv(), conv()
        self.b.weight = self.a.weight
        self.c.bias = self.a.bias

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def test_shared_parameters_stay_shared():
    model, x = Twins(), torch.randn(2, 20, 6, 6)
    expected = model(x)
    state = model.state_dict()
    convert_to_fdconv(model, num_bands=8)
    assert relative_error(model(x), expected) < 1e-5
    assert model.a.fdw.spectrum is model.b.fdw.spectrum
    assert model.a.bias is model.c.bias
    assert model.a.fdw.spectrum is not model.c.fdw.spectrum
    assert model.a.ksm is not model.b.ksm
    model(x).square().mean().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(model.a.static_weight(), model.b.static_weight())
    again = copy.deepcopy(model)
    assert again.a.fdw.spectrum is again.b.fdw.spectrum
    fresh = convert_to_fdconv(Twins(), num_bands=8)
    fresh.load_state_dict(convert_static_state_dict(state, fresh))
    assert relative_error(fresh(x), expected) < 1e-5


def test_a_parameter_shared_with_a_static_layer_is_refused_by_name():
    model = Twins()
    with pytest.raises(ValueError, match=r"a: its weight is also b.weight, which stays static; leave it with include"):
        convert_to_fdconv(model, include=lambda name, _: False if name == "b" else None)
    assert not list(named_fd_layers(model))


class Listed(nn.Module):
    """Registered layers that are called through plain containers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()
        self.order = [self.first]
        self.named = {"second": [self.second]}
        self.pair = (self.third, "third")

    def forward(self, x):
        for layer in (*self.order, *self.named["second"], self.pair[0]):
            x = layer(x).relu()
        return x


@torch.no_grad()
def test_layers_in_plain_containers_are_replaced_there_too():
    model, x = Listed().eval(), torch.randn(2, 20, 6, 6)
    expected = model(x)
    order = model.order
    convert_to_fdconv(model, num_bands=8)
    assert model.order is order
    assert model.order[0] is model.first
    assert model.named["second"][0] is model.second
    assert model.pair == (model.third, "third")
    assert relative_error(model(x), expected) < 1e-5
    randomise(model)
    assert relative_error(model(x), expected) > 0.1


Pair = namedtuple("Pair", ["layer", "number"])


@dataclass(frozen=True)
class Branch:
    layer: nn.Module


CONTAINERS = {
    "OrderedDict": (lambda layer: OrderedDict(a=layer), lambda held: held["a"]),
    "keys": (lambda layer: {layer: 1}, lambda held: next(iter(held))),
    "deque": (lambda layer: deque([layer], maxlen=2), lambda held: held[0]),
    "set": (lambda layer: {layer}, lambda held: next(iter(held))),
    "named tuple": (lambda layer: Pair([layer], 1), lambda held: held.layer[0]),
    "namespace": (lambda layer: SimpleNamespace(layers=[layer]), lambda held: held.layers[0]),
    "dataclass": (Branch, lambda held: held.layer),
    "partial": (lambda layer: partial(map, layer), lambda held: held.args[0]),
    "method": (lambda layer: layer.forward, lambda held: held.__self__),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_layers_in_other_containers_are_replaced_there_too(container):
    model, (hold, first) = nn.Sequential(conv(), conv()), CONTAINERS[container]
    model.held = hold(model[0])
    kind = type(model.held)
    convert_to_fdconv(model, num_bands=8)
    assert type(model.held) is kind
    assert first(model.held) is model[0]
    assert getattr(model.held, "maxlen", 2) == 2


def test_a_parameter_in_a_plain_container_is_refused_by_name():
    model = nn.Sequential(nn.Sequential(conv(), conv()))
    model[0].penalised = {"weights": [model[0][1].weight]}
    with pytest.raises(ValueError, match=r"0.1: its weight is also in 0.penalised, .*; leave it with include"):
        convert_to_fdconv(model, num_bands=8)
    convert_to_fdconv(model, include="0.0", num_bands=8)
    assert [name for name, _ in named_fd_layers(model)] == ["0.0"]


def test_an_optimiser_that_a_module_holds_is_refused_by_name():
    model = nn.Sequential(conv(), conv())
    model.optimizer = torch.optim.SGD([{"params": [model[1].bias]}], lr=0.1)
    with pytest.raises(ValueError, match=r"1: its bias is also in optimizer, .*; leave it with include"):
        convert_to_fdconv(model, num_bands=8)


def test_attributes_of_a_layer_and_of_its_parameters_go_over():
    model = nn.Sequential(conv(), conv())
    model[0].index, model[0].weight.no_decay, model[0].bias.no_decay = 3, True, False
    convert_to_fdconv(model, num_bands=8)
    assert (model[0].index, model[0].fdw.spectrum.no_decay, model[0].bias.no_decay) == (3, True, False)
    assert not hasattr(model[1], "index")
    assert not hasattr(model[0], "transposed")


def replace_forward(layer):
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


KEEPING = {
    "state dict": (lambda layer: layer.register_state_dict_post_hook(lambda *args: None), "hooks on its state dict"),
    "before a state dict": (lambda layer: layer.register_state_dict_pre_hook(lambda *args: None), "hooks on its state"),
    "loading": (lambda layer: layer.register_load_state_dict_pre_hook(lambda *args: None), "hooks on its state dict"),
    "loaded": (lambda layer: layer.register_load_state_dict_post_hook(lambda *args: None), "hooks on its state dict"),
    "gradient": (lambda layer: layer.weight.register_hook(lambda grad: 0 * grad), "its weight has hooks on its grad"),
    "accumulated": (
        lambda layer: layer.bias.register_post_accumulate_grad_hook(lambda bias: None), "its bias has hooks on its grad"
    ),
    "forward": (replace_forward, "its forward has been replaced"),
    "buffer": (lambda layer: layer.register_buffer("mask", torch.ones(3)), "given mask"),
    "adapter": (lambda layer: layer.add_module("adapter", nn.Identity()), "given adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KEEPING)
def test_what_would_be_lost_keeps_a_layer_static(kind):
    model, (change, reason) = nn.Sequential(conv(), conv()), KEEPING[kind]
    change(model[0])
    found = [report.reason for report in summary(model)]
    assert reason in found[0]
    assert not found[1]
    x = torch.randn(2, 20, 5, 5)
    expected = model(x)
    assert relative_error(convert_to_fdconv(model, num_bands=8)(x), expected) < 1e-5
    assert [name for name, _ in named_fd_layers(model)] == ["1"]
