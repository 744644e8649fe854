"""`layer.weight`: right for readers, exact where BatchNorm is absorbed, refused where it would make a static layer."""

import copy
import pickle

import pytest
import torch
from timm.layers import trunc_normal_tf_
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval, fuse_linear_bn_eval, parametrize, prune

from fdconv_zoo import FDConv2d, FDLinear
from fdconv_zoo.checkpoint import describe_misfits
from fdconv_zoo.conversion import convert_static_state_dict
from fdconv_zoo.layers.fourier import to_spectrum, weight_to_matrix
from tests.compare import randomise, randomise_norms, relative_error

LAYERS = {
    "3x3": lambda: FDConv2d(20, 24, 3, padding=1, stride=2, num_bands=8, bias=False),
    "1x1": lambda: FDConv2d(20, 20, 1, num_bands=8),
    "no ksm": lambda: FDConv2d(20, 24, (1, 3), num_bands=8, ksm=False),
    "linear": lambda: FDLinear(20, 24, num_bands=8),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    return randomise(LAYERS[request.param]()).eval()


def batch(layer):
    return torch.randn(3, 5, 20) if isinstance(layer, FDLinear) else torch.randn(3, 20, 9, 9)


def norm_of(layer):
    channels = layer.static_shape[0]
    norm = nn.BatchNorm1d(channels) if isinstance(layer, FDLinear) else nn.BatchNorm2d(channels)
    return randomise_norms(norm).eval()


def normed(layer, norm, x):
    out = layer(x)
    return norm(out.transpose(1, 2)).transpose(1, 2) if x.dim() == 3 else norm(out)


# --- readers


def test_a_reader_sees_the_static_weight(layer):
    twin = layer.static_twin().weight
    weight = layer.weight
    assert (weight.shape, weight.dtype, weight.device) == (twin.shape, twin.dtype, twin.device)
    assert (weight.numel(), weight.dim(), len(weight)) == (twin.numel(), twin.dim(), len(twin))
    assert relative_error(weight.detach().norm(), twin.detach().norm()) < 1e-6
    assert relative_error(weight.abs().flatten(1).mean(1), twin.abs().flatten(1).mean(1)) < 1e-6
    assert torch.from_numpy(weight.detach().cpu().numpy()).allclose(twin)
    assert torch.allclose(weight, twin, atol=1e-6)
    assert not weight.isnan().any()
    assert repr(weight).startswith("tensor(")


def test_a_penalty_on_the_weight_reaches_the_spectrum(layer):
    layer.weight.abs().pow(3).sum().backward()
    (expected,) = torch.autograd.grad(layer.static_weight().abs().pow(3).sum(), [layer.fdw.spectrum])
    assert relative_error(layer.fdw.spectrum.grad, expected) < 1e-6


def test_freezing_the_weight_freezes_the_spectrum(layer):
    layer.weight.requires_grad = False
    assert not layer.fdw.spectrum.requires_grad
    assert not layer.weight.requires_grad
    layer.weight.requires_grad_(True)
    assert layer.fdw.spectrum.requires_grad
    assert layer.ksm.fc.weight.requires_grad


@pytest.mark.parametrize("absorbed", [False, True])
def test_the_gradient_of_the_weight_is_that_of_the_static_weight(layer, absorbed):
    """By the chain rule at the spectrum, for a loss of the whole layer."""
    if absorbed:
        layer.absorb_batch_norm(norm_of(layer))
    assert layer.weight.grad is None
    layer(batch(layer)).square().mean().backward()
    weight = layer.static_weight().detach().requires_grad_()
    plain = weight if layer.filter_scale is None else weight / layer.filter_scale.view(-1, *[1] * (weight.dim() - 1))
    spectrum = to_spectrum(weight_to_matrix(plain.view(*layer.static_shape[:2], *layer.kernel_shape)))
    (expected,) = torch.autograd.grad(spectrum, weight, layer.fdw.spectrum.grad)
    found = layer.weight.grad
    assert relative_error(found, expected) < 1e-6
    assert found.shape == layer.static_shape
    assert torch.equal(found.norm() / 2, (found / 2).norm())
    for write in (found.zero_, lambda: found.mul_(2), lambda: nn.utils.clip_grad_norm_(layer.weight, 0.1)):
        with pytest.raises(RuntimeError, match=r"computed from layer.fdw.spectrum.grad"):
            write()
    layer.zero_grad()
    assert layer.weight.grad is None


@pytest.mark.parametrize("optimiser", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("frozen", [False, True])
def test_no_optimiser_takes_the_weight(layer, optimiser, frozen):
    layer.weight.requires_grad_(not frozen)
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        optimiser([layer.weight], lr=0.1)
    assert not isinstance(layer.weight, nn.Parameter)


def test_the_weight_is_no_parameter(layer):
    assert "weight" not in dict(layer.named_parameters())
    assert "weight" not in layer.state_dict()
    assert "filter_scale" not in layer.state_dict()


@pytest.mark.parametrize("fill", [nn.init.kaiming_normal_, nn.init.xavier_uniform_, trunc_normal_tf_])
def test_an_initialiser_fills_the_static_weight(layer, fill):
    twin = layer.static_twin()
    for module in (twin, layer):
        torch.manual_seed(1)
        fill(module.weight)
    assert relative_error(layer.static_weight(), twin.weight) < 1e-6
    nn.init.zeros_(layer.weight.data)
    assert not layer.fdw.spectrum.any()


# --- BatchNorm


def absorb_directly(layer, norm):
    layer = copy.deepcopy(layer)
    layer.absorb_batch_norm(norm)
    return layer


def torch_fuse(layer, norm):
    return (fuse_linear_bn_eval if isinstance(layer, FDLinear) else fuse_conv_bn_eval)(layer, norm)


def scale_in_place(layer, norm):
    """As fusers do that write to the weight."""
    layer = copy.deepcopy(layer)
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    bias = 0 if layer.bias is None else layer.bias
    layer.bias = nn.Parameter((bias - norm.running_mean) * factor + norm.bias)
    with torch.no_grad():
        layer.weight.mul_(factor.view(-1, *[1] * (len(layer.static_shape) - 1)))
    return layer


def assign_data(layer, norm):
    """As versions of ultralytics before 8.4 did: a product with a diagonal matrix, set as data."""
    layer = copy.deepcopy(layer)
    factor = norm.weight.div(torch.sqrt(norm.eps + norm.running_var))
    fused = torch.mm(torch.diag(factor), layer.weight.clone().view(layer.static_shape[0], -1))
    layer.weight.data = fused.view(layer.weight.shape)
    fused_bias = (
        (torch.zeros_like(factor) if layer.bias is None else layer.bias) - norm.running_mean
    ) * factor + norm.bias
    if layer.bias is None:
        layer.register_parameter("bias", nn.Parameter(fused_bias))
    else:
        layer.bias.data = fused_bias
    return layer


@pytest.mark.parametrize("fuse", [absorb_directly, torch_fuse, scale_in_place, assign_data])
def test_batch_norm_is_absorbed_exactly(layer, fuse):
    x, norm = batch(layer), norm_of(layer)
    with torch.no_grad():
        expected, alone, static = normed(layer, norm, x), layer(x), layer.static_twin()
    if fuse is torch_fuse and isinstance(layer, FDLinear) and layer.bias is None:
        pytest.skip("torch's own needs a bias")
    fused = fuse(layer, norm)
    assert type(fused) is type(layer)
    with torch.no_grad():
        assert relative_error(fused(x), expected) < 1e-5
        assert relative_error(layer(x), alone) == 0
        fused_twin = fused.static_twin()
        assert relative_error(fused_twin(x), normed(static, norm, x)) < 1e-5

        again = pickle.loads(pickle.dumps(copy.deepcopy(fused)))
        assert torch.equal(again(x), fused(x))
        scripted = torch.jit.script(fused)
        assert relative_error(scripted(x), expected) < 1e-5


def test_batch_norm_is_absorbed_twice():
    layer, x = randomise(LAYERS["3x3"]()).eval(), torch.randn(3, 20, 9, 9)
    first, second = norm_of(layer), norm_of(layer)
    with torch.no_grad():
        expected = second(first(layer(x)))
        layer.absorb_batch_norm(first)
        layer.absorb_batch_norm(second)
        assert relative_error(layer(x), expected) < 1e-5


def test_a_state_dict_says_whether_batch_norm_was_absorbed(layer):
    plain = randomise(copy.deepcopy(layer))
    fused = absorb_directly(layer, norm_of(layer))
    x = batch(layer)
    assert set(fused.state_dict()) - set(layer.state_dict()) <= {"filter_scale", "bias"}
    if layer.bias is not None:
        with torch.no_grad():
            again = copy.deepcopy(plain)
            again.load_state_dict(fused.state_dict())
            assert torch.equal(again(x), fused(x))
            fused.load_state_dict(layer.state_dict())
            assert torch.equal(fused(x), layer(x))
    fused = absorb_directly(layer, norm_of(layer))
    static = fused.static_twin().state_dict()
    fused.load_state_dict(convert_static_state_dict(static, fused))
    assert relative_error(fused.static_weight(), static["weight"]) < 1e-6


def test_a_state_dict_of_an_absorbed_norm_passes_through(layer):
    plain, fused = randomise(copy.deepcopy(layer)), absorb_directly(layer, norm_of(layer))
    state = fused.state_dict()
    if layer.bias is None:
        with pytest.raises(ValueError, match="1 keys of the static state dict fit nothing in the model: bias"):
            convert_static_state_dict(state, plain)
        assert describe_misfits(state, plain).startswith("unexpected keys (1): bias. BatchNorm was absorbed")
        return
    for model in (plain, fused):
        assert describe_misfits(state, model) == describe_misfits(layer.state_dict(), model) == ""
        converted = convert_static_state_dict(state, model)
        assert converted.keys() == state.keys()
        model.load_state_dict(converted)
    x = batch(layer)
    assert torch.equal(plain(x), fused(x))


def test_a_state_dict_of_one_layer_twice_is_refused(layer):
    fused = absorb_directly(layer, norm_of(layer))
    state = fused.state_dict() | fused.static_twin().state_dict()
    with pytest.raises(ValueError, match=r"has weight, which is static, beside fdw.spectrum, filter_scale"):
        convert_static_state_dict(state, fused)


def test_a_static_weight_of_another_shape_and_a_bias_for_none_are_refused(layer):
    shape, bias = layer.static_shape, torch.zeros(layer.static_shape[0])
    for wrong in (torch.zeros(shape[1], shape[0] + 1, *shape[2:]), torch.zeros(*shape, 3)):
        with pytest.raises(ValueError, match="a static weight of shape"):
            layer.set_static(wrong, None if layer.bias is None else bias)
    with pytest.raises(ValueError, match=r"a bias that is (None|a tensor), but the layer has bias="):
        layer.set_static(torch.zeros(shape), bias if layer.bias is None else None)
    layer.set_static(torch.zeros(*shape, 1, 1)[..., 0], None if layer.bias is None else bias)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def test_a_parametrised_spectrum_is_not_set_in_vain():
    layer = randomise(FDConv2d(18, 20, 3, num_bands=4))
    parametrize.register_parametrization(layer.fdw, "spectrum", Twice())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    writes = [
        lambda: layer.set_static(torch.randn(20, 18, 3, 3), torch.randn(20)),
        lambda: nn.init.zeros_(layer.weight),
    ]
    for write in writes:
        with pytest.raises(ValueError, match="spectrum is made by a parametrization"):
            write()
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_fused_layer_trains():
    layer = absorb_directly(randomise(LAYERS["3x3"]()).eval(), norm_of(LAYERS["3x3"]()))
    layer(torch.randn(3, 20, 9, 9)).square().mean().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_norm_that_cannot_be_absorbed_is_named():
    layer = LAYERS["3x3"]()
    for norm in (nn.BatchNorm2d(24), nn.BatchNorm2d(24, track_running_stats=False).eval(), nn.BatchNorm2d(20).eval()):
        with pytest.raises(ValueError, match="must be in eval mode, with statistics of 24 channels"):
            layer.absorb_batch_norm(norm)


# --- what would make a static layer


def copied(layer):
    nn.Conv2d(20, 24, 3).weight.data.copy_(layer.weight)


def rescaled_copy(layer):
    nn.Conv2d(20, 24, 3).weight.copy_(layer.weight * torch.rand(24, 1, 1, 1))


def state_of_another(layer):
    nn.Conv2d(20, 24, 3, bias=False).load_state_dict({"weight": layer.weight})


def data_of_another(layer):
    conv = nn.Conv2d(20, 24, 3)
    conv.weight.data = layer.weight.data
    conv(torch.randn(1, 20, 5, 5))


def parameter_of_another(layer):
    conv = nn.Conv2d(20, 24, 3)
    conv.weight = nn.Parameter(layer.weight.detach().clone())
    conv(torch.randn(1, 20, 5, 5))


WRONG = {
    "copied": copied,
    "scaled and copied": rescaled_copy,
    "state dict": state_of_another,
    "data": data_of_another,
    "parameter": parameter_of_another,
    "convolution": lambda layer: nn.functional.conv2d(torch.randn(1, 20, 5, 5), layer.weight),
    "branches summed": lambda layer: layer.weight + torch.zeros(24, 20, 3, 3),
    "two layers": lambda layer: layer.weight + layer.weight,
    "stacked": lambda layer: torch.cat([layer.weight, torch.zeros(1, 20, 3, 3)]),
    "input channels scaled": lambda layer: layer.weight * torch.rand(1, 20, 1, 1),
    "masked": lambda layer: layer.weight.mul_(torch.rand(24, 20, 3, 3)),
    "matrix": lambda layer: torch.rand(24, 24) @ layer.weight.view(24, -1),
    "overwritten": lambda layer: layer.weight.copy_(torch.zeros(24, 20, 3, 3)),
    "added to": lambda layer: layer.weight.add_(torch.zeros(24, 20, 3, 3)),
    "item": lambda layer: layer.weight.__setitem__(0, torch.zeros(20, 3, 3)),
    "assigned": lambda layer: setattr(layer, "weight", nn.Parameter(torch.zeros(24, 20, 3, 3))),
    "assigned what is not filters scaled": lambda layer: setattr(layer, "weight", layer.weight.abs()),
    "assigned another's": lambda layer: setattr(layer, "weight", LAYERS["3x3"]().weight),
    "data set": lambda layer: setattr(layer.weight, "data", torch.zeros(24, 20, 3, 3)),
    "gradient set": lambda layer: setattr(layer.weight, "grad", torch.zeros(24, 20, 3, 3)),
}


# What torch would write through to the weight; here it would be lost.
LOST = {
    "filter": lambda layer: layer.weight[0].zero_(),
    "filters in turn": lambda layer: [nn.init.zeros_(one) for one in layer.weight.data],
    "input channel": lambda layer: layer.weight[:, 0].mul_(2),
    "item of a part": lambda layer: layer.weight[0].__setitem__(0, 1.0),
    "part of a part": lambda layer: layer.weight.chunk(2)[0].detach()[0].view(-1).zero_(),
    "reordered": lambda layer: layer.weight.transpose(0, 1).zero_(),
    "position": lambda layer: layer.weight[0, 0, 1, 1].fill_(1),
    "row of a matrix": lambda layer: layer.weight.flatten(1)[0].zero_(),
    "initialised in part": lambda layer: nn.init.constant_(layer.weight[:4], 0.0),
    "output": lambda layer: torch.zeros(24, 20, 3, 3, out=layer.weight),
}


@pytest.mark.parametrize("write", LOST.values(), ids=LOST.keys())
def test_what_would_be_written_nowhere_is_refused(write):
    layer = randomise(LAYERS["3x3"]())
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"set_static\(weight, bias\)"):
        write(layer)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_numbers_to_look_at_are_numbers(layer):
    weight, static = layer.weight, layer.static_weight()
    corner = (0,) * (weight.dim() - 1)
    assert torch.equal(weight[corner] + torch.ones(static.shape[-1]), static[corner] + 1)
    weight.flatten()[:5].pow(2).sum().backward()
    assert layer.fdw.spectrum.grad.norm() > 0
    array = weight.detach().numpy()
    assert torch.equal(torch.tensor(array), static)
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0
    copied = weight[0].clone()
    assert not copied.zero_().any()


def test_a_penalty_under_torch_func(layer):
    parameters = dict(layer.named_parameters())

    def penalty(parameters):
        with torch.nn.utils.stateless._reparametrize_module(layer, parameters):
            return layer.weight.abs().pow(3).sum()

    (expected,) = torch.autograd.grad(layer.static_weight().abs().pow(3).sum(), [layer.fdw.spectrum])
    assert relative_error(torch.func.grad(penalty)(parameters)["fdw.spectrum"], expected) < 1e-6


@pytest.mark.parametrize("use", WRONG.values(), ids=WRONG.keys())
def test_what_would_drop_fdconv_is_refused(use):
    layer = randomise(LAYERS["3x3"]())
    state = copy.deepcopy(layer.state_dict())
    with torch.no_grad(), pytest.raises(RuntimeError):
        use(layer)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_a_refusal_says_what_to_call():
    layer = LAYERS["3x3"]()
    with pytest.raises(RuntimeError, match=r"absorb_batch_norm\(norm\).*static_twin\(\).*set_static\(weight, bias\)"):
        nn.functional.conv2d(torch.randn(1, 20, 5, 5), layer.weight)
    with pytest.raises(RuntimeError, match=r"set_static\(weight, bias\)"):
        layer.weight = nn.Parameter(torch.zeros(24, 20, 3, 3))


def test_a_transformer_layer_takes_no_fast_path_around_fdconv():
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0).eval()
    block.linear1, block.linear2 = (FDLinear.from_linear(x, num_bands=8) for x in (block.linear1, block.linear2))
    randomise(block)
    x = torch.randn(2, 6, 32)
    with torch.no_grad():
        fast = block(x)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert relative_error(block(x), fast) < 1e-5
        finally:
            torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("part", ["ksm.heads", "ksm.local_conv", "fbm"])
def test_pruned_gates_are_not_reset_in_vain(part):
    """What is computed from another parameter would be made anew in the next pass."""
    layer = randomise(FDConv2d(18, 20, 3))
    prune.l1_unstructured(layer.get_submodule(part), "weight", 0.3)
    with pytest.raises(ValueError, match=f"{part}.weight is made by a parametrization"):
        layer.reset_modulation()
    with pytest.raises(ValueError, match=f"{part}.weight is made by a parametrization"):
        layer.set_static(torch.randn(20, 18, 3, 3), torch.randn(20))
    prune.remove(layer.get_submodule(part), "weight")
    layer.reset_modulation()
    x = torch.randn(2, 18, 5, 5)
    torch.testing.assert_close(layer(x), layer.static_twin()(x), rtol=0, atol=1e-5)


def test_gates_of_wrapped_parts_are_reset():
    layer = randomise(FDConv2d(18, 20, 3))
    layer.ksm = torch.compile(layer.ksm, backend="eager")
    layer.reset_modulation()
    assert not layer.ksm.heads.weight.any()
