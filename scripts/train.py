#!/usr/bin/env python3
"""Train or fine-tune an image classifier with timm's parts, on one process or many (torchrun, Slurm)."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from models import load_checkpoint, read_checkpoint
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import random_seed
from timm.utils.distributed import init_distributed_device_so
from torch import nn
from train_args import parse_args, save_args
from train_checkpoint import STATE_FILE, CheckpointError, load_state
from train_data import BatchAugmentation, TrainLoader, create_datasets, create_validation_loader
from train_log import RunLog
from train_loop import DivergedError, Trainer
from train_optim import classifier_names, parameter_groups, scaled_learning_rate
from train_signals import StoppedError, StopSignals

import fdconv_zoo  # noqa: F401  (registers the FDConv models with timm)

_logger = logging.getLogger("train")


def load_initial_weights(model: nn.Module, path: Path) -> None:
    """Start from a file of weights, a static model's too; a classifier of another shape is left as initialised.

    Raises:
        ValueError: The file can't be read, or other weights than the classifier's don't fit.
    """
    weights, own = read_checkpoint(path), model.state_dict()
    classifiers = tuple(f"{name}." for name in classifier_names(model))
    new = [k for k in weights if k.startswith(classifiers) and k in own and weights[k].shape != own[k].shape]
    if new:
        _logger.info(f"{', '.join(new)}: new in this run, {path} has other classes")
    load_checkpoint(model, {**weights, **{key: own[key] for key in new}})


def create_task(args: argparse.Namespace, device: torch.device) -> ClassificationTask:
    """The model with its loss on its device, with EMA and compilation as asked for, not yet distributed."""
    sizes = {} if args.num_classes is None else {"num_classes": args.num_classes}
    model = timm.create_model(
        args.model,
        pretrained=args.pretrained,
        in_chans=args.in_chans,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        **sizes,
        **args.model_kwargs,
    )
    if args.initial_checkpoint:
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
        task.compile(backend=args.torchcompile)
        task.compile_ema(backend=args.torchcompile)
    return task


def create_trainer(
    args: argparse.Namespace, device: torch.device, rank: int, world_size: int, stop: StopSignals
) -> Trainer:
    """Everything a run needs, resumed if asked for.

    Raises:
        ValueError: Arguments, data or checkpoint don't fit each other.
        CheckpointError: The state to resume can't be read.
    """
    state_path = args.output / STATE_FILE if args.resume in (None, "auto") else args.resume
    if args.resume is None and state_path.exists():
        raise ValueError(f"{args.output} holds a run: add --resume to go on with it, or choose another --output")
    state = load_state(state_path) if args.resume not in (None, "auto") or state_path.exists() else None

    random_seed(args.seed)  # the same initial weights in all processes
    task = create_task(args, device)
    model = task.get_trainable_module()
    model = getattr(model, "_orig_mod", model)
    random_seed(args.seed, rank)

    data_config = resolve_data_config(vars(args), model=model)
    data_config["input_size"] = (args.in_chans, *data_config["input_size"][1:])
    train_set, val_set = create_datasets(args, model.num_classes, data_config["input_size"])
    loaders = [
        create(dataset, args, data_config, device, rank, world_size)
        for create, dataset in ((TrainLoader, train_set), (create_validation_loader, val_set))
    ]
    global_batch = args.batch_size * args.grad_accum_steps * world_size
    lr = args.lr or scaled_learning_rate(args.lr_base, args.lr_base_size, global_batch, args.lr_base_scale)
    optional = {"eps": args.opt_eps, "betas": args.opt_betas}
    optimizer = create_optimizer_v2(
        model,
        args.opt,
        lr,
        args.weight_decay,
        args.momentum,
        param_group_fn=lambda model: parameter_groups(
            model,
            weight_decay=args.weight_decay,
            layer_decay=args.layer_decay,
            static_lr_scale=args.static_lr_scale,
        ),
        **{name: value for name, value in optional.items() if value is not None},
        **args.opt_kwargs,
    )
    updates = -(-len(loaders[0]) // args.grad_accum_steps)
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        args.sched,
        num_epochs=args.epochs,
        decay_epochs=args.decay_epochs,
        decay_milestones=args.decay_milestones,
        cooldown_epochs=args.cooldown_epochs,
        decay_rate=args.decay_rate,
        min_lr=args.min_lr,
        warmup_lr=args.warmup_lr,
        warmup_epochs=args.warmup_epochs,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    trainer = Trainer(
        args=args,
        task=task,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=torch.amp.GradScaler(device.type, enabled=args.amp and args.amp_dtype == "float16"),
        train_loader=loaders[0],
        val_loader=loaders[1],
        augment=BatchAugmentation(args, model.num_classes, device),
        device=device,
        epochs=epochs,
        rank=rank,
        world_size=world_size,
        stop=stop,
    )
    if state is not None:
        trainer.load(state)
    if world_size > 1:
        task.prepare_distributed(device_ids=[device.index] if device.type == "cuda" else None)
    if rank == 0:
        args.output.mkdir(parents=True, exist_ok=True)
        save_args(args, args.output / "args.yaml")
        done = trainer.progress
        total = args.steps or epochs * updates
        trainer.log = RunLog(args.output, total, done.epoch, done.updates, args.tensorboard)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        _logger.info(
            f"{args.model}, {parameters / 1e6:.2f}M parameters, {model.num_classes} classes, "
            f"images {data_config['input_size']}"
        )
        _logger.info(
            f"{global_batch} images an update on {world_size} x {device.type}, lr {lr:.4g}; {updates} updates an epoch"
        )
        _logger.info(
            f"resumed {state_path} in epoch {done.epoch} after update {done.updates}"
            if state is not None
            else "new run"
        )
    return trainer


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    args = parse_args(argv)
    device_name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    # gloo beside nccl: small agreements (stop signals, random states) go over the CPU and never wait for the GPU.
    backend = "cpu:gloo,cuda:nccl" if device_name.startswith("cuda") else "gloo"
    env = init_distributed_device_so(device_name, dist_backend=backend)
    rank = env["global_rank"]
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s")
    try:
        with StopSignals() as stop:
            try:
                trainer = create_trainer(args, torch.device(env["device"]), rank, env["world_size"], stop)
            except (ValueError, RuntimeError, OSError) as error:
                sys.exit(f"train.py: error: {error}")
            trainer.fit()
        if rank == 0:
            best = trainer.progress
            _logger.info(f"done: best {args.eval_metric} {best.best_metric} in epoch {best.best_epoch}, {args.output}")
    except (CheckpointError, DivergedError) as error:
        sys.exit(f"train.py: error: {error}")
    except StoppedError as stopped:
        if rank == 0:
            _logger.info(f"{stopped} and saved; go on with --resume")
        sys.exit(128 + stopped.signum)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
