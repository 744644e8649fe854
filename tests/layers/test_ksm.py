import copy
import warnings
from functools import partial

import pytest
import timm
import torch
from timm.layers import GroupNorm1, freeze_batch_norm_2d
from timm.models.metaformer import StarReLU
from torch import nn

from fdconv_zoo import FDConv2d, FDConv3d, FDLinear
from fdconv_zoo.layers import ksm as ksm_module
from fdconv_zoo.layers.dynamic import KWConv2d, ODConv2d
from fdconv_zoo.layers.ksm import KSM, local_kernel_size
from fdconv_zoo.layers.ops import literal
from tests.compare import randomise, relative_error

# Cin, Cout, (kh, kw), num_bands, reduction
CONFIGS = [
    (6, 5, (3, 3), 7, 1 / 16),
    (5, 8, (1, 1), 4, 1 / 16),
    (9, 4, (1, 3), 3, 1 / 16),
    (4, 9, (3, 1), 1, 1 / 16),
    (72, 3, (2, 2), 5, 1 / 4),
]


def made(gates):
    """The gates of the global branch that a layer has."""
    found = (gates.bands, gates.channels, gates.filters, gates.positions)
    return [gate for gate in found if gate is not None]


@pytest.mark.parametrize(
    ("in_channels", "taps"), [(1, 1), (8, 3), (16, 3), (32, 3), (64, 5), (96, 5), (512, 5), (1024, 7), (2048, 7)]
)
def test_taps_of_the_local_branch(in_channels, taps):
    assert local_kernel_size(in_channels) == taps


@pytest.mark.parametrize(("in_channels", "reduction", "hidden"), [(64, 1 / 16, 16), (512, 1 / 16, 32), (70, 1 / 2, 35)])
def test_hidden_channels_are_at_least_16(in_channels, reduction, hidden):
    ksm = KSM(in_channels, 20, (1, 1), 8, reduction)
    assert ksm.fc.weight.shape == (hidden, in_channels)
    assert ksm.fc.bias is None


@pytest.mark.parametrize(("in_channels", "out_channels", "kernel", "num_bands", "reduction"), CONFIGS)
def test_local_logits_are_a_convolution_along_the_channels(in_channels, out_channels, kernel, num_bands, reduction):
    ksm = randomise(KSM(in_channels, out_channels, kernel, num_bands, reduction, dtype=torch.float64))
    pooled = torch.randn(3, in_channels, dtype=torch.float64)
    gate = ksm.dense_gate(ksm(pooled))
    shape = (out_channels, in_channels, *kernel)
    state = {f"ksm.{key}": value for key, value in ksm.state_dict().items()}
    for b in range(3):
        assert relative_error(gate[b], literal.matrix_of(literal.dense_gate(state, pooled[b], shape))) < 1e-14


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("in_channels", "out_channels", "kernel", "num_bands", "reduction"), CONFIGS)
def test_gates_match_the_reference(in_channels, out_channels, kernel, num_bands, reduction, training):
    ksm = randomise(KSM(in_channels, out_channels, kernel, num_bands, reduction, dtype=torch.float64)).train(training)
    pooled = torch.randn(4, in_channels, dtype=torch.float64)
    state = {f"ksm.{key}": value.clone() for key, value in ksm.state_dict().items()}
    sizes = literal.gate_sizes(num_bands, (out_channels, in_channels, *kernel), ksm=True)
    gates = ksm(pooled)
    assert [gate.shape for gate in made(gates)] == [(4, size) for size in sizes]
    expected = zip(*literal.ksm_gates(state, pooled, sizes, training), strict=True)
    for got, wanted in zip(made(gates), expected, strict=True):
        assert relative_error(got, torch.stack(wanted)) < 1e-13
    assert gates.local_input.shape == pooled.shape
    if training:
        hidden = pooled @ ksm.fc.weight.T
        expected = 0.9 * state["ksm.norm.running_mean"] + 0.1 * hidden.mean(0)
        assert relative_error(ksm.norm.running_mean, expected) < 1e-13


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_gate_starts_at_exactly_one(kernel, dtype):
    ksm = KSM(24, 32, kernel, 8, dtype=dtype)
    gates = ksm(100 * torch.randn(5, 24))
    assert len(made(gates)) == (4 if kernel == (3, 3) else 3)
    assert all(torch.equal(gate, torch.ones_like(gate)) for gate in (*made(gates), ksm.dense_gate(gates)))
    randomise(ksm).reset_parameters()
    assert all(torch.equal(gate, torch.ones_like(gate)) for gate in made(ksm(torch.randn(5, 24))))


