"""Run by torchrun: the averaged gradients of processes with an image each are those of one process with all images."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist

from fdconv_zoo.maskdino import MaskDinoLoss
from tests.maskdino_small import SELECTED, maps, objects, small

# terms that are compared at random points draw other ones in another batch
KINDS = ("loss_ce", "loss_bbox", "loss_giou")


def gradients(head, features, targets):
    head.zero_grad()
    terms = MaskDinoLoss(head.config)(head(features), targets)
    sum(term for name, term in terms.items() if name.startswith(KINDS)).backward()
    return {name: parameter.grad.clone() for name, parameter in head.named_parameters() if parameter.grad is not None}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # a matching that random points don't decide; biases before norms of one channel would have no gradient
    head = small(**SELECTED, mask_weight=0.0, dice_weight=0.0, hidden_dim=64)
    features, targets = maps(96, 96), objects([3, 0])
    expected = gradients(head, features, targets)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = gradients(head, [feature[rank : rank + 1] for feature in features], targets[rank : rank + 1])
    for name, gradient in found.items():
        dist.all_reduce(gradient)
        error = (gradient / 2 - expected[name]).norm() / expected[name].norm().clamp(min=1e-6)
        assert error < 1e-3, (name, error)
    assert found.keys() == expected.keys()
    print("same gradients")
    dist.destroy_process_group()
