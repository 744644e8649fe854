"""Every way of computing a layer: chunks, blocks, banks, recomputed weights, frozen parts."""

import gc
from functools import partial

import pytest
import torch

from fdconv_zoo import FDConv2d
from fdconv_zoo.layers.ops.eager import conv, limits
from tests.compare import assert_matches, relative_error
from tests.layers.fdconv_configs import CONFIGS, layer_and_input, on_grid, reference_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def set_limits(monkeypatch, **changed):
    monkeypatch.setattr(limits, "CPU", limits.CPU._replace(**changed))


@pytest.mark.parametrize("name", ["3x3", "3x3 of a large map", "1x1", "more samples than groups, large map"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 4])
def test_chunks_change_nothing(name, recompute, samples, monkeypatch):
    config = (*CONFIGS[name][:4], (5, *CONFIGS[name][4][1:]))
    layer, x = layer_and_input(config, recompute=recompute)
    set_limits(monkeypatch, chunk=samples * layer.fdw.rows * layer.fdw.columns)
    assert_matches(layer.eval(), x, reference_of(layer, config), tol=1e-11)


@pytest.mark.parametrize("elements", [1, 150, 400])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3 odd channels, uneven groups", "1x1 of a large map", "more samples than groups"])
def test_blocks_change_nothing(name, recompute, elements, monkeypatch):
    set_limits(monkeypatch, block=elements)
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    assert_matches(layer.eval(), x, reference_of(layer, CONFIGS[name]), tol=1e-11)


@pytest.mark.parametrize("elements", [1, 150, 400])
@pytest.mark.parametrize("ksm", [False, True])
def test_blocks_change_nothing_for_one_sample_and_without_gates(ksm, elements, monkeypatch):
    set_limits(monkeypatch, block=elements)
    layer, x = layer_and_input(CONFIGS["3x3"], ksm=ksm)
    run = partial(reference_of(layer.eval(), CONFIGS["3x3"]), ksm=ksm)
    assert_matches(layer, x[:1], run, tol=1e-11)
    assert_matches(layer, x, run, tol=1e-11)


@pytest.mark.parametrize(
    "changed",
    [
        {"places": 0},
        {"places": 1 << 30},
        {"bank": 0},
        {"packed": 0},
        limits.OTHER._asdict(),
        {"matrix": 0},
    ],
    ids=str,
)
@on_grid
def test_each_way_to_make_and_to_apply_the_weights(config, changed, monkeypatch):
    set_limits(monkeypatch, **changed)
    layer, x = layer_and_input(config)
    assert_matches(layer.eval(), x, reference_of(layer, config), tol=1e-11)
    assert_matches(layer, x.contiguous(memory_format=torch.channels_last), reference_of(layer, config), 1e-11)


@on_grid
def test_recomputing_changes_nothing(config):
    layer, x = layer_and_input(config)
    results = []
    for recompute in (False, True):
        layer.recompute = recompute
        out = layer(x.requires_grad_())
        grads = torch.autograd.grad(out.sin().sum(), [x, *layer.parameters()])
        results.append([out.detach(), *grads])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*results, strict=True))


def test_recomputing_leaves_frozen_parameters_alone():
    layer, x = layer_and_input(CONFIGS["3x3"])
    for frozen in (layer.fdw.spectrum, layer.fbm.weight, layer.ksm.local_conv.weight):
        frozen.requires_grad_(False)
    layer(x).sum().backward()
    given = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert given == {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    layer.requires_grad_(False)
    assert not layer(x).requires_grad


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3", "3x3 of a large map", "1x1", "more samples than groups", "no ksm"])
def test_parameters_get_the_same_gradients_where_the_input_needs_none(name, recompute):
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    parameters = list(layer.parameters())
    expected = torch.autograd.grad(layer(x.requires_grad_()).sin().sum(), parameters)
    got = torch.autograd.grad(layer(x.detach()).sin().sum(), parameters)
    assert all(relative_error(a, b) < 1e-13 for a, b in zip(got, expected, strict=True))
    layer.requires_grad_(False)
    only_input = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    layer.requires_grad_(True)
    assert relative_error(only_input, torch.autograd.grad(layer(x).sin().sum(), x)[0]) < 1e-13


def test_recomputing_keeps_less_for_the_backward_pass():
    weights = 4 * 24 * 32 * 9
    largest = {}
    for recompute in (False, True):
        # Held, so that no address is used again: what tests before this one left alive is not the layer's.
        earlier = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        addresses = {id(thing) for thing in earlier}
        layer = FDConv2d(24, 32, 3, padding=1, recompute=recompute)
        x = torch.randn(4, 24, 8, 8, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            out = layer(x)
        # Functions with a backward pass of their own keep tensors on their context too.
        alive = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and id(thing) not in addresses]
        kept += [thing.numel() for thing in alive]
        largest[recompute] = max(kept)
        del out, alive, earlier
    assert largest[True] < weights <= largest[False]


@pytest.mark.parametrize("frozen", [False, True])
def test_weights_are_kept_only_for_a_backward_pass(frozen, monkeypatch):
    layer, x = layer_and_input(CONFIGS["3x3"], recompute=False)
    layer.requires_grad_(not frozen)
    kept, forward = [], conv.forward

    def look(*args):
        result = forward(*args)
        kept.append(result[1] is not None)
        return result

    monkeypatch.setattr(conv, "forward", look)
    layer.eval()(x)
    with torch.no_grad():
        layer(x)
    assert kept == [not frozen, False]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3", "1x1", "more samples than groups, large map"])
def test_the_graph_can_be_walked_twice(name, recompute):
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    inputs = [x.requires_grad_(), *layer.parameters()]
    out = layer(x).sin().sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    again = torch.autograd.grad(out, inputs)
    assert all(relative_error(a, b) < 1e-14 for a, b in zip(again, first, strict=True))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["3x3 without padding", "1x1", "one filter"])
def test_gradcheck(name, recompute):
    layer, x = layer_and_input(CONFIGS[name], recompute=recompute)
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *parameters):
        return torch.func.functional_call(layer.eval(), dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x[:, :, :4, :4].clone().requires_grad_(), *layer.parameters())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
