"""Whose the cells of a warehouse are: shared out below one, frozen or trained, on the device of the static weights."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fdconv_zoo import convert, convert_static_state_dict
from fdconv_zoo.layers.dynamic import KWConv2d, Warehouse
from tests.compare import relative_error


def chain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(20, 20, 3, padding=1), nn.ReLU(), nn.Conv2d(20, 20, 3, padding=1)).eval()


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_below_one_no_cell_is_two_layers(ratio):
    warehouse = Warehouse([(20, 20, 3, 3)] * 2, ratio)
    layers = [KWConv2d(20, 20, 3, warehouse=warehouse) for _ in range(2)]
    owned = [set(layer.attention.column_list) - {warehouse.num_cells} for layer in layers]
    assert sorted([*owned[0], *owned[1]]) == list(range(warehouse.num_cells))
    for layer, own in zip(layers, owned, strict=True):
        first = layer.attention.start
        assert own == set(range(first, first + layer.attention.own))
    assert layers[0].cells.flatten(1).norm(dim=1).min() > 0
    before = layers[0].cells.detach().clone()
    layers[1].reset_parameters()
    assert set((layers[0].cells != before).flatten(1).any(1).nonzero().flatten().tolist()) == owned[1]


def test_an_average_of_the_buffers_leaves_the_columns():
    model = convert(chain(), "kw")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9999), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    x = torch.randn(2, 20, 8, 8)
    assert relative_error(average.eval()(x), model.eval()(x)) < 1e-5
    with torch.inference_mode():
        made_there = convert(chain(), "kw")
    made_there.train().eval()
    with torch.inference_mode():
        assert relative_error(made_there(x), model(x)) < 1e-5


def test_cells_that_do_not_suffice_or_are_left_over_are_refused():
    with pytest.raises(ValueError, match="5 cells, of which the layers' mixtures start from 5 of 9, 0 of 1"):
        Warehouse([(20, 20, 3, 3), (20, 20, 1, 1)], 0.5)
    with pytest.raises(ValueError, match="3 cells, of which the layers' mixtures start from 1 of 3, 1 of 3"):
        Warehouse([(20, 20, 3, 1)] * 2, 0.5)


def test_frozen_and_trained_layers_share_no_cells():
    for frozen, message in ((0, "^2: its static weight is trained, but .* is frozen"), (2, "^2: .* weight is frozen")):
        net = chain()
        net[frozen].weight.requires_grad_(False)
        with pytest.raises(ValueError, match=message):
            convert(net, "kw")
        assert type(net[0]) is type(net[2]) is nn.Conv2d
        alone = convert(net, "kw", str(2 - frozen))
        assert alone[2 - frozen].cells.requires_grad and not alone[frozen].weight.requires_grad
    assert not convert(chain().requires_grad_(False), "kw")[0].cells.requires_grad


@pytest.mark.parametrize("ratio", [1, 2])
def test_cells_are_made_where_the_static_weights_are(ratio):
    static, x = chain(), torch.randn(2, 20, 6, 6)
    with torch.device("meta"):
        model = convert(chain(), "kw", cell_num_ratio=ratio)
    state = convert_static_state_dict(static.state_dict(), model)
    cells = state["0.cells"]
    assert not cells.is_meta and cells.flatten(1).norm(dim=1).min() > 0
    other = convert(chain(), "kw", cell_num_ratio=ratio)
    other.load_state_dict({**other.state_dict(), "0.cells": cells})
    assert relative_error(other.eval()(x), static(x)) < 1e-5
    with torch.device("meta"):
        weights = chain().state_dict()
    assert convert_static_state_dict(weights, other)["0.cells"].is_meta
