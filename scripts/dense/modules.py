"""Lightning modules: what a training and a validation step are for detection and for semantic segmentation."""

import argparse
import math
from itertools import chain, zip_longest
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from timm.utils import random_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision

from common.optim import COUNTERS
from dense.args import MASK_HEADS
from dense.coco import Target
from dense.models import predict_classes
from dense.optim import create_optimizer, rate_factor
from dense.resume import order_of


def gather_images(metric: MeanAveragePrecision, rank: int, world_size: int) -> None:
    """Give a process's metric the images of all, in the order that one process would have.

    torchmetrics' own way waits for ever where processes have different numbers of images.

    Args:
        metric: It has image ``rank``, ``rank + world_size``, and so on.
        rank: Of this process.
        world_size: Number of processes.
    """
    states: list[Any] = [None] * world_size
    dist.all_gather_object(states, metric.metric_state)
    nothing = object()
    for name in states[rank]:
        images = chain.from_iterable(zip_longest(*(state[name] for state in states), fillvalue=nothing))
        setattr(metric, name, [image for image in images if image is not nothing])


class DenseModule(L.LightningModule):
    """What all tasks share: optimiser, schedule, random numbers of an update, and one score for all processes.

    Args:
        model: Backbone and head.
        backbone: The backbone in it.
        args: Arguments of train_dense.py.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.args = model, args
        self.backbone_parts = [backbone]  # in a list, so that it is not registered twice
        self.loss_sums: dict[str, Tensor | float] = {}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        images = self.args.batch_size * self.args.grad_accum_steps * self.trainer.world_size
        optimizer = create_optimizer(self.model, self.backbone_parts[0], self.args, images)
        self.trainer.fit_loop.setup_data()  # or an epoch of a run of --steps has no length yet
        total = self.args.steps or int(self.trainer.estimated_stepping_batches)
        per_epoch = math.ceil(self.trainer.num_training_batches / self.args.grad_accum_steps)
        schedule = LambdaLR(optimizer, rate_factor(self.args, total, per_epoch))
        self.options = [
            {key: value for key, value in group.items() if key not in ("params", "lr", *COUNTERS)}
            for group in optimizer.param_groups
        ]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """The options of now hold, such as another rate: a resumed run has those of its checkpoint until here."""
        schedule = self.lr_schedulers()
        groups = schedule.optimizer.param_groups
        schedule.base_lrs = [options["initial_lr"] for options in self.options]
        for group, options, factor in zip(groups, self.options, schedule.lr_lambdas, strict=True):
            group.update(options, lr=options["initial_lr"] * factor(schedule.last_epoch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["order"] = order_of(self.args)

    def passes_of_update(self, batch_index: int) -> int:
        """Passes of the update that a batch belongs to: an epoch's last one may have fewer."""
        wanted = self.args.grad_accum_steps
        return min(wanted, self.trainer.num_training_batches - batch_index // wanted * wanted)

    def share_of_update(self, batch_index: int) -> float:
        """What a batch's loss counts in its update, whose sum Lightning divides by the full number of passes."""
        return self.args.grad_accum_steps / self.passes_of_update(batch_index)

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        # a resumed run draws what the uninterrupted one did
        entropy = (self.args.seed, self.trainer.global_step, batch_index, self.global_rank)
        random_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))

    def on_validation_epoch_start(self) -> None:
        # each process has batch norm statistics of its own since the last update; the first one's are saved
        if self.trainer.world_size > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def log_losses(self, losses: dict[str, Tensor], batch_index: int) -> None:
        """Log the losses of an update: means over its passes and over all processes.

        Args:
            losses: Of one pass, by name; the same names in each.
            batch_index: Number of the pass in its epoch.
        """
        number, passes = batch_index % self.args.grad_accum_steps, self.passes_of_update(batch_index)
        if number == 0:
            self.loss_sums = dict.fromkeys(losses, 0.0)
        for name, value in losses.items():
            self.loss_sums[name] += value.detach().float() / passes
        if number + 1 < passes:
            return
        means = torch.stack([*self.loss_sums.values()])
        if self.trainer.world_size > 1:
            # In place of Lightning's sync_dist, which waits for all processes, and GPUs, once for each name.
            dist.all_reduce(means)
            means /= self.trainer.world_size
        for name, mean in zip(self.loss_sums, means.unbind(), strict=True):
            self.log(f"train/{name}", mean, prog_bar=name == "loss")

    def log_score(self, name: str, value: Tensor, prog_bar: bool) -> None:
        """Log a score that all processes have computed alike."""
        # torchmetrics' mAP lies on the CPU, where Lightning would reduce it, and NCCL can't
        self.log(f"val/{name}", value.to(self.device), prog_bar=prog_bar, sync_dist=True, reduce_fx="max")


class DetectionModule(DenseModule):
    """Detectors called as torchvision's are: their own losses, mAP as COCO defines it.

    Args:
        model: Backbone and head.
        backbone: The backbone in it.
        args: Arguments of train_dense.py.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, args: argparse.Namespace) -> None:
        super().__init__(model, backbone, args)
        self.kinds = ("bbox", "segm") if args.head in MASK_HEADS else ("bbox",)
        # COCO's in double precision: torchmetrics' own float32 ones fall beside some recalls.
        self.average_precision = MeanAveragePrecision(
            iou_type=self.kinds,
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            sync_on_compute=False,
        )

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_index: int) -> Tensor:
        losses = self.model(*batch)
        total = sum(losses.values())
        self.log_losses({**losses, "loss": total}, batch_index)
        return total * self.share_of_update(batch_index)

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_index: int) -> None:
        images, targets = batch
        found = self.model(images)
        for result in found:
            if "masks" in result:
                result["masks"] = result["masks"][:, 0] > 0.5
        # on the CPU, where COCO's evaluation is done and where processes exchange objects
        on_cpu = [[{name: value.cpu() for name, value in image.items()} for image in part] for part in (found, targets)]
        self.average_precision.update(*on_cpu)

    def on_validation_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            gather_images(self.average_precision, self.global_rank, self.trainer.world_size)
        scores = self.average_precision.compute()
        self.average_precision.reset()
        for kind in self.kinds:
            prefix = f"{kind}_" if len(self.kinds) > 1 else ""
            title = "mask" if kind == "segm" else "box"
            for key, name in (("map", "mAP"), ("map_50", "mAP50"), ("map_75", "mAP75")):
                self.log_score(f"{title}_{name}", scores[prefix + key], prog_bar=key == "map")


class SegmentationModule(DenseModule):
    """Cross-entropy of each pixel or the model's own loss, mIoU over the whole validation set.

    Args:
        model: Backbone and head; with a method `loss` of images and masks, or it gives logits of each pixel.
        backbone: The backbone in it.
        args: Arguments of train_dense.py.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, args: argparse.Namespace) -> None:
        super().__init__(model, backbone, args)
        self.iou = MulticlassJaccardIndex(args.num_classes, ignore_index=args.ignore_index)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, masks = batch
        if hasattr(self.model, "loss"):
            loss = self.model.loss(images, masks)
        else:
            loss = F.cross_entropy(self.model(images), masks, ignore_index=self.args.ignore_index)
        self.log_losses({"loss": loss}, batch_index)
        return loss * self.share_of_update(batch_index)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        image, mask = batch
        self.iou.update(predict_classes(self.model, image, tuple(mask.shape[-2:])), mask)

    def on_validation_epoch_end(self) -> None:
        self.log_score("mIoU", self.iou.compute(), prog_bar=True)
        self.iou.reset()
