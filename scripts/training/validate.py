"""Validation between epochs."""

from typing import Any

import torch
import torch.distributed as dist
from timm.task import evaluation_sample_limit
from timm.utils import distribute_bn
from torch.nn.parallel import DistributedDataParallel

from common.loop import Trainer


@torch.no_grad()
def evaluate(trainer: Trainer, loader: Any, ema: bool = False) -> dict[str, float]:
    """Loss, and top-1 and top-5 accuracy in percent, over the validation images of all processes.

    Args:
        trainer: Its task's model is put in eval mode.
        loader: Batches of images (B, C, H, W) and labels (B,) of this process.
        ema: Evaluate the averaged weights.
    """
    model = trainer.task.get_eval_model(ema=ema)
    if dist.is_initialized():
        # From the first process: its batch statistics are those that DDP and the checkpoint keep.
        distribute_bn(model, dist.get_world_size(), reduce=False)
    if isinstance(model, DistributedDataParallel):
        model = model.module  # streams give processes different numbers of batches, which DDP would wait for
    evaluator = trainer.task.create_evaluator(max_samples=evaluation_sample_limit(loader))
    trainer.evaluate(model, loader, evaluator)
    return dict(evaluator.compute(distributed=dist.is_initialized()))
