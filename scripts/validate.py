#!/usr/bin/env python3
"""Measure the accuracy and speed of models on any image dataset that timm reads."""

import argparse
import csv
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from timm.data import ImageNetInfo, create_dataset, create_loader, infer_imagenet_subset, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from common.command_line import fail
from common.demo_data import create_demo_model, create_photo_dataset
from common.models import add_static_twins, build_model, describe_misfits, expand_names, read_checkpoint
from common.record import write_json
from fdconv_zoo.cost import count_macs, count_parameters
from validation.args import check_args, parse_args
from validation.demo import report_photos


def build_dataset(args: argparse.Namespace, model: nn.Module) -> Dataset:
    """Open the images; folders that are named by ImageNet synsets get the model's labels even if not all are there.

    Raises:
        ValueError: There are labels beyond the model's outputs.
    """
    if args.demo:
        return create_photo_dataset()
    create = partial(
        create_dataset,
        args.dataset,
        root=args.data_dir,
        split=args.split,
        download=args.dataset_download,
        batch_size=args.batch_size,
        input_key=args.input_key,
        target_key=args.target_key,
    )
    dataset = create(class_map=args.class_map)
    reader = getattr(dataset, "reader", None)
    if args.class_map and reader is None:
        raise ValueError("torch/ datasets take no --class-map")
    # the reader of tar files has another name for it
    labels = getattr(reader or dataset, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    subset = infer_imagenet_subset(model)
    if reader and labels and subset and not args.class_map:
        synsets = {synset: index for index, synset in enumerate(ImageNetInfo(subset).label_names())}
        if labels.keys() <= synsets.keys():
            return create(class_map=synsets)
    if labels and max(labels.values()) >= model.num_classes:
        raise ValueError(
            f"{len(labels)} classes in the data, {model.num_classes} outputs of the model: "
            "give --num-classes with a checkpoint, or --class-map"
        )
    if labels and len(labels) < model.num_classes and not args.class_map:
        print(
            f"warning: the model has {model.num_classes} outputs, the data {len(labels)} classes, taken for the "
            "first outputs in the order of their names; --class-map says otherwise",
            file=sys.stderr,
        )
    return dataset


@torch.inference_mode()
def validate(model: nn.Module, loader: Any, args: argparse.Namespace) -> dict[str, float]:
    """Run a model over a loader.

    Returns:
        top1 and top5 in per cent, the mean cross-entropy loss, the number of images, and images_per_second through
        the model alone (loading not included; the first batch is a warm-up, unless it is the only one).
    """
    device = torch.device(args.device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    synchronize = (lambda: None) if device.type == "cpu" else getattr(torch, device.type).synchronize
    # in a log file, a line a minute
    pace = {} if sys.stderr.isatty() else {"mininterval": 60, "delay": 60}
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    batches: list[tuple[int, float]] = []
    for images, target in tqdm(loader, unit="batch", leave=False, **pace):
        images, target = images.to(device, memory_format=memory_format), target.to(device)
        synchronize()
        start = time.perf_counter()
        with autocast:
            logits = model(images).float()
        synchronize()
        batches.append((len(images), time.perf_counter() - start))
        hits1, hits5 = accuracy(logits, target, topk=(1, 5))
        top1.update(hits1.item(), len(images))
        top5.update(hits5.item(), len(images))
        loss.update(nn.functional.cross_entropy(logits, target).item(), len(images))
    counts, seconds = zip(*(batches[1:] or batches), strict=True)
    return {
        "top1": top1.avg,
        "top5": top5.avg,
        "loss": loss.avg,
        "images": top1.count,
        "images_per_second": sum(counts) / sum(seconds),
    }


def prepare(
    name: str, args: argparse.Namespace, checkpoint: dict[str, Tensor] | None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return a model on its device, the loader with its preprocessing, and what is known of both beforehand.

    The static twin of a checkpoint's FDConv model takes that checkpoint if it fits, its pretrained weights if not.
    """
    if args.demo:
        model = create_demo_model(name)
    else:
        kwargs = {"num_classes": args.num_classes, **args.model_kwargs}
        if checkpoint and name not in args.model and describe_misfits(checkpoint, timm.create_model(name, **kwargs)):
            checkpoint = None
        model = build_model(name, checkpoint=checkpoint, **kwargs)
    model.eval()
    dataset = build_dataset(args, model)
    config = resolve_data_config(vars(args), model=model, use_test_size=not args.use_train_size)
    facts = {"parameters": count_parameters(model), "gmacs": count_macs(model, config["input_size"]) / 1e9, **config}
    device = torch.device(args.device)
    loader = create_loader(
        dataset,
        batch_size=args.batch_size,
        num_workers=args.workers,
        device=device,
        pin_memory=device.type == "cuda",
        persistent_workers=False,
        **config,
    )
    model = model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    if args.torchcompile:
        model = torch.compile(model, backend=args.torchcompile)
    return model, loader, facts


def write_results(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write all rows as a JSON list or as CSV, by the file's suffix."""
    if path.suffix == ".json":
        write_json(path, rows)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # the Hub's client would print a line on every retry
    huggingface_hub.logging.set_verbosity_error()
    try:
        check_args(args)
        args.model = expand_names(args.model, weights_needed=not (args.checkpoint or args.demo))
        if args.checkpoint and len(args.model) > 1:
            raise ValueError(f"--checkpoint is for one model, got {', '.join(args.model)}")
        names = add_static_twins(args.model) if args.compare_static else args.model
        checkpoint = read_checkpoint(args.checkpoint, args.use_ema) if args.checkpoint else None
    except ValueError as error:
        raise fail("validate.py", error) from error

    width = max(len(name) for name in names)
    rows: list[dict[str, Any]] = []
    for name in names:
        try:
            model, loader, facts = prepare(name, args, checkpoint)
        except Exception as error:  # timm, its readers, huggingface_hub and its HTTP client share no base class
            raise fail("validate.py", f"{name}: {str(error) or type(error).__name__}") from error
        row = {"model": name, **validate(model, loader, args), **facts}
        if not rows:
            print(f"{'model':<{width}}    top-1    top-5    loss  Mparams   GMACs  images/s")
        accuracies = f"{row['top1']:>7.3f}  {row['top5']:>7.3f}  {row['loss']:>6.3f}"
        costs = f"{row['parameters'] / 1e6:>7.2f}  {row['gmacs']:>6.2f}  {row['images_per_second']:>8.1f}"
        print(f"{name:<{width}}  {accuracies}  {costs}", flush=True)
        rows.append(row)
        if args.results_file:
            write_results(args.results_file, rows)
    if args.demo:
        try:
            print(report_photos(Path("outputs/demo")))
        except ImportError as error:
            raise fail("validate.py", error) from error


if __name__ == "__main__":
    main()
