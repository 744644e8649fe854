"""Arguments of ``train.py``: one parser for the command line and for recipe files."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm.utils
from timm.data import create_transform

from common.command_line import HelpFormatter
from common.recipes import parse_over_recipe
from common.training_recipe import OPTIMISER, SCHEDULE, Recipe, add_recipe_options

EPILOG = """examples:
  # dry run of a recipe: two updates on synthetic images, no data set needed
  python scripts/train.py --config scripts/configs/resnet50_sgd_100ep.yaml --synthetic --steps 2

  # ImageNet on one machine with 8 GPUs
  torchrun --nproc_per_node=8 scripts/train.py --config scripts/configs/resnet50_a2_300ep.yaml \\
      --data-dir imagenet --output outputs/resnet50_a2

  # go on after a pre-emption, exactly where it stopped (starts afresh if there is nothing to resume)
  torchrun --nproc_per_node=8 scripts/train.py --config outputs/resnet50_a2/args.yaml --resume

  # fine-tune on your own folders (data/train/<class>/*.jpg, data/val/<class>/*.jpg)
  python scripts/train.py --config scripts/configs/finetune_converted.yaml --data-dir data --num-classes 12

Names that timm's own train script has mean the same here. docs/training.md tells more.
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; every long option is also a key of a recipe file (``batch_size: 128``)."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train or fine-tune an image classifier: FDConv models and everything else timm knows.",
        epilog=EPILOG,
        usage="train.py [--config FILE] [--data-dir DIR] [--output DIR] [--resume] [options]",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="yaml file of options; the command line overrides it"
    )

    group = parser.add_argument_group("model")
    group.add_argument("--model", default="resnet50_fdconv", help="timm model name, with a tag to choose weights")
    group.add_argument("--pretrained", action=flag, default=False, help="start from the tag's weights")
    group.add_argument(
        "--initial-checkpoint",
        type=Path,
        metavar="FILE",
        help="start from the weights in this file, not from the tag's",
    )
    group.add_argument("--num-classes", type=int, help="classes (default: the model's)")
    group.add_argument("--in-chans", type=int, default=3, help="input channels; images are read as grey for 1")
    group.add_argument("--drop", type=float, help="dropout before the classifier")
    group.add_argument("--drop-path", type=float, help="stochastic depth rate")
    group.add_argument(
        "--model-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs, metavar="NAME=VALUE",
        help="further arguments of the model",
    )  # fmt: skip
    group.add_argument("--grad-checkpointing", action=flag, default=False, help="trade compute for memory")

    group = parser.add_argument_group("data")
    group.add_argument("--data-dir", help="root of the data set")
    group.add_argument(
        "--dataset",
        default="",
        help="timm data set: empty for folders and tars; torch/NAME, hfds/, hfids/, tfds/, wds/",
    )
    group.add_argument("--train-split", default="train", help="split, folder or shards to train on")
    group.add_argument("--val-split", default="validation", help="the same for validation")
    group.add_argument("--train-num-samples", type=int, help="images in the training split (streams without metadata)")
    group.add_argument("--val-num-samples", type=int, help="images in the validation split (streams without metadata)")
    group.add_argument("--dataset-download", action=flag, default=False, help="let torch/ and hfids/ sets download")
    group.add_argument("--class-map", default="", help="file with one class name a line, in label order")
    group.add_argument("--input-key", help="name of the image field (hfds/, hfids/, wds/)")
    group.add_argument("--target-key", help="name of the label field (hfds/, hfids/, wds/)")
    group.add_argument("--img-size", type=int, help="side of the training images (default: the model's)")
    group.add_argument("--interpolation", help="resize interpolation (default: the model's)")
    group.add_argument("--crop-pct", type=float, help="centre crop share in validation (default: the model's)")
    group.add_argument("--mean", type=float, nargs="+", help="normalisation mean (default: the model's)")
    group.add_argument("--std", type=float, nargs="+", help="normalisation deviation (default: the model's)")
    add_recipe_options(group, "batch_size")
    group.add_argument("--validation-batch-size", type=int, help="(default: --batch-size)")
    group.add_argument("-j", "--workers", type=int, default=4, help="data loading processes for each process")
    group.add_argument("--synthetic", action=flag, default=False, help="random images, as many as ImageNet has")

    group = parser.add_argument_group("augmentation")
    group.add_argument("--aug", action=flag, default=True, help="--no-aug: resize and centre crop only")
    group.add_argument("--train-crop-mode", choices=["rrc", "rkrc", "rkrr"], help="training crop (default: rrc)")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area share of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio of the random crop")
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    group.add_argument("--color-jitter", type=float, default=0.4, help="strength of the colour jitter")
    group.add_argument("--aa", help="AutoAugment policy, for instance rand-m9-mstd0.5-inc1")
    group.add_argument("--aug-repeats", type=float, default=0, help="repeated augmentation: copies of an image")
    group.add_argument("--reprob", type=float, default=0.0, help="random erasing probability")
    group.add_argument("--remode", choices=["const", "rand", "pixel"], default="pixel", help="random erasing fill")
    group.add_argument("--recount", type=int, default=1, help="random erasing boxes")
    group.add_argument("--mixup", type=float, default=0.0, help="mixup alpha")
    group.add_argument("--cutmix", type=float, default=0.0, help="CutMix alpha")
    group.add_argument("--mixup-prob", type=float, default=1.0, help="share of batches that are mixed")
    group.add_argument("--mixup-switch-prob", type=float, default=0.5, help="share of CutMix when both are on")
    group.add_argument("--mixup-mode", choices=["batch", "pair", "elem"], default="batch", help="what shares a draw")
    group.add_argument("--mixup-off-epoch", type=int, default=0, help="stop mixing after this epoch (0: never)")

    group = parser.add_argument_group("loss")
    add_recipe_options(group, "smoothing")
    group.add_argument("--bce-loss", action=flag, default=False, help="binary cross-entropy for each class")
    group.add_argument("--bce-target-thresh", type=float, help="binarise softened targets at this value")

    group = parser.add_argument_group("optimiser")
    add_recipe_options(group, *OPTIMISER)
    group.add_argument("--grad-accum-steps", type=int, default=1, help="backward passes an update")

    group = parser.add_argument_group("schedule")
    add_recipe_options(group, *SCHEDULE)
    group.add_argument("--steps", type=int, help="stop after this many updates in all (dry runs)")

    group = parser.add_argument_group("moving average of the weights (EMA)")
    group.add_argument("--model-ema", action=flag, default=False, help="average the weights, and validate the average")
    group.add_argument("--model-ema-decay", type=float, default=0.9998, help="share that an update keeps")
    group.add_argument("--model-ema-warmup", action=flag, default=False, help="a smaller share at first")

    group = parser.add_argument_group("devices and speed")
    group.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    group.add_argument("--amp", action=flag, default=False, help="automatic mixed precision")
    group.add_argument("--amp-dtype", choices=["bfloat16", "float16"], default="bfloat16", help="its format")
    add_recipe_options(group, "channels_last")
    group.add_argument("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the model")
    group.add_argument("--sync-bn", action=flag, default=False, help="batch norm statistics over all processes")

    group = parser.add_argument_group("checkpoints and logs")
    group.add_argument("--output", type=Path, default=Path("outputs/train"), help="directory of this run")
    group.add_argument(
        "--resume", nargs="?", const="auto", metavar="STATE",
        help="go on from this .state.pt file; without a value from the one in --output, if any",
    )  # fmt: skip
    group.add_argument("--save-every-steps", type=int, default=0, help="save within epochs too, at this interval")
    group.add_argument("--eval-metric", choices=["top1", "top5", "loss"], default="top1", help="what is best")
    group.add_argument("--log-interval", type=int, default=50, help="updates between two lines")
    group.add_argument("--tensorboard", action=flag, default=False, help="write OUTPUT/tensorboard")
    group.add_argument("--seed", type=int, default=42, help="seed of weights, order and augmentation")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line over the recipe file it names; unusable input ends the program with usage."""
    parser = build_parser()
    args = parse_over_recipe(parser, argv)
    check_args(args, parser)
    return args


def check_args(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End the program where options contradict each other or a number is out of its range."""
    for name in ("batch_size", "grad_accum_steps", "epochs", "log_interval", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")
    if not args.synthetic and args.data_dir is None and not args.dataset.startswith(("hfds/", "hfids/")):
        parser.error("no data: give --data-dir (and --dataset), or --synthetic for a dry run")
    try:
        Recipe.of(args)
    except ValueError as error:
        parser.error(str(error))
    if args.aa:
        try:
            create_transform(32, is_training=True, auto_augment=args.aa)
        except (AssertionError, ValueError) as error:
            parser.error(f"--aa {args.aa}: {error}; for instance rand-m9-mstd0.5-inc1, augmix-m3-w3, original")
    if (args.mixup or args.cutmix) and args.batch_size % 2:
        parser.error(f"--batch-size is {args.batch_size}, mixup and CutMix mix pairs and need an even number")
    if args.bce_target_thresh is not None and not args.bce_loss:
        parser.error("--bce-target-thresh is an option of --bce-loss")


def recorded_args(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments that make a run what it is, without places, speeds and stops."""
    left_out = {
        "config", "output", "resume", "steps", "save_every_steps", "log_interval", "workers", "tensorboard", "device",
        "data_dir", "initial_checkpoint", "pretrained", "torchcompile",
    }  # fmt: skip
    return {name: value for name, value in vars(args).items() if name not in left_out}
