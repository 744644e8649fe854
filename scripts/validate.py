#!/usr/bin/env python3
"""Measure the accuracy and speed of models on any image dataset that timm reads."""

import argparse
import csv
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from timm.utils import AverageMeter
from torch import Tensor, nn
from tqdm import tqdm

from common.command_line import fail, use_device
from common.demo_data import create_demo_model, create_photo_dataset
from common.images import ReadableImages, channels_mode
from common.inference import Accuracy, inference_loader
from common.models import (
    UnavailableError,
    add_static_twins,
    build_model,
    check_image_size,
    check_pretrained_classes,
    expand_names,
)
from common.record import write_json
from common.run_options import adopt_model_options, resolve_preprocessing
from common.weights import read_checkpoint
from fdconv_zoo.checkpoint import describe_misfits, strip_prefixes
from fdconv_zoo.cost import count_macs, count_parameters
from fdconv_zoo.methods import METHODS
from validation.args import check_args, parse_args
from validation.datasets import open_dataset
from validation.demo import report_photos

# Those of the layers that timm's models have none of by these names.
LAYER_OPTIONS = {*METHODS["fdconv"].options, "ksm_norm_layer", "ksm_act_layer"} - {"norm_layer", "act_layer"}
PREPROCESSING = ("img_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")


def synchronize(device: torch.device) -> None:
    """Wait for a device, which need not be the current one of its kind."""
    if device.type == "mps":  # torch knows one only
        torch.mps.synchronize()
    elif device.type != "cpu":
        getattr(torch, device.type).synchronize(device)


@torch.inference_mode()
def validate(model: nn.Module, loader: Any, args: argparse.Namespace) -> dict[str, float]:
    """Run a model over a loader.

    Returns:
        top1 and top5 in per cent, the mean cross-entropy loss, the number of images, and images_per_second through
        the model alone (loading not included; the first batch is a warm-up, unless it is the only one).

    Raises:
        UnusableImagesError: No image can be read, or one has pixels of unknown range.
    """
    device = torch.device(args.device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    autocast = torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)
    # in a log file, a line a minute
    pace = {} if sys.stderr.isatty() else {"mininterval": 60, "delay": 60}
    counted, loss = Accuracy(), AverageMeter()
    batches: list[tuple[int, float]] = []
    for images, target in tqdm(loader, unit="batch", leave=False, **pace):
        if not len(images):  # none of them could be read
            continue
        images, target = images.to(device, memory_format=memory_format), target.to(device)
        synchronize(device)
        start = time.perf_counter()
        with autocast:
            logits = model(images).float()
        synchronize(device)
        batches.append((len(images), time.perf_counter() - start))
        counted.update(logits, target)
        loss.update(nn.functional.cross_entropy(logits, target).item(), len(images))
    top1, top5 = counted.compute()
    counts, seconds = zip(*(batches[1:] or batches), strict=True)
    return {
        "top1": top1,
        "top5": top5,
        "loss": loss.avg,
        "images": loss.count,
        "images_per_second": sum(counts) / sum(seconds),
    }