def test_hidden_layer_starts_random_so_that_the_heads_get_gradients():
    ksm = KSM(24, 32, (3, 3), 8)
    gates = ksm(torch.randn(5, 24))
    sum((gate * torch.randn_like(gate)).sum() for gate in made(gates)).backward()
    assert ksm.heads.weight.grad.abs().amax(1).min() > 0


def test_only_the_bands_are_gated_without_weight_modulation():
    ksm = KSM(24, 32, (3, 3), 8, modulate_weight=False)
    gates = ksm(torch.randn(5, 24))
    assert [gate.shape for gate in made(gates)] == [(5, 8)]
    assert gates.local_input is None
    assert ksm.dense_gate(gates) is None
    assert not any(key.startswith("local") for key in ksm.state_dict())


@pytest.fixture
def warned():
    """Warnings about a single sample, which come once a process."""
    ksm_module._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield lambda: [str(warning.message) for warning in caught if "batch of one" in str(warning.message)]
    ksm_module._warn_once.cache_clear()


def test_a_batch_of_one_in_training_takes_the_running_statistics(warned):
    ksm = randomise(KSM(24, 32, (3, 3), 8, dtype=torch.float64))
    before = {key: value.clone() for key, value in ksm.state_dict().items()}
    pooled = torch.randn(1, 24, dtype=torch.float64)
    state = {f"ksm.{key}": value for key, value in before.items()}
    sizes = literal.gate_sizes(8, (32, 24, 3, 3), ksm=True)
    gates = ksm(pooled)
    for got, wanted in zip(made(gates), literal.ksm_gates(state, pooled, sizes, training=False)[0], strict=True):
        assert relative_error(got[0], wanted) < 1e-13
    sum(gate.square().sum() for gate in made(gates)).backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (ksm.fc.weight, ksm.norm.weight, ksm.norm.bias))
    assert ksm.norm.training
    assert all(torch.equal(value, before[key]) for key, value in ksm.state_dict().items())
    assert len(warned()) == 1


def test_the_warning_comes_once_and_names_the_ways_out(warned):
    layers = [FDConv2d(20, 24, 3), FDLinear(20, 24)]
    for _ in range(2):
        layers[0](torch.randn(1, 20, 5, 5))
        layers[1](torch.randn(1, 7, 20))
    (message,) = warned()
    assert "norm_layer=functools.partial(nn.GroupNorm, 1)" in message
    assert "drop_last=True" in message


@pytest.mark.parametrize(
    "quiet",
    [
        lambda: KSM(24, 32, (3, 3), 8).eval(),
        lambda: freeze_batch_norm_2d(KSM(24, 32, (3, 3), 8)),
        lambda: KSM(24, 32, (3, 3), 8, norm_layer=partial(nn.GroupNorm, 1)),
    ],
    ids=["eval", "frozen", "GroupNorm"],
)
def test_without_a_batch_norm_that_trains_there_is_no_warning(quiet, warned):
    quiet()(torch.randn(1, 24))
    assert not warned()


def test_larger_batches_have_statistics_of_their_own(warned):
    ksm, static = KSM(24, 32, (3, 3), 8), nn.BatchNorm2d(16)
    for batch in (1, 2, 5):
        pooled = torch.randn(batch, 24)
        ksm(pooled)
        if batch > 1:
            static(ksm.fc(pooled)[:, :, None, None])
        assert torch.equal(ksm.norm.running_mean, static.running_mean)
        assert torch.equal(ksm.norm.running_var, static.running_var)
        assert ksm.norm.num_batches_tracked == static.num_batches_tracked


