"""Lightning modules: what a training and a validation step are for detection and for semantic segmentation."""

import argparse

import lightning as L
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import MeanAveragePrecision
from train_dense_coco import Target
from train_dense_models import predict_classes
from train_dense_optim import create_optimizer, rate_factor


class DenseModule(L.LightningModule):
    """What all tasks share: optimiser, schedule and frozen batch norms.

    Args:
        model: Backbone and head.
        backbone: The backbone in it.
        args: Arguments of train_dense.py.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, args: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.args = model, args
        self.backbone_parts = [backbone]  # in a list, so that it is not registered twice

    def configure_optimizers(self) -> OptimizerLRScheduler:
        images = self.args.batch_size * self.args.grad_accum_steps * self.trainer.world_size
        optimizer = create_optimizer(self.model, self.backbone_parts[0], self.args, images)
        total = int(self.trainer.estimated_stepping_batches)
        per_epoch = self.trainer.num_training_batches / self.args.grad_accum_steps
        schedule = LambdaLR(optimizer, rate_factor(self.args, total, per_epoch))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class DetectionModule(DenseModule):
    """torchvision's detectors: their own losses, mAP as COCO defines it.

    Args:
        model: Backbone and head.
        backbone: The backbone in it.
        args: Arguments of train_dense.py.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, args: argparse.Namespace) -> None:
        super().__init__(model, backbone, args)
        self.kinds = ("bbox", "segm") if args.head == "mask_rcnn" else ("bbox",)
        self.average_precision = MeanAveragePrecision(iou_type=self.kinds)

    def training_step(self, batch: tuple[list[Tensor], list[Target]], batch_index: int) -> Tensor:
        losses = self.model(*batch)
        total = sum(losses.values())
        self.log_dict({f"train/{name}": value for name, value in losses.items()}, batch_size=len(batch[0]))
        self.log("train/loss", total, prog_bar=True, batch_size=len(batch[0]))
        return total

    def validation_step(self, batch: tuple[list[Tensor], list[Target]], batch_index: int) -> None:
        images, targets = batch
        found = self.model(images)
        for result in found:
            if "masks" in result:
                result["masks"] = result["masks"][:, 0] > 0.5
        self.average_precision.update(found, targets)

    def on_validation_epoch_end(self) -> None:
        scores = self.average_precision.compute()
        self.average_precision.reset()
        for kind in self.kinds:
            prefix = f"{kind}_" if len(self.kinds) > 1 else ""
            title = "mask" if kind == "segm" else "box"
            for key, name in (("map", "mAP"), ("map_50", "mAP50"), ("map_75", "mAP75")):
                self.log(f"val/{title}_{name}", scores[prefix + key], prog_bar=key == "map")


class SegmentationModule(DenseModule):
    """Cross-entropy of each pixel, mIoU over the whole validation set.

    Args:
        model: Backbone and head.
        backbone: The backbone in it.
        args: Arguments of train_dense.py.
    """

    def __init__(self, model: nn.Module, backbone: nn.Module, args: argparse.Namespace) -> None:
        super().__init__(model, backbone, args)
        self.iou = MulticlassJaccardIndex(args.num_classes, ignore_index=args.ignore_index)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> Tensor:
        images, masks = batch
        loss = F.cross_entropy(self.model(images), masks, ignore_index=self.args.ignore_index)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> None:
        image, mask = batch
        self.iou.update(predict_classes(self.model, image, tuple(mask.shape[-2:])), mask)

    def on_validation_epoch_end(self) -> None:
        self.log("val/mIoU", self.iou.compute(), prog_bar=True)
        self.iou.reset()
