"""Arguments of ``train_dense.py``: one parser for the command line and for recipe files."""

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import timm.utils

from common.command_line import HelpFormatter
from common.recipes import parse_over_recipe
from common.training_recipe import check_optimizer

DETECTION_HEADS = ("faster_rcnn", "mask_rcnn", "retinanet", "maskdino_instance")
MASK_HEADS = ("mask_rcnn", "maskdino_instance")  # those of the detection heads that find masks
SEGMENTATION_HEADS = ("upernet", "unet", "deeplabv3plus", "mask2former", "maskdino")
POOLING_HEADS = ("upernet", "deeplabv3plus")  # they have a batch norm of images pooled to one place
TRANSFORMERS_HEADS = ("mask2former", "maskdino", "maskdino_instance")
EXAMPLES = """examples:
  # Faster R-CNN on COCO, on one machine with 8 GPUs
  torchrun --nproc_per_node=8 scripts/train_dense.py --config scripts/configs/dense/faster_rcnn_1x_coco.yaml \\
      --train-images coco/train2017 --train-annotations coco/annotations/instances_train2017.json \\
      --val-images coco/val2017 --val-annotations coco/annotations/instances_val2017.json --output outputs/faster_rcnn

  # UPerNet on folders of images and of masks (PNG, a pixel is the index of its class)
  python scripts/train_dense.py --head upernet --backbone resnet50_fdconv --num-classes 150 \\
      --train-images ade/images/training --train-masks ade/annotations/training \\
      --val-images ade/images/validation --val-masks ade/annotations/validation --reduce-zero-label

  # Mask2Former on Cityscapes
  python scripts/train_dense.py --config scripts/configs/dense/mask2former_cityscapes.yaml \\
      --train-images leftImg8bit/train --train-masks gtFine/train --val-images leftImg8bit/val --val-masks gtFine/val

  # go on after a stop (starts afresh if there is nothing to resume)
  python scripts/train_dense.py --config outputs/faster_rcnn/args.yaml --resume

  # dry run of a recipe on your data: one epoch of two batches of training, and two of validation; where a recipe has
  # steps, --steps 2 instead of --epochs 1
  python scripts/train_dense.py --config scripts/configs/dense/mask_rcnn_1x_coco.yaml --limit-batches 2 --epochs 1 ...

docs/dense_training.md tells more.
"""