def prepare(
    name: str, args: argparse.Namespace, checkpoint: dict[str, Tensor] | None, first: bool
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Return a model on its device, the loader with its preprocessing, and what is known of both beforehand.

    The static twin of a checkpoint's FDConv model takes that checkpoint if it fits, its pretrained weights if not. A
    model with a checkpoint's weights is called by its architecture, without the tag of weights that it does not have.

    Args:
        name: The model's.
        args: Arguments of validate.py.
        checkpoint: Weights instead of pretrained ones.
        first: No other model was measured on these data before, so that what is odd about them is told.
    """
    if args.demo:
        model = create_demo_model(name)
    else:
        kwargs = {"num_classes": args.num_classes, **args.model_kwargs}
        if name not in args.model:
            # The static twin of a model with options of its layers.
            kwargs = {key: value for key, value in kwargs.items() if key not in LAYER_OPTIONS}
        if checkpoint and name not in args.model:
            twin = timm.create_model(name, **kwargs)
            if describe_misfits(strip_prefixes(checkpoint, twin), twin):
                checkpoint = None
        if checkpoint is None:
            check_pretrained_classes(name, kwargs["num_classes"])
        model = build_model(name, checkpoint=checkpoint, **kwargs)
    model.eval()
    config = resolve_preprocessing(
        model,
        {key: getattr(args, key) for key in PREPROCESSING},
        args.checkpoint if checkpoint else None,
        channels=args.model_kwargs.get("in_chans"),
        test_size=not args.use_train_size,
    )
    check_image_size(model, config["input_size"][1:])
    mode = channels_mode(config["input_size"][0])
    dataset = create_photo_dataset() if args.demo else open_dataset(args, model, mode, tell=first)
    facts = {
        "model": name.partition(".")[0] if checkpoint and ":" not in name else name,
        "checkpoint": str(args.checkpoint) if checkpoint else "",
        "parameters": count_parameters(model),
        "gmacs": count_macs(model, config["input_size"]) / 1e9,
        **config,
    }
    device = torch.device(args.device)
    loader = inference_loader(dataset, config, args.batch_size, device, args.workers)
    model = model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    if args.num_gpu > 1:
        model = nn.DataParallel(model, device_ids=list(range(args.num_gpu)))
    if args.torchcompile:
        print(f"compiling {name} with {args.torchcompile}: the first batch takes a minute or several", file=sys.stderr)
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
    # they are listed in the end
    logging.getLogger("images").setLevel(logging.ERROR)
    # the Hub's client would print a line on every retry
    huggingface_hub.logging.set_verbosity_error()
    try:
        check_args(args)
        use_device(args.device)
        adopt_model_options(args)
        args.model = expand_names(args.model, weights_needed=not (args.checkpoint or args.demo))
        if args.checkpoint and len(args.model) > 1:
            raise ValueError(f"--checkpoint is for one model, got {', '.join(args.model)}")
        names = add_static_twins(args.model) if args.compare_static else args.model
        checkpoint = read_checkpoint(args.checkpoint, args.use_ema) if args.checkpoint else None
    except ValueError as error:
        raise fail("validate.py", error) from error

    width = max(len(name) for name in names)
    rows: list[dict[str, Any]] = []
    unavailable: list[str] = []
    for name in names:
        try:
            model, loader, facts = prepare(name, args, checkpoint, first=not rows)
            row = {"model": name, **validate(model, loader, args), **facts}
        except UnavailableError as error:  # the others may be there
            unavailable.append(f"{name}: {error}")
            continue
        except Exception as error:  # timm, its readers, huggingface_hub and its HTTP client share no base class
            raise fail("validate.py", f"{name}: {str(error) or type(error).__name__}") from error
        corrupt = loader.dataset.corrupt.names() if isinstance(loader.dataset, ReadableImages) else []
        row["corrupt_images"] = len(corrupt)
        if corrupt and not rows:
            print("\n".join([f"left out {len(corrupt)} images that can't be read:", *corrupt]), file=sys.stderr)
        if not rows:
            print(f"{'model':<{width}}    top-1    top-5    loss  Mparams   GMACs  images/s")
        accuracies = f"{row['top1']:>7.3f}  {row['top5']:>7.3f}  {row['loss']:>6.3f}"
        costs = f"{row['parameters'] / 1e6:>7.2f}  {row['gmacs']:>6.2f}  {row['images_per_second']:>8.1f}"
        print(f"{row['model']:<{width}}  {accuracies}  {costs}", flush=True)
        rows.append(row)
        if args.results_file:
            write_results(args.results_file, rows)
    if unavailable:
        count = f"{len(unavailable)} of {len(names)} models were not measured: " if len(unavailable) > 1 else ""
        raise fail("validate.py", count + "; ".join(unavailable))
    if args.demo:
        try:
            print(report_photos(Path("outputs/demo")))
        except ImportError as error:
            raise fail("validate.py", error) from error


if __name__ == "__main__":
    main()