@pytest.mark.parametrize("norm_layer", [nn.BatchNorm2d, nn.SyncBatchNorm, partial(nn.BatchNorm2d, affine=False)])
def test_batch_norms_of_every_kind(norm_layer, warned):
    ksm = KSM(24, 32, (3, 3), 8, norm_layer=norm_layer)
    nn.init.normal_(ksm.heads.weight)
    pooled = torch.randn(1, 24)
    trained = ksm(pooled)
    assert all(torch.equal(a, b) for a, b in zip(made(trained), made(ksm.eval()(pooled)), strict=True))
    assert warned()


def test_a_batch_of_one_under_the_compiler(warned):
    torch.compiler.reset()
    layer, x = randomise(FDConv2d(20, 24, 3, num_bands=8)), torch.randn(3, 20, 5, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    expected = copy.deepcopy(layer).eval()(x[:1])
    assert relative_error(compiled(x[:1]), expected) < 1e-6
    assert layer.ksm.norm.num_batches_tracked == 0
    assert relative_error(compiled(x), copy.deepcopy(layer)(x)) < 1e-6
    assert len(warned()) == 1


def test_other_norm_and_activation():
    ksm = KSM(24, 32, (1, 1), 8, norm_layer=nn.Identity, act_layer=nn.GELU, dtype=torch.float64)
    randomise(ksm)
    pooled = torch.randn(3, 24, dtype=torch.float64)
    expected = 2 * torch.sigmoid(ksm.heads(nn.functional.gelu(pooled @ ksm.fc.weight.T)))
    assert relative_error(torch.cat(made(ksm(pooled)), 1).detach(), expected.detach()) < 1e-14


@pytest.mark.parametrize("values", [(1.0, 0.0), (0.8944, -0.4472)])
def test_the_activation_starts_again_as_it_was_made(values):
    """timm's StarReLU has two parameters and no way to reset them: at a scale of 0 no gate depends on the image."""
    ksm = KSM(18, 20, (3, 3), num_bands=4, act_layer=partial(StarReLU, scale_value=values[0], bias_value=values[1]))
    assert (ksm.act.scale.item(), ksm.act.bias.item()) == pytest.approx(values)
    for parameter in ksm.parameters():
        nn.init.zeros_(parameter)
    ksm.reset_parameters()
    assert (ksm.act.scale.item(), ksm.act.bias.item()) == pytest.approx(values)


def test_nothing_is_left_unset_off_the_meta_device():
    layer = FDConv2d(18, 20, 3, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*layer.parameters(), *layer.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))
    layer.reset_parameters()
    assert all(bool(parameter.isfinite().all()) for parameter in layer.parameters())
    assert layer(torch.randn(2, 18, 5, 5)).isfinite().all()


@pytest.mark.parametrize("make", [FDConv2d, FDConv3d, FDLinear, ODConv2d, KWConv2d])
def test_norms_by_timm_s_names(make):
    options = {"norm_layer": "groupnorm1"} | ({"act_layer": "gelu"} if make.__name__.startswith("FD") else {})
    layer = make(24, 32, **options) if make is FDLinear else make(24, 32, 1, **options)
    kinds = {type(module) for module in layer.modules()}
    assert GroupNorm1 in kinds and (len(options) == 1 or any("GELU" in kind.__name__ for kind in kinds))
    for option in options:
        for name in ("grupnorm", ""):
            with pytest.raises(ValueError, match=f"{option}='{name}', but timm has none"):
                make(*(24, 32) if make is FDLinear else (24, 32, 1), **{option: name})


def test_a_model_s_options_by_timm_s_names():
    kwargs = dict(layers=(1, 1, 1, 1), channels=(20, 24, 32, 40), ksm_act_layer="silu", ksm_norm_layer="groupnorm1")
    model = timm.create_model("resnet18_fdconv", **kwargs)
    assert type(model.layer1[0].conv1.ksm.norm) is GroupNorm1
    assert "silu" in type(model.layer1[0].conv1.ksm.act).__name__.lower()
    with pytest.raises(ValueError, match="act_layer='sillu'"):
        timm.create_model("resnet18_fdconv", ksm_act_layer="sillu")
