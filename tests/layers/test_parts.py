"""A layer's parts are no layers of the network: what others do to a network's layers does not reach them."""

import copy
import pickle

import pytest
import torch
from torch import nn

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers.ksm import ChannelTaps, Projection
from tests.compare import randomise, relative_error

LAYERS = {
    "conv": (lambda: FDConv2d(18, 20, 3, num_bands=8), (4, 18, 6, 7)),
    "pointwise": (lambda: FDConv2d(18, 20, 1, num_bands=8), (4, 18, 6, 7)),
    "no ksm": (lambda: FDConv2d(18, 20, 3, num_bands=8, ksm=False), (4, 18, 6, 7)),
    "linear": (lambda: FDLinear(18, 20, num_bands=8), (4, 5, 18)),
}
on_layers = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())
STATIC = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Embedding)


def by_type(module):
    if isinstance(module, STATIC):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")


def by_class_name(module):
    """As DCGAN's, with the guard that some have."""
    name = type(module).__name__
    if hasattr(module, "weight") and ("Conv" in name or "Linear" in name):
        nn.init.kaiming_normal_(module.weight.data)
    elif "BatchNorm" in name:
        nn.init.normal_(module.weight.data, 1.0, 0.02)
        nn.init.zeros_(module.bias.data)


def by_class_name_of_parts(module):
    """Without the guard, all but whole layers."""
    if type(module) not in (FDConv2d, FDLinear) and ("Conv" in type(module).__name__ or "Lin" in type(module).__name__):
        nn.init.normal_(module.weight.data, 0.0, 0.02)


@on_layers
@pytest.mark.parametrize("initialise", [by_type, by_class_name, by_class_name_of_parts])
def test_initialisers_of_layers_leave_every_gate_at_one(make, shape, initialise):
    net, x = nn.Sequential(make(), nn.Identity()).eval(), torch.randn(shape) + 1
    net.apply(initialise)
    assert relative_error(net(x), net[0].static_twin()(x)) < 1e-5


@on_layers
def test_no_part_is_a_static_layer(make, shape):
    parts = list(make().modules())[1:]
    assert parts
    assert not any(isinstance(part, STATIC) for part in parts)


def test_parts_have_the_keys_and_shapes_of_the_static_layers_they_stand_for():
    for part, static in (
        (Projection(18, 16, bias=False), nn.Linear(18, 16, bias=False)),
        (Projection(18, 16, bias=True), nn.Linear(18, 16)),
        (ChannelTaps(60, 5), nn.Conv1d(1, 60, 5, bias=False)),
    ):
        shapes = {key: value.shape for key, value in static.state_dict().items()}
        assert {key: value.shape for key, value in part.state_dict().items()} == shapes


def test_the_hidden_layer_is_drawn_as_a_linear_layer_is():
    part, linear = Projection(18, 16, bias=False), nn.Linear(18, 16, bias=False)
    torch.manual_seed(3)
    part.draw()
    torch.manual_seed(3)
    linear.reset_parameters()
    assert torch.equal(part.weight, linear.weight)


@on_layers
def test_pickles_with_the_static_layers_of_before_load(make, shape):
    layer, x = randomise(make()).eval(), torch.randn(shape)
    expected, state = layer(x), layer.state_dict()
    for name, part in list(layer.ksm.named_children()):
        if isinstance(part, Projection):
            static = nn.Linear(part.in_features, part.out_features, part.bias is not None)
        elif isinstance(part, ChannelTaps):
            static = nn.Conv1d(1, len(part.weight), part.weight.shape[2], padding="same", bias=False)
        else:
            continue
        static.load_state_dict(part.state_dict())
        layer.ksm._modules[name] = static
    for module, name in ((layer, "fused"), (layer.fbm, "fused"), (layer.fdw, "kept_bank")):
        if module is not None:
            del module.__dict__[name]
    layer._modules.pop("band_options", layer.__dict__.pop("band_options", None))
    state = {key: value for key, value in state.items() if not key.startswith("band_options")}
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x), expected)
    again.load_state_dict(state)
    assert not any(isinstance(part, STATIC) for part in list(again.modules())[1:])


@on_layers
@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_takes_the_layers_beside_and_leaves_ours(make, shape):
    net, x = nn.Sequential(randomise(make()), nn.Flatten(), nn.LazyLinear(3)).eval(), torch.randn(shape)
    expected = net(x)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(net), {nn.Linear, nn.Conv1d}, dtype=torch.qint8)
    assert not isinstance(quantised[2], nn.Linear)
    assert torch.equal(quantised[0](x), net[0](x))
    assert relative_error(quantised(x), expected) < 0.05


@on_layers
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.filterwarnings("ignore:a batch of one")
def test_parameters_in_bfloat16_and_statistics_in_single_precision(make, shape, training, batch):
    """As FSDP2's mixed precision casts them: the gradients too come in the parameters' dtype."""
    layer = randomise(make()).train(training)
    x = torch.randn(batch, *shape[1:]).bfloat16()
    for parameter in layer.parameters():
        parameter.data = parameter.data.bfloat16()
    exact = copy.deepcopy(layer).float()
    expected = exact(x.float())
    expected.sum().backward()
    output = layer(x)
    assert output.dtype == torch.bfloat16
    assert relative_error(output.float(), expected) < 2e-2
    output.float().sum().backward()
    for own, other in zip(layer.parameters(), exact.parameters(), strict=True):
        assert own.grad.dtype == torch.bfloat16
        assert relative_error(own.grad.float(), other.grad) < 0.1
    for name, buffer in exact.named_buffers():
        if "running" in name:
            assert relative_error(layer.get_buffer(name), buffer) < 1e-2


@on_layers
@torch.no_grad()
def test_parameters_may_be_away_but_in_the_forward_of_their_module(make, shape):
    """As accelerate offloads them, and FSDP2 frees their memory."""
    layer, x = randomise(make()).eval(), torch.randn(shape)
    expected = layer(x)
    seen = []
    for module in list(layer.modules()):
        own = dict(module.named_parameters(recurse=False))

        def fetch(module, args, own=own):
            seen.extend(own)
            module._parameters.update({name: nn.Parameter(tensor.clone()) for name, tensor in own.items()})

        def free(module, args, output):
            for name, parameter in module.named_parameters(recurse=False):
                parameter.fill_(float("nan"))
                module._parameters[name] = nn.Parameter(parameter.to("meta"))

        if own:
            module.register_forward_pre_hook(fetch)
            module.register_forward_hook(free)
            module._parameters.update({name: nn.Parameter(tensor.to("meta")) for name, tensor in own.items()})
    assert torch.equal(layer(x), expected)
    assert len(seen) == len(list(layer.parameters()))
    assert all(parameter.is_meta for parameter in layer.parameters())
