"""Measures of a trained network: gates, and answers by batch statistics."""

import pytest
import torch
from finetune_net import SmallNet

from common.gates import move_gates
from experiments.finetune.measures import disagreement, gate_moves
from experiments.finetune.variants import make_variant

IMAGES = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def converted(**layer):
    return make_variant(SmallNet(), layer, fourier=False)


def test_gates_of_a_converted_network_are_at_one():
    found = gate_moves(converted(), IMAGES)
    assert found.keys() == {"bands", "channels", "filters", "positions", "dense"}
    assert {value for moves in found.values() for value in moves.values()} == {0.0}
    assert gate_moves(SmallNet(), IMAGES) == {}


def test_gates_that_moved_are_measured_over_layers_and_images():
    model = move_gates(converted(), seed=0)
    found = gate_moves(model, IMAGES)
    seen = []
    for name in (0, 2):
        layer = model.blocks[name]
        layer.ksm.register_forward_hook(lambda module, args, gates: seen.append(gates.channels))
    model(IMAGES)
    from_one = sum((gates - 1).abs().mean().item() for gates in seen) / 2
    assert found["channels"]["from_one"] == pytest.approx(from_one)
    assert found["channels"]["over_images"] == pytest.approx(sum(gates.std(0).mean().item() for gates in seen) / 2)
    assert 0 < found["channels"]["mean_from_one"] <= found["channels"]["from_one"]


def test_batch_statistics_change_answers_and_leave_the_network_as_it_was():
    model = move_gates(converted(), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = disagreement(model, [IMAGES, IMAGES.flip(0)])
    assert 0 < found["total_variation"] < 1 and 0 <= found["answers"] <= 1
    for key, value in model.state_dict().items():
        if "num_batches" not in key:
            torch.testing.assert_close(value, before[key], rtol=0, atol=0)
    assert model.blocks[0].ksm.norm.momentum == 0.1 and not model.blocks[0].ksm.norm.training


@pytest.mark.parametrize("norm", ["layer", "group", "calibrated"])
def test_other_norms_answer_alike(norm):
    found = disagreement(move_gates(converted(norm_layer=norm), seed=0), [IMAGES])
    assert found == {"total_variation": 0, "answers": 0}