def build_parser() -> argparse.ArgumentParser:
    """Build the parser; every long option is also a key of a recipe file (``batch_size: 2``)."""
    parser = argparse.ArgumentParser(
        prog="train_dense.py",
        usage="train_dense.py [--config FILE] --train-images DIR ... [--output DIR] [--resume] [options]",
        description="Train detection, instance and semantic segmentation on a timm backbone, FDConv or static.",
        epilog=EXAMPLES,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    flag = argparse.BooleanOptionalAction
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="yaml file of options; the command line overrides it"
    )

    group = parser.add_argument_group("model")
    group.add_argument("--head", default="faster_rcnn", choices=(*DETECTION_HEADS, *SEGMENTATION_HEADS))
    group.add_argument("--backbone", default="resnet50_fdconv", help="timm model name, with a tag to choose weights")
    group.add_argument("--pretrained", action=flag, default=False, help="start from the tag's weights")
    group.add_argument(
        "--initial-checkpoint", type=Path, metavar="FILE",
        help="start from the backbone weights in this file, those of the static model included",
    )  # fmt: skip
    group.add_argument("--backbone-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs, metavar="KEY=VALUE")
    group.add_argument("--head-kwargs", nargs="*", default={}, action=timm.utils.ParseKwargs, metavar="KEY=VALUE",
                       help="of torchvision's detector, smp's model, Mask2FormerConfig or MaskDinoConfig")  # fmt: skip
    group.add_argument(
        "--freeze-bn", action=flag, default=False,
        help="keep the backbone's batch norms, KSM's among them, as they are: for pretrained weights and few images "
        "a process",
    )  # fmt: skip

    group = parser.add_argument_group("data")
    for split in ("train", "val"):
        group.add_argument(f"--{split}-images", type=Path, metavar="DIR", help="folder of images")
        group.add_argument(f"--{split}-annotations", type=Path, metavar="FILE", help="COCO json, for detection")
        group.add_argument(f"--{split}-masks", type=Path, metavar="DIR", help="folder of PNG masks, for segmentation")
    group.add_argument("--image-suffix", default="", metavar="END",
                       help="images for segmentation are the files whose names end so (_leftImg8bit.png); "
                       "default: all")  # fmt: skip
    group.add_argument("--mask-suffix", default=".png", metavar="END",
                       help="what a mask's name has in place of --image-suffix, or of the image's .jpg")  # fmt: skip
    group.add_argument("--num-classes", type=int, metavar="N", help="classes of the masks; boxes: from the json")
    group.add_argument("--ignore-index", type=int, default=255, metavar="N", help="pixels without a class")
    group.add_argument(
        "--reduce-zero-label", action=flag, default=False, help="0 has no class, 1 is the first: ADE20K's masks"
    )
    group.add_argument(
        "--mask-values", type=int, nargs="*", default=[], metavar="V",
        help="values of the masks that are classes 0, 1, ...; pixels of others have no class",
    )  # fmt: skip
    group.add_argument("--min-size", type=int, nargs="+", default=[800], metavar="N",
                       help="shorter side for detection; of several, one at random in training and the last "
                       "in validation")  # fmt: skip
    group.add_argument("--max-size", type=int, default=1333, metavar="N", help="longer side for detection, at most")
    group.add_argument("--crop-size", type=int, nargs=2, default=[512, 512], metavar=("H", "W"),
                       help="crops for segmentation")  # fmt: skip
    group.add_argument("--scale-size", type=int, default=512, metavar="N",
                       help="shorter side for segmentation, before --scale and the crop")  # fmt: skip
    group.add_argument("--scale", type=float, nargs=2, default=[0.5, 2.0], metavar=("MIN", "MAX"))
    group.add_argument("--workers", "-j", type=int, default=4, metavar="N", help="loader processes")

    group = parser.add_argument_group("optimisation")
    group.add_argument("--batch-size", "-b", type=int, default=2, metavar="N", help="images of each process")
    group.add_argument("--grad-accum-steps", type=int, default=1, metavar="N")
    group.add_argument("--opt", default="momentum", help="timm optimiser; momentum is SGD")
    group.add_argument("--momentum", type=float, default=0.9)
    group.add_argument("--weight-decay", type=float, default=1e-4)
    group.add_argument("--lr-base", type=float, default=0.02, help="rate at --lr-base-size images an update")
    group.add_argument("--lr-base-size", type=int, default=16, metavar="N", help="linear scaling to other numbers")
    group.add_argument("--lr", type=float, help="rate outright")
    group.add_argument("--static-lr-scale", type=float, default=1.0, metavar="F",
                       help="factor of the rate for backbone weights other than FDConv's modulation")  # fmt: skip
    group.add_argument("--sched", default="multistep", choices=("multistep", "poly", "cosine", "constant"))
    group.add_argument("--decay-milestones", type=int, nargs="+", default=[8, 11], metavar="EPOCH")
    group.add_argument("--decay-rate", type=float, default=0.1, help="at each milestone")
    group.add_argument("--poly-power", type=float, default=0.9)
    group.add_argument("--warmup-steps", type=int, default=500, metavar="N", help="updates of linear warmup")
    group.add_argument("--warmup-factor", type=float, default=0.001, help="of the rate, at the first update")
    group.add_argument("--epochs", type=int, default=12, metavar="N")
    group.add_argument("--steps", type=int, metavar="N", help="updates of the whole run, instead of --epochs")
    group.add_argument("--clip-grad", type=float, metavar="NORM")

    group = parser.add_argument_group("run")
    group.add_argument("--output", type=Path, default=Path("outputs/dense"), metavar="DIR")
    group.add_argument("--resume", action=flag, default=False,
                       help="go on from last.ckpt in --output, as if there had been no stop")  # fmt: skip
    group.add_argument("--val-interval", type=int, default=1, metavar="EPOCHS",
                       help="between validations; there is one at the end too")  # fmt: skip
    group.add_argument("--limit-batches", type=int, metavar="N", help="at most N batches an epoch and a validation")
    group.add_argument("--precision", default="32-true", help="of Lightning: 32-true, bf16-mixed, 16-mixed")
    group.add_argument("--device", default="auto", help="Lightning accelerator: auto, cpu, cuda")
    group.add_argument("--seed", type=int, default=0)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line over the recipe file it names; unusable input ends the program with usage."""
    parser = build_parser()
    args = parse_over_recipe(parser, argv)
    check_args(args, parser)
    return args


def check_args(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """End the program where data is missing for the head, or a number is out of its range."""
    for name in ("batch_size", "grad_accum_steps", "epochs", "steps", "limit_batches", "val_interval"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}, it must be at least 1")
    try:
        check_optimizer(args.opt)
    except ValueError as error:
        parser.error(str(error))
    kind = "annotations" if args.head in DETECTION_HEADS else "masks"
    data = [f"{split}_{part}" for split in ("train", "val") for part in ("images", kind)]
    missing = [f"--{name.replace('_', '-')}" for name in data if getattr(args, name) is None]
    if missing:
        parser.error(f"{args.head} needs {', '.join(missing)}")
    if args.head in SEGMENTATION_HEADS and args.num_classes is None:
        parser.error(f"{args.head} needs --num-classes")
    if args.head in POOLING_HEADS and args.batch_size == 1:
        parser.error(
            f"{args.head} has a batch norm of images pooled to one place, which one image gives no statistics: "
            "--batch-size 2 or more, or --head unet or mask2former"
        )
    if args.mask_values and (len(args.mask_values) != args.num_classes or min(args.mask_values) < 0):
        parser.error(f"--mask-values {args.mask_values} must be --num-classes {args.num_classes} values, from 0 up")
    packages = ("transformers", "scipy") if args.head in TRANSFORMERS_HEADS else ()
    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        parser.error(f"{args.head} needs {' and '.join(absent)}: pip install {' '.join(absent)}")
