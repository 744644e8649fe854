#!/usr/bin/env python3
"""Train detection, instance and semantic segmentation on a timm backbone, on one process or many (torchrun)."""

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from common.command_line import check_device, fail
from dense.args import DETECTION_HEADS, MASK_HEADS, parse_args

try:
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
    from timm.layers import freeze_batch_norm_2d
    from torch.utils.data import DataLoader, Dataset, Subset

    from common.models import check_name, unavailable
    from common.recipes import save_args
    from common.sampler import SeededDataset
    from common.workers import ignore_stops, workers_end
    from dense.coco import coco_boxes, collate
    from dense.masks import MaskFolders, sum_over_processes
    from dense.models import create_detector, create_segmenter, normalization
    from dense.modules import DenseModule, DetectionModule, SegmentationModule
    from dense.progress import LossLines
    from dense.resume import (
        STOPS,
        CheckpointFiles,
        Checkpoints,
        EndOfRun,
        EpochSampler,
        Progress,
        StopAfterBatch,
        check_order,
        read_progress,
    )
    from fdconv_zoo import PretrainedError
    from fdconv_zoo.run_files import ARGS_FILE
except ImportError as error:
    if __name__ != "__main__":
        raise
    parse_args()  # its help needs none of them
    raise fail("train_dense.py", f"needs {error.name}: pip install -e '.[dense]'") from error

LAST, BEST = "last.ckpt", "best.ckpt"
# What gloo and NCCL say in a process that waits for one that ended.
LOST_PROCESS = re.compile("Connection (closed|reset) by peer|remote process exited|NCCL Error 6", re.IGNORECASE)


