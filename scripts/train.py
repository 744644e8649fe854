#!/usr/bin/env python3
"""Train or fine-tune an image classifier with timm's parts, on one process or many (torchrun, Slurm)."""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from timm.layers import convert_sync_batchnorm
from timm.task import ClassificationTask
from timm.utils import random_seed, unwrap_model
from timm.utils.distributed import init_distributed_device_so
from torch import nn

from common.checkpoint import STATE_FILE, CheckpointError, load_state
from common.command_line import check_device, fail
from common.images import UnusableImagesError
from common.loop import DivergedError
from common.models import build_model, check_image_size, check_name
from common.optim import classifier_names
from common.recipes import save_args
from common.record import write_json
from common.run_options import resolve_preprocessing
from common.signals import StoppedError, StopSignals
from common.training_recipe import Recipe
from common.weights import load_checkpoint, read_checkpoint
from common.workers import workers_end
from fdconv_zoo.checkpoint import strip_prefixes
from fdconv_zoo.run_files import ARGS_FILE, CLASSES_FILE, START_FILE
from training.args import parse_args
from training.data import BatchAugmentation, TrainLoader, ValidationLoader
from training.datasets import check_classes, check_same_classes, class_names, create_datasets, synthetic_datasets
from training.log import RunLog
from training.run import Run

_logger = logging.getLogger("train")


def load_initial_weights(model: nn.Module, path: Path) -> None:
    """Start from a file of weights, a static model's too; a classifier of another shape is left as initialised.

    Raises:
        ValueError: The file can't be read, or other weights than the classifier's don't fit.
    """
    weights, own = strip_prefixes(read_checkpoint(path), model), model.state_dict()
    classifiers = tuple(f"{name}." for name in classifier_names(model))
    new = [k for k in weights if k.startswith(classifiers) and k in own and weights[k].shape != own[k].shape]
    if new:
        _logger.info(f"{', '.join(new)}: new in this run, {path} has other classes")
    try:
        load_checkpoint(model, {**weights, **{key: own[key] for key in new}})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def create_task(args: argparse.Namespace, device: torch.device, resumed: bool) -> ClassificationTask:
    """The model with its loss on its device, with EMA and compilation as asked for, not yet distributed.

    Args:
        args: Arguments of train.py.
        device: Device of this process.
        resumed: A checkpoint brings the weights, so that none are downloaded or read.
    """
    model = build_model(
        args.model,
        pretrained=args.pretrained and not args.initial_checkpoint and not resumed,
        option="--initial-checkpoint",
        num_classes=args.num_classes,
        in_chans=args.in_chans,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        **args.model_kwargs,
    )
    if args.initial_checkpoint and not resumed:
        load_initial_weights(model, args.initial_checkpoint)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    if args.sync_bn:
        if device.type != "cuda":
            raise ValueError(f"--sync-bn works on cuda only, not on {device.type}")
        model = convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last if args.channels_last else torch.contiguous_format)
    loss = {
        "loss_type": "bce" if args.bce_loss else "ce",
        "smoothing": args.smoothing,
        "soft_targets": bool(args.mixup or args.cutmix),
        "bce_target_thresh": args.bce_target_thresh,
    }
    task = ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        _logger.info(f"compiling with {args.torchcompile}: the first update takes a minute or several")
        task.compile(backend=args.torchcompile)
        task.compile_ema(backend=args.torchcompile)
    return task


def describe_start(args: argparse.Namespace, model: nn.Module) -> dict[str, str]:
    """Where the weights that a run starts from come from; what is published tells it."""
    if args.initial_checkpoint:
        return {"from": "file", "name": args.initial_checkpoint.name}
    if not args.pretrained:
        return {"from": "random"}
    config = getattr(model, "pretrained_cfg", {})
    tag, repo = config.get("tag"), config.get("hf_hub_id")
    name = args.model if "." in args.model or not tag else f"{args.model}.{tag}"
    return {"from": "pretrained", "name": name} | ({"repo": repo} if repo else {})


def find_start(folder: Path, model: nn.Module) -> dict[str, str]:
    """The start of a run whose state is from before states told it.

    Options that name no start leave it unknown: they may be those of a resume, which needs none.

    Args:
        folder: The run's directory.
        model: Its model.
    """
    path = folder / ARGS_FILE
    options = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    file, pretrained = options.get("initial_checkpoint"), options.get("pretrained")
    if not file and not pretrained:
        return {"from": "unknown"}
    known = {"model": options["model"], "pretrained": pretrained, "initial_checkpoint": Path(file) if file else None}
    return describe_start(argparse.Namespace(**known), model)


