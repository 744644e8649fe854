"""Run by torchrun: two processes that shard a model by FSDP2 learn what one does, and save what it saves."""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import fdconv_zoo  # noqa: F401, registers the models
from tests.compare import relative_error
from tests.models.stirring import stir

NARROW = dict(depths=(1, 1, 1, 1), dims=(24, 32, 40, 48), num_classes=7)


def losses(model, images, labels, steps=3):
    """Of a few updates of plain SGD, which makes no large step of a gradient that is nearly zero, in float32."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = []
    for _ in range(steps):
        loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found)


def check(policy, tolerance):
    torch.manual_seed(0)
    # In eval mode: the statistics of a batch in two parts are two.
    model = stir(timm.create_model("convnext_atto_fdconv", **NARROW)).eval()
    lone = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for part in (*model.stages, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    expected = losses(lone, images, labels)
    own = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    found = losses(model, images[own], labels[own])
    dist.all_reduce(found)
    assert expected[-1] < 0.95 * expected[0], expected
    assert relative_error(found / 2, expected) < tolerance, (found / 2, expected)
    saved = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        wanted = lone.state_dict()
        assert saved.keys() == wanted.keys()
        for name, tensor in saved.items():
            if tensor.is_floating_point():
                assert relative_error(tensor, wanted[name]) < 10 * tolerance, name


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    check(MixedPrecisionPolicy(), 1e-5)
    check(MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32), 1e-2)
    print("same losses and weights")
    dist.destroy_process_group()
