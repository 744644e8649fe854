#!/usr/bin/env python3
"""Train a small ResNet from scratch on Fashion-MNIST with SGD: static, FDConv, and FDConv part by part."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from common.command_line import fail, needs_extra

with needs_extra("experiment_fashion_mnist.py", "experiments"):
    import matplotlib
    import torch
    from timm.models.resnet import BasicBlock, ResNet
    from torch import Tensor, nn
    from torch.nn.utils import parametrize
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy
    from torchvision.transforms import v2

    from common.training_recipe import Recipe
    from experiments.fashion_data import FILES, FOLDER, read_split
    from experiments.image_tensors import ImageTensors
    from experiments.runs import create_parser, experiment, parse_args
    from fdconv_zoo import FDConv2d, FDLinear, convert, convert_to_fdconv
    from fdconv_zoo.choice import named_dynamic_layers, named_fd_layers
    from fdconv_zoo.layers.fourier import column_scale
    from pictures.parallel import draw_parallel, mean_similarity, parallel_weights
    from pictures.weights import STYLE

NUM_BANDS = 16
CHANNELS = (20, 40)
# As many parameters as FDConv with its gates.
WIDE_CHANNELS = (24, 48)
# Keyword arguments of FDConv2d; `static` and `static_wide` are not converted.
VARIANTS: dict[str, dict[str, Any]] = {
    "static": {},
    "static_wide": {},
    "fdconv": {},
    "fdconv_official_scaling": {},
    "fdw": {"ksm": False, "fbm": False},
    "fdw_ksm": {"fbm": False},
    "fdw_fbm": {"ksm": False},
    "fdconv_1_band": {"num_bands": 1},
    "fdconv_4_bands": {"num_bands": 4},
    "fdconv_64_bands": {"num_bands": 64},
}
# Other dynamic convolutions in the same four layers; keyword arguments of theirs, the temperature of their papers, and
# for what part of the run it falls.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "condconv": ("condconv", {}),
    "dyconv": ("dyconv", {}),
    "dcd": ("dcd", {"pool": 2}),
    "odconv": ("odconv", {}),
    "odconv_1x": ("odconv", {"num_kernels": 1}),
    "kw": ("kw", {}),
    "kw_4x": ("kw", {"cell_num_ratio": 4}),
}
TEMPERATURES = {"dyconv": ([30.0, 1.0], 10 / 100), "odconv": ([30.0, 1.0], 10 / 100), "kw": ([1.0, 0.0], 20 / 300)}
DESCRIPTION = f"""Train a small ResNet from scratch on Fashion-MNIST with SGD, and compare at equal epochs.

  static                     the static network: two BasicBlocks of {CHANNELS[0]} and {CHANNELS[1]} channels
  static_wide                the same, {WIDE_CHANNELS[0]} and {WIDE_CHANNELS[1]} channels: about as large as fdconv
  fdconv                     FDW, KSM and FBM, {NUM_BANDS} frequency groups, Parseval-scaled spectra
  fdconv_official_scaling    the same, with the parameter of the official code, S / (min(Cin, Cout) // 2)
  fdw, fdw_ksm, fdw_fbm      parts of FDConv
  fdconv_{{1,4,64}}_band(s)    other numbers of frequency groups
  {", ".join(METHODS)}
                             other dynamic convolutions in the same layers, with their papers' temperatures; not among
                             the defaults

All variants of a seed start as the same function (but static_wide, which can't, and all methods with --start drawn) and
see the same images in the same order with the same crops and flips; the figures are those of the last epoch on the
10,000 test images. How alike the weights are that a layer mixes, groups or kernels, is written down for each."""
EXAMPLES = """examples:
  apt-get install dataset-fashion-mnist
  experiment_fashion_mnist.py --variants static fdconv fdconv_official_scaling
  experiment_fashion_mnist.py --variants static fdconv condconv dyconv dcd odconv odconv_1x kw kw_4x \\
      --results-file results/fashion_mnist/methods.json                  FDConv beside the methods of its paper's tables
  experiment_fashion_mnist.py --variants condconv dyconv odconv --start drawn \\
      --results-file results/fashion_mnist/drawn.json --draw-mixed outputs/mixed    as their papers draw them, pictures
  experiment_fashion_mnist.py --seeds 0 --epochs 1 --train-images 2000 --results-file outputs/try.json
  experiment_fashion_mnist.py --variants static fdconv --lr 0.1 --results-file outputs/lr0.1.json"""
NORMALIZE = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.286], [0.353])]


class OfficialScaling(nn.Module):
    """Parametrisation of an FDConv layer's spectrum by the parameter of the official code, S / (min(Cin, Cout) // 2).

    The layer computes the same; a step of SGD on this parameter moves the weight
    2 (min(Cin, Cout) // 2)^2 / (R C) times as far as a step on the static weight.
    """

    def __init__(self, layer: FDConv2d | FDLinear) -> None:
        super().__init__()
        rows, columns = layer.fdw.rows, layer.fdw.columns
        factor = min(layer.static_shape[:2]) // 2 / (rows * columns) ** 0.5
        self.register_buffer("scale", factor * column_scale(columns)[:, None])

    def forward(self, parameter: Tensor) -> Tensor:
        return parameter * self.scale

    def right_inverse(self, spectrum: Tensor) -> Tensor:
        return spectrum / self.scale


def use_official_scaling(model: nn.Module) -> nn.Module:
    """Parametrise the spectra of a model as the official code does, in place; it computes the same function."""
    for _, layer in named_fd_layers(model):
        parametrize.register_parametrization(layer.fdw, "spectrum", OfficialScaling(layer))
    return model


def create_model(variant: str, seed: int, drawn: bool = False) -> nn.Module:
    """A variant of the network; those of a seed compute the same function at first, but for `static_wide`.

    timm's ResNet with a narrow 3x3 stem of stride 2 and two BasicBlocks, on maps of 14 and 7 pixels a side.

    Args:
        variant: One of `VARIANTS` or `METHODS`.
        seed: Of the random numbers.
        drawn: Layers of `METHODS` start as their papers draw them, not as the static network.
    """
    torch.manual_seed(seed)
    first, last = WIDE_CHANNELS if variant == "static_wide" else CHANNELS
    model = ResNet(
        BasicBlock, (1, 1, 1, 1), num_classes=10, in_chans=1, channels=(first, last, last, last), stem_type="deep",
        stem_width=first // 2, zero_init_last=False,
    )  # fmt: skip
    model.maxpool = model.layer3 = model.layer4 = nn.Identity()  # 28 pixels have no need of them
    if variant in ("static", "static_wide"):
        return model
    if variant in METHODS:
        method, options = METHODS[variant]
        model = convert(model, method, lambda name, _: False if "downsample" in name else None, **options)
        for _, layer in named_dynamic_layers(model) if drawn else ():
            layer.start_from_scratch()
        return model
    model = convert_to_fdconv(model, **{"num_bands": NUM_BANDS, "recompute": False, **VARIANTS[variant]})
    return use_official_scaling(model) if variant == "fdconv_official_scaling" else model


def with_temperature(variant: str, recipe: Recipe) -> Recipe:
    """The recipe with the temperature of the variant's method, for the part of the epochs that its paper has it."""
    method, _ = METHODS.get(variant, ("", {}))
    if method not in TEMPERATURES:
        return recipe
    values, part = TEMPERATURES[method]
    return replace(recipe, temperature=values, temperature_epochs=part * recipe.epochs)


@torch.no_grad()
def describe_mixed(variant: str, seed: int, model: nn.Module, pictures: Path | None) -> dict[str, dict[str, float]]:
    """How alike the weights are that each layer of a trained network mixes.

    Args:
        variant: Of the network.
        seed: Its seed.
        model: The network.
        pictures: Folder for a picture of its last layer, or None.

    Returns:
        Mean cosine between two of them, of each layer that mixes more than one.
    """
    mixed = {name: parallel_weights(layer) for name, layer in named_dynamic_layers(model)}
    mixed = {name: parallel for name, parallel in mixed.items() if len(parallel.matrices) > 1}
    if not mixed:
        return {}
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            draw_parallel(list(mixed.values())[-1]).savefig(pictures / f"{variant}_{seed}.png")
    return {"similarity": {name: round(mean_similarity(parallel.matrices), 4) for name, parallel in mixed.items()}}


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    argv = sys.argv[1:] if argv is None else argv
    parser = create_parser("fashion_mnist", DESCRIPTION, EXAMPLES, [*VARIANTS, *METHODS], list(VARIANTS))
    parser.add_argument(
        "--data-dir", type=Path, default=FOLDER, metavar="DIR",
        help="of the four .gz files (default: %(default)s, where the Debian package puts them)",
    )  # fmt: skip
    parser.add_argument(
        "--train-images", type=int, default=12000, metavar="N", help="train on the first N (default: %(default)s)"
    )
    parser.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip")
    parser.add_argument(
        "--start", default="converted", choices=("converted", "drawn"),
        help="of other methods' layers: as the static network, or as their papers draw them (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--draw-mixed", type=Path, metavar="DIR", help="draw there what each run's last layer mixes (Figs. 1 and 5)"
    )
    try:
        args = parse_args(parser, argv)
        images, labels = read_split(args.data_dir, "train")
        augment = v2.Compose([v2.RandomCrop(28, padding=2), v2.RandomHorizontalFlip(args.hflip), *NORMALIZE])
        train_set = ImageTensors(images[: args.train_images], labels[: args.train_images], augment)
        test_set = ImageTensors(*read_split(args.data_dir, "t10k"), v2.Compose(NORMALIZE))
        files = [name for names in FILES.values() for name in names]
        facts = {
            "settings": {
                "experiment": "fashion_mnist",
                "channels": CHANNELS,
                "num_bands": NUM_BANDS,
                "train_images": len(train_set),
                "test_images": len(test_set),
                "hflip": args.hflip,
                # files from before it was an option have none
                **({} if args.start == "converted" else {"start": args.start}),
                **asdict(Recipe.of(args)),
            },
            "data_sha256": {name: hashlib.sha256((args.data_dir / name).read_bytes()).hexdigest() for name in files},
        }
        metrics = MetricCollection({"accuracy": MulticlassAccuracy(10, average="micro")})
        experiment(
            args,
            facts,
            create_model=partial(create_model, drawn=args.start == "drawn"),
            train_set=train_set,
            test_set=test_set,
            metrics=metrics,
            argv=argv,
            adapt=with_temperature,
            describe=partial(describe_mixed, pictures=args.draw_mixed),
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise fail(parser.prog, error) from error


if __name__ == "__main__":
    main()
