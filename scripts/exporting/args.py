"""Command line of ``export.py``."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from timm.utils import ParseKwargs

from common.onnx_file import check_packages

DESCRIPTION = "Export a model to ONNX, an exported program or TorchScript, and check the file against the model."
EXAMPLES = """examples:
  export.py resnet50_fdconv resnet50.onnx                     weights from the Hub; any batch, height and width
  export.py resnet50_fdconv resnet50.pt2                      for torch.export.load and AOTInductor
  export.py resnet50_fdconv resnet50.torchscript              for torch.jit.load and libtorch
  export.py resnet50_fdconv flowers.onnx --checkpoint model_best.pth.tar --num-classes 102
  export.py resnet50_fdconv static.onnx --checkpoint model_best.pth.tar --num-classes 102 --static --calibrate data
                                                              a static model of mean weights, and what it costs
  export.py swin_tiny_fdconv swin.onnx --fixed-size           Swin: any batch, one image size
  export.py resnet18_fdconv features.onnx --no-weights --features
"""
FORMATS = {".onnx": "ONNX", ".pt2": "exported program", ".torchscript": "TorchScript"}
# Differences of a float32 model from itself in another order of operations stay below it.
TOLERANCE = 1e-4
# And of a model in half precision from one in single precision, below this.
HALF_TOLERANCE = 3e-2


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="a model's name, with or without a tag")
    parser.add_argument("output", type=Path, metavar="FILE", help=f"to write: {', '.join(FORMATS)}")

    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="instead of pretrained weights; a static model's is converted")
    add("--use-ema", action="store_true", help="the checkpoint's averaged weights")
    add("--no-weights", action="store_true", help="random weights: to see whether and how a model exports")
    add("--num-classes", type=int, help="outputs of the classifier, for --checkpoint")
    add("--features", action="store_true", help="the feature maps of a backbone instead of logits")
    add("--model-kwargs", nargs="*", default={}, action=ParseKwargs, metavar="KEY=VALUE")
    add("--half", action="store_true", help="weights and images in float16")

    add = parser.add_argument_group("static").add_argument
    add("--static", action="store_true", help="a static model, each layer with its weight at gates of one ...")
    add(
        "--calibrate",
        type=Path,
        metavar="DIR",
        help="... or with the mean of its weights over images of DIR, a folder as validate.py takes: its training "
        "split if there is one. Prints the accuracy on the validation split before and after",
    )
    add("--images", type=int, default=256, metavar="N", help="images for the mean (default: %(default)s)")

    add = parser.add_argument_group("input").add_argument
    add(
        "--img-size",
        type=int,
        nargs="+",
        metavar="N",
        help="one side or height and width (default: the run's that left the checkpoint, else the model's own)",
    )
    add("--fixed-batch", type=int, metavar="N", help="a file for batches of N only (default: any)")
    add("--fixed-size", action="store_true", help="a file for this image size only (default: any)")

    add = parser.add_argument_group("check").add_argument
    add(
        "--tolerance",
        type=float,
        help=f"largest relative difference (default: {TOLERANCE:g}, with --half {HALF_TOLERANCE:g})",
    )
    add("--opset", type=int, help="ONNX operator set (default: PyTorch's)")
    args = parser.parse_args(argv)
    if args.tolerance is None:
        args.tolerance = HALF_TOLERANCE if args.half else TOLERANCE
    return args


def check_args(args: argparse.Namespace) -> None:
    """Refuse what can't work before any work starts.

    Raises:
        ValueError: Names the argument.
    """
    if args.output.suffix not in FORMATS:
        raise ValueError(f"{args.output} must end in one of {', '.join(FORMATS)}: the ending says what to write")
    if args.output.suffix == ".onnx":
        check_packages("onnxruntime")
    if args.opset and args.output.suffix != ".onnx":
        raise ValueError(f"--opset is for .onnx, not for {args.output.suffix}")
    if args.checkpoint and not args.checkpoint.is_file():
        raise ValueError(f"there is no checkpoint {args.checkpoint}")
    if args.use_ema and not args.checkpoint:
        raise ValueError("--use-ema needs --checkpoint")
    if args.no_weights and args.checkpoint:
        raise ValueError("--no-weights and --checkpoint exclude each other")
    if args.calibrate and not args.static:
        raise ValueError("--calibrate is for --static")
    if args.calibrate and not args.calibrate.is_dir():
        raise ValueError(f"there is no folder {args.calibrate}")
    if args.calibrate and args.features:
        raise ValueError("--calibrate prints accuracies, which --features have none of")
    if args.images < 1:
        raise ValueError(f"--images {args.images}: at least 1")
    if args.img_size and (len(args.img_size) > 2 or min(args.img_size) < 1):
        raise ValueError(f"--img-size takes one or two positive numbers, got {' '.join(map(str, args.img_size))}")
    if args.fixed_batch is not None and args.fixed_batch < 1:
        raise ValueError(f"--fixed-batch {args.fixed_batch}: at least 1")
    if not args.tolerance > 0:
        raise ValueError(f"--tolerance {args.tolerance}: above 0")