def create_datasets(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    """Return the images for training and for validation.

    Raises:
        ValueError: The data can't be used; says why.
    """
    if args.head in DETECTION_HEADS:
        with_masks = args.head in MASK_HEADS
        train_set = coco_boxes(args.train_images, args.train_annotations, with_masks, train=True)
        val_set = coco_boxes(args.val_images, args.val_annotations, with_masks, train=False)
        if train_set.category_names != val_set.category_names:
            differ = train_set.category_names.items() ^ val_set.category_names.items()
            raise ValueError(
                f"{args.val_annotations} has other categories than {args.train_annotations}: id {min(differ)[0]} is "
                "not the same in both"
            )
        return train_set, val_set
    mean, std = normalization(args.backbone)
    options: dict[str, Any] = {
        "image_suffix": args.image_suffix,
        "mask_suffix": args.mask_suffix,
        "num_classes": args.num_classes,
        "ignore_index": args.ignore_index,
        "reduce_zero_label": args.reduce_zero_label,
        "mask_values": args.mask_values,
        "mean": mean,
        "std": std,
        "scale_size": args.scale_size,
        "scale": tuple(args.scale),
    }
    train_set = MaskFolders(args.train_images, args.train_masks, crop_size=tuple(args.crop_size), **options)
    return train_set, MaskFolders(args.val_images, args.val_masks, crop_size=None, **options)


def tell_and_check(args: argparse.Namespace, train_set: Dataset, val_set: Dataset) -> None:
    """Say a line of each split, with what is not used of it; read masks or images' headers, each process its part.

    Args:
        args: Arguments of train_dense.py.
        train_set: Images for training.
        val_set: Images for validation.

    Raises:
        ValueError: A mask or an image can't be used; names it. Or the masks for training have one class only.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if rank == 0:
        print(train_set.describe(), val_set.describe(), sep="\n", file=sys.stderr)
    files = "headers of images" if args.head in DETECTION_HEADS else "masks"
    if rank == 0:
        print(f"reading {len(train_set)} + {len(val_set)} {files}", file=sys.stderr, flush=True)
    pixels, _ = (dataset.check(slice(rank, None, world), args.workers) for dataset in (train_set, val_set))
    if args.head in DETECTION_HEADS:
        return
    pixels = sum_over_processes(pixels, rank, world)
    absent = [label for label, count in enumerate(pixels) if not count]
    if absent and rank == 0:
        told = (
            f"no pixel of class {', '.join(map(str, absent[:8]))}{', ...' if len(absent) > 8 else ''} in "
            f"{args.train_masks}; {args.ignore_index} is no class (--ignore-index, --mask-values)"
        )
        if len(absent) >= args.num_classes - 1:
            raise ValueError(told)
        print(told, file=sys.stderr)


def create_loaders(
    args: argparse.Namespace, train_set: Dataset, val_set: Dataset, epoch: int
) -> tuple[DataLoader, DataLoader]:
    """Return the loaders of this process; the images of an epoch depend on seed and epoch only.

    Args:
        args: Arguments of train_dense.py.
        train_set: Images for training.
        val_set: Images for validation, of which each process has a part and none has one twice.
        epoch: The first.

    Raises:
        ValueError: There are fewer images than one batch, or fewer for validation than processes.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if len(train_set) < args.batch_size * world:
        raise ValueError(f"{len(train_set)} images are fewer than a batch of {args.batch_size} x {world} processes")
    if len(val_set) < world:
        raise ValueError(f"{len(val_set)} images for validation are fewer than {world} processes")
    shared = {
        "num_workers": args.workers,
        "collate_fn": collate if args.head in DETECTION_HEADS else None,
        "persistent_workers": args.workers > 0,
        "worker_init_fn": ignore_stops,
    }
    sampler = EpochSampler(train_set, world, rank, shuffle=True, seed=args.seed, drop_last=True)
    # Lightning sets it too, but too late for loader processes of a resumed run
    sampler.set_epoch(epoch)
    # one by one: what is found in an image would depend on those it is padded with
    return (
        DataLoader(SeededDataset(train_set, args.seed), args.batch_size, sampler=sampler, drop_last=True, **shared),
        DataLoader(Subset(val_set, range(rank, len(val_set), world)), 1, **shared),
    )


def create_module(args: argparse.Namespace, train_set: Dataset, resumed: bool) -> DenseModule:
    """Return the model with its steps.

    Args:
        args: Arguments of train_dense.py.
        train_set: Has the categories, for detection.
        resumed: A checkpoint brings the weights.
    """
    module_class: Callable[..., DenseModule]
    if args.head in DETECTION_HEADS:
        model, backbone = create_detector(args, len(train_set.categories), resumed)
        module_class = DetectionModule
    else:
        model, backbone = create_segmenter(args, resumed)
        module_class = SegmentationModule
    if args.freeze_bn:
        freeze_batch_norm_2d(backbone)
    return module_class(model, backbone, args)


def create_trainer(args: argparse.Namespace) -> L.Trainer:
    """Return Lightning's trainer: checkpoints and logs in `--output`, the processes that torchrun has started."""
    monitor = "val/box_mAP" if args.head in DETECTION_HEADS else "val/mIoU"
    best = Checkpoints(args.output, "best", monitor=monitor, mode="max", enable_version_counter=False)
    # save_last of the one above would leave out epochs that are not the best so far
    last = Checkpoints(args.output, "last", save_on_train_epoch_end=True, enable_version_counter=False)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    world = int(os.environ.get("WORLD_SIZE", 1))
    terminal = sys.stderr.isatty()
    progress = TQDMProgressBar() if terminal else LossLines()
    return L.Trainer(
        accelerator=args.device,
        devices=processes,
        num_nodes=world // processes,
        strategy="ddp" if world > 1 else "auto",
        precision=args.precision,
        max_epochs=-1 if args.steps else args.epochs,
        limit_train_batches=args.limit_batches,
        limit_val_batches=args.limit_batches,
        check_val_every_n_epoch=args.val_interval,
        num_sanity_val_steps=0,
        accumulate_grad_batches=args.grad_accum_steps,
        gradient_clip_val=args.clip_grad,
        use_distributed_sampler=False,
        log_every_n_steps=10,
        logger=CSVLogger(args.output, name="logs"),
        plugins=[CheckpointFiles()],
        callbacks=[best, last, EndOfRun(args.steps), StopAfterBatch(), LearningRateMonitor("step"), progress],
        enable_progress_bar=terminal,
        enable_model_summary=False,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    args = parse_args(argv)
    last = args.output / LAST
    resumed = args.resume and last.exists()
    try:
        if last.exists() and not args.resume:
            raise ValueError(f"{args.output} holds a run: add --resume to go on with it, or choose another --output")
        done = read_progress(last) if resumed else Progress(0, 0, {})
        if done.updates >= args.steps if args.steps else done.epochs >= args.epochs:
            if int(os.environ.get("RANK", 0)) == 0:
                print(f"{last} is the end of the run: {done.epochs} epochs, {done.updates} updates", file=sys.stderr)
            return
        check_order(done.order, args)
        if args.device == "cuda":
            check_device(args.device)
        check_name(args.backbone)
        train_set, val_set = create_datasets(args)
        if not resumed:
            tell_and_check(args, train_set, val_set)
        loaders = create_loaders(args, train_set, val_set, done.epochs)
        L.seed_everything(args.seed, workers=True)
        module = create_module(args, train_set, resumed)
        trainer = create_trainer(args)
        if trainer.is_global_zero:
            args.output.mkdir(parents=True, exist_ok=True)
            save_args(args, args.output / ARGS_FILE)
            count = sum(parameter.numel() for parameter in module.model.parameters())
            print(
                f"{args.head} on {args.backbone}, {count / 1e6:.2f}M parameters; {len(train_set)} images for training, "
                f"{len(val_set)} for validation{f'; goes on from {last}' if resumed else ''}",
                file=sys.stderr,
            )
        with workers_end():
            trainer.fit(module, *loaders, ckpt_path=last if resumed else None, weights_only=True)
    except STOPS as stopped:
        name = signal.Signals(getattr(stopped, "signum", signal.SIGTERM)).name
        if trainer.is_global_zero:
            print(
                f"\nstopped by {name}; go on with --resume, "
                f"{f'after the last whole epoch, from {last}' if last.exists() else 'from the start'}",
                file=sys.stderr,
            )
        sys.exit(128 + signal.Signals[name])
    except PretrainedError as error:
        raise fail("train_dense.py", unavailable(error, "--initial-checkpoint")) from error
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, MisconfigurationException) as error:
        is_alone = int(os.environ.get("WORLD_SIZE", 1)) == 1
        if not is_alone and isinstance(error, RuntimeError) and LOST_PROCESS.search(str(error)):
            raise fail("train_dense.py", "another process of the run has ended; its own message says why") from error
        raise fail("train_dense.py", error) from error
    if trainer.is_global_zero:
        scores = {key: f"{value:.4f}" for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        print(", ".join(f"{key} {value}" for key, value in scores.items()) or "no validation")
        print(f"done: {args.output / BEST}, {args.output / LAST}, metrics in {trainer.logger.log_dir}")


if __name__ == "__main__":
    torch.multiprocessing.set_sharing_strategy("file_system")  # lists of small masks are many open files otherwise
    main()
