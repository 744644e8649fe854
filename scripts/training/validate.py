"""Validation between epochs."""

from typing import Any

import torch
import torch.distributed as dist
from timm.task import ClassificationTask, evaluation_sample_limit
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel


@torch.no_grad()
def evaluate(
    task: ClassificationTask,
    loader: Any,
    autocast: torch.autocast,
    memory_format: torch.memory_format,
    ema: bool = False,
) -> dict[str, float]:
    """Loss, and top-1 and top-5 accuracy in percent, over the validation images of all processes.

    Args:
        task: Task whose model is put in eval mode.
        loader: Batches of images (B, C, H, W) and labels (B,) of this process.
        autocast: Mixed precision of the forward pass, or disabled.
        memory_format: Layout of the images.
        ema: Evaluate the averaged weights.
    """
    model = task.get_eval_model(ema=ema)
    if dist.is_initialized():
        # From the first process: its batch statistics are those that DDP and the checkpoint keep.
        distribute_bn(model, dist.get_world_size(), reduce=False)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # streams give processes different numbers of batches, which DDP would wait for
    model.eval()
    evaluator = task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    for images, labels in loader:
        with autocast:
            output = model(images.contiguous(memory_format=memory_format))
        evaluator.update(output, labels)
    return dict(evaluator.compute(distributed=dist.is_initialized()))
