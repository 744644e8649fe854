"""torch.func, and derivatives of derivatives: as of the literal equations, and as a loop of autograd gives them."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

import fdconv_zoo
from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.layers.ops import library, literal
from tests.compare import randomise, relative_error

TOLERANCE = 1e-12


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    layers = [FDConv2d(3, 4, 3, padding=1, num_bands=4), nn.Tanh(), FDConv2d(4, 3, 1, num_bands=3), nn.Flatten(2)]
    return randomise(nn.Sequential(*layers, FDLinear(9, 2, num_bands=3), nn.Flatten())).double().eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(2, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def by_loop(net, x):
    """The Jacobian by the operators, one output after the other."""
    return jacobian(net, x)


def test_jacobians(net, x, by_loop):
    assert relative_error(jacrev(net)(x), by_loop) < TOLERANCE
    assert relative_error(jacfwd(net)(x), by_loop) < TOLERANCE
    assert relative_error(jacobian(net, x, vectorize=True), by_loop) < TOLERANCE
    assert relative_error(jacobian(net, x, create_graph=True), by_loop) < TOLERANCE
    assert relative_error(jacobian(net, x, strategy="forward-mode", vectorize=True), by_loop) < TOLERANCE


def test_forward_mode(net, x, by_loop):
    direction = torch.randn_like(x)
    expected = by_loop.flatten(2) @ direction.flatten()
    assert relative_error(jvp(net, (x,), (direction,))[1], expected) < TOLERANCE
    with torch.autograd.forward_ad.dual_level():
        dual = net(torch.autograd.forward_ad.make_dual(x, direction))
        assert relative_error(torch.autograd.forward_ad.unpack_dual(dual).tangent, expected) < TOLERANCE


def test_gradients_of_each_sample(net, x):
    parameters = dict(net.named_parameters())

    def loss(parameters, sample):
        return functional_call(net, parameters, (sample[None],)).sin().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        one_by_one = torch.autograd.grad(net(sample[None]).sin().sum(), list(parameters.values()))
        for got, expected in zip(found.values(), one_by_one, strict=True):
            assert relative_error(got[i], expected) < TOLERANCE


def test_over_inputs(net, x):
    """vmap of the input alone, also of one in channels-last format."""
    images = torch.stack([x, x.flip(0), x + 1])
    expected = torch.stack([net(image) for image in images])
    assert relative_error(vmap(net)(images), expected) < TOLERANCE
    assert (
        relative_error(vmap(net)(images.flatten(0, 1).to(memory_format=torch.channels_last).view_as(images)), expected)
        < TOLERANCE
    )
    assert relative_error(vmap(net, in_dims=4, out_dims=1)(images.movedim(0, 4)), expected.movedim(0, 1)) < TOLERANCE


@pytest.mark.parametrize("dims", [1, 3])
def test_over_inputs_of_other_dimensions(dims):
    layer = randomise(getattr(fdconv_zoo, f"FDConv{dims}d")(3, 4, 3, num_bands=4, dtype=torch.float64)).eval()
    x = torch.randn(2, 3, 3, *[4] * dims, dtype=torch.float64)
    assert relative_error(vmap(layer)(x), torch.stack([layer(part) for part in x])) < TOLERANCE


def test_ensembles_of_parameters(x):
    nets = [randomise(FDConv2d(3, 4, 3, num_bands=4, dtype=torch.float64)).eval() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    run = lambda p, b: functional_call(nets[0], (p, b), (x,))  # noqa: E731
    buffers = {name: value for name, value in buffers.items() if value.is_floating_point()}
    found = vmap(run)(parameters, buffers)
    assert all(relative_error(a, net(x)) < TOLERANCE for a, net in zip(found, nets, strict=True))


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("kwargs", [{"padding": 1}, {"ksm": False}, {"fbm": False, "stride": 2}], ids=str)
def test_second_derivatives_are_those_of_the_literal_equations(kwargs, recompute, x):
    """A penalty on the input's gradient, and its gradients."""
    layer = randomise(FDConv2d(3, 4, 3, num_bands=4, recompute=recompute, dtype=torch.float64, **kwargs)).eval()
    state = {key: value.detach().clone() for key, value in layer.state_dict().items()}
    parameters = [state[name].requires_grad_() for name, _ in layer.named_parameters()]
    known = {key: value for key, value in kwargs.items() if key != "fbm"}

    def penalty(function, weights):
        wide = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(function(wide).sin().sum(), wide, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [wide, *weights], materialize_grads=True)

    found = penalty(layer, list(layer.parameters()))
    expected = penalty(lambda wide: literal.fdconv2d(state, wide, (4, 3, 3, 3), 4, **known), parameters)
    assert all(relative_error(a, b) < 1e-10 for a, b in zip(found, expected, strict=True))


def test_gradgradcheck_with_masks_of_a_grid(x):
    layer = randomise(FDConv2d(3, 4, 3, num_bands=4, mask_grid=64, dtype=torch.float64)).eval()
    assert torch.autograd.gradgradcheck(layer, (x.clone().requires_grad_(),), fast_mode=True)


def test_hessians(net, x):
    def loss(sample):
        return net(sample[None]).sin().sum()

    expected = hessian(loss, x[0])
    assert relative_error(jacfwd(jacrev(loss))(x[0]), expected) < 1e-11
    assert relative_error(hessian(loss, x[0], vectorize=True), expected) < 1e-11


def test_the_operators_compute_where_nothing_transforms(net, x, monkeypatch):
    """Also the first derivatives under create_graph=True come from elsewhere, all others from the operators."""
    calls = []
    plain = library.traced.dynamic_conv2d
    monkeypatch.setattr(library.traced, "dynamic_conv2d", lambda *args: calls.append(1) or plain(*args))
    torch.autograd.grad(net(x.clone().requires_grad_()).sum(), list(net.parameters()))
    assert not calls
    torch.autograd.grad(net(x).sum(), list(net.parameters()), create_graph=True)
    assert len(calls) == 3


def test_under_the_compiler(net, x, by_loop):
    torch.compiler.reset()
    compiled = torch.compile(vmap(grad(lambda sample: net(sample[None]).sum())), backend="eager", fullgraph=True)
    assert relative_error(compiled(x), by_loop.sum(1).diagonal(dim1=0, dim2=1).movedim(-1, 0)) < TOLERANCE
    assert relative_error(torch.compile(net, backend="eager", fullgraph=True)(x), net(x)) < TOLERANCE