def create_run(args: argparse.Namespace, device: torch.device, rank: int, world_size: int, stop: StopSignals) -> Run:
    """Everything a run needs, resumed if asked for.

    Raises:
        ValueError: Arguments, data or checkpoint don't fit each other.
        CheckpointError: The state to resume can't be read.
    """
    state_path = args.output / STATE_FILE if args.resume in (None, "auto") else Path(args.resume)
    if args.resume is None and state_path.exists():
        raise ValueError(f"{args.output} holds a run: add --resume to go on with it, or choose another --output")
    state = load_state(state_path) if args.resume not in (None, "auto") or state_path.exists() else None

    # Before the model: a mistake in them shall not cost a download.
    datasets = None if args.synthetic else create_datasets(args, rank, world_size)
    random_seed(args.seed)  # the same initial weights in all processes
    task = create_task(args, device, resumed=state is not None)
    model = unwrap_model(task.get_trainable_module())
    random_seed(args.seed, rank)

    data_config = resolve_preprocessing(model, vars(args), checkpoint=None, channels=args.in_chans)
    check_image_size(model, data_config["input_size"][1:])
    train_set, val_set = datasets or synthetic_datasets(args, model.num_classes, data_config["input_size"])
    check_classes(train_set, model.num_classes, chosen=args.num_classes is not None)
    place = {"device": device, "rank": rank, "world_size": world_size}
    train_loader = TrainLoader(train_set, args, data_config, **place)
    val_loader = ValidationLoader(val_set, args, data_config, **place)
    run = Run(
        args=args,
        task=task,
        recipe=Recipe.of(args),
        epoch_batches=len(train_loader),
        world_size=world_size,
        grad_accum_steps=args.grad_accum_steps,
        steps=args.steps,
        autocast=torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp),
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "float16"),
        train_loader=train_loader,
        val_loader=val_loader,
        augment=BatchAugmentation(args, model.num_classes, device),
        rank=rank,
        stop=stop,
        start=describe_start(args, model)
        if state is None
        else state.get("start") or find_start(state_path.parent, model),
    )
    names = class_names(train_set, model.num_classes)
    if state is not None:
        check_same_classes(state_path.parent / CLASSES_FILE, names)
        run.load(state)
    if world_size > 1:
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
    if rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        save_args(args, args.output / ARGS_FILE)
        write_json(args.output / START_FILE, run.start)
        if names:
            (args.output / CLASSES_FILE).write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        done, total = run.progress, args.steps or run.epochs * run.updates_per_epoch
        run.log = RunLog(
            args.output, total_updates=total, epoch=done.epoch, update=done.updates, tensorboard=args.tensorboard
        )
        _logger.info(
            f"{args.model}, {sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f}M parameters, "
            f"{model.num_classes} classes, images {data_config['input_size']}; {world_size} x {device.type}, "
            f"{run.images_per_update} images an update, {run.updates_per_epoch} updates an epoch"
        )
        if state is not None:
            _logger.info(f"resumed {state_path} in epoch {done.epoch} after update {done.updates}")
    return run


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    args = parse_args(argv)
    device_name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        check_device(device_name)
        check_name(args.model)
    except ValueError as error:
        raise fail("train.py", error) from error
    # gloo beside nccl: small agreements (stop signals, random states) go over the CPU and never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device_name.startswith("cuda") else "gloo"
    env = init_distributed_device_so(device_name, dist_backend=backend)
    rank = env["global_rank"]
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    for client in ("httpx", "httpx2"):  # of the Hub, by its release: a line for every request
        logging.getLogger(client).setLevel(logging.WARNING)
    orderly = False
    try:
        with workers_end(), StopSignals() as stop:
            try:
                run = create_run(args, torch.device(env["device"]), rank, env["world_size"], stop)
            except (ValueError, TypeError, RuntimeError, OSError) as error:
                raise fail("train.py", error) from error
            run.fit()
        orderly = True
        if rank == 0:
            best = run.progress
            _logger.info(f"done: best {args.eval_metric} {best.best_metric} in epoch {best.best_epoch}, {args.output}")
    except (CheckpointError, DivergedError, UnusableImagesError) as error:
        raise fail("train.py", error) from error
    except StoppedError as stopped:
        orderly = True
        if rank == 0:
            _logger.info(f"{stopped} and saved; go on with --resume")
        sys.exit(128 + stopped.signum)
    except KeyboardInterrupt:
        _logger.warning("ended at once; --resume goes on from the last save, if there was one")
        sys.exit(128 + signal.SIGINT)
    finally:
        # After an error the others may wait for this process: its end is what tells them, an agreement would hang.
        if orderly and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
