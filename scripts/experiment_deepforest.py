#!/usr/bin/env python3
"""Tree crowns in aerial pictures: Faster R-CNN by train_dense.py with a static backbone and with one of FDConv."""

import argparse
import csv
import hashlib
import json
import shlex
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.command_line import fail, needs_extra

with needs_extra("experiment_deepforest.py", "dense"):
    import train_dense
    from common.record import cpu_name, git_commit, timestamp, versions, write_json
    from common.wheels import wheel_file
    from experiments.images import read_image

EXAMPLES = """examples:
  pip install --no-deps deepforest
  OMP_NUM_THREADS=1 python scripts/experiment_deepforest.py
  python scripts/experiment_deepforest.py --only-data     # just the tiles and COCO files, in outputs/deepforest/data
"""
# Scene of the wheel and its annotations; the scene for validation is another flight tile of the first one's site.
SCENES = {
    "train": ("2019_YELL_2_528000_4978000_image_crop2", "OSBS_029", "SOAP_061"),
    "val": ("2019_YELL_2_541000_4977000_image_crop",),
}
BACKBONES = {"static": ("resnet18", ()), "fdconv": ("resnet18_fdconv", ("num_bands=16",))}
NARROW = ("channels=(24,32,48,64)", "layers=(1,1,1,1)")
# fewer proposals than torchvision's 2000 and 512: a processor of one thread is enough
HEAD = ("rpn_post_nms_top_n_train=200", "rpn_post_nms_top_n_test=100", "box_batch_size_per_image=64")
Box = tuple[float, float, float, float]


def read_boxes(path: Path) -> list[Box]:
    """Read the boxes of a Pascal VOC file as x1, y1, x2, y2; their names (tree, alive, dead) are all trees.

    Raises:
        ValueError: It can't be read.
    """
    try:
        found = ElementTree.parse(path).getroot().iter("bndbox")
        return [tuple(float(box.findtext(key)) for key in ("xmin", "ymin", "xmax", "ymax")) for box in found]
    except (ElementTree.ParseError, TypeError, ValueError) as error:
        raise ValueError(f"can't read {path}: {error}") from error


def boxes_in_tile(boxes: Sequence[Box], x: int, y: int, size: int) -> list[Box]:
    """Return the boxes that are at least half inside of a tile, clipped to it, in its own coordinates.

    Args:
        boxes: Of the whole scene.
        x: Left column of the tile.
        y: Top row of the tile.
        size: Pixels a side.
    """
    inside = []
    for x1, y1, x2, y2 in boxes:
        left, top, right, bottom = max(x1 - x, 0), max(y1 - y, 0), min(x2 - x, size), min(y2 - y, size)
        if right > left and bottom > top and (right - left) * (bottom - top) >= 0.5 * (x2 - x1) * (y2 - y1):
            inside.append((left, top, right, bottom))
    return inside


def write_split(scenes: Sequence[tuple[Path, Path]], size: int, folder: Path, name: str) -> dict[str, int]:
    """Cut scenes into whole square tiles, and write them as PNGs in `folder/name` with `folder/name.json` for COCO.

    Args:
        scenes: Pictures and their boxes.
        size: Pixels a side.
        folder: Where to.
        name: Of the split.

    Returns:
        Numbers of tiles and boxes.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for picture_path, boxes_path in scenes:
        picture, boxes = read_image(picture_path).convert("RGB"), read_boxes(boxes_path)
        for y in range(0, picture.height - size + 1, size):
            for x in range(0, picture.width - size + 1, size):
                tile = {"id": len(images), "file_name": f"{len(images):04}.png", "height": size, "width": size}
                picture.crop((x, y, x + size, y + size)).save(folder / name / tile["file_name"])
                images.append(tile)
                for x1, y1, x2, y2 in boxes_in_tile(boxes, x, y, size):
                    box = [x1, y1, x2 - x1, y2 - y1]
                    entry = {"id": len(annotations) + 1, "image_id": tile["id"], "category_id": 1, "iscrowd": 0}
                    annotations.append({**entry, "bbox": box, "area": box[2] * box[3]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "tree"}]}
    (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return {"tiles": len(images), "boxes": len(annotations)}


def train_command(variant: str, args: argparse.Namespace) -> list[str]:
    """Arguments of train_dense.py for a variant."""
    backbone, options = BACKBONES[variant]
    data = args.output / "data"
    command = ["--head", "faster_rcnn", "--backbone", backbone, "--backbone-kwargs", *NARROW, *options]
    command += ["--head-kwargs", *HEAD, "--min-size", str(args.tile), "--max-size", str(args.tile)]
    for split in SCENES:
        command += [f"--{split}-images", str(data / split), f"--{split}-annotations", str(data / f"{split}.json")]
    command += ["--batch-size", "4", "--workers", "0", "--opt", "adamw", "--lr", "1e-3", "--weight-decay", "0.05"]
    command += ["--sched", "cosine", "--warmup-steps", "20", "--clip-grad", "10", "--seed", str(args.seed)]
    command += ["--device", args.device, "--epochs", str(args.epochs), "--output", str(args.output / variant)]
    return command


def read_scores(output: Path) -> list[dict[str, float]]:
    """Return the scores of each epoch of a run of train_dense.py."""
    with (output / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/box_mAP"]]
    return [{key: float(row[f"val/box_{key}"]) for key in ("mAP", "mAP50", "mAP75")} for row in rows]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="experiment_deepforest.py", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("outputs/deepforest"), metavar="DIR", help="data and runs")
    parser.add_argument("--results-file", type=Path, default=Path("results/deepforest/results.json"), metavar="FILE")
    parser.add_argument("--tile", type=int, default=200, metavar="N", help="pixels a side (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only-data", action="store_true", help="convert, and train nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run from the command line, or from ``argv``."""
    args = parse_args(argv)
    arguments = sys.argv[1:] if argv is None else argv
    try:
        scenes = {
            split: [
                tuple(wheel_file("deepforest", f"data/{name}{suffix}", "deepforest") for suffix in (".png", ".xml"))
                for name in names
            ]
            for split, names in SCENES.items()
        }
        counts = {split: write_split(pairs, args.tile, args.output / "data", split) for split, pairs in scenes.items()}
    except (ValueError, OSError) as error:
        raise fail("experiment_deepforest.py", error) from error
    print(f"{args.output / 'data'}: {counts}", file=sys.stderr)
    if args.only_data:
        return
    files = [path for pairs in scenes.values() for pair in pairs for path in pair]
    results: dict[str, Any] = {
        "command": shlex.join(["experiment_deepforest.py", *arguments]),
        "scenes": SCENES,
        "data": counts,
        "data_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
        "versions": versions(),
        "commit": git_commit(),
        "cpu": cpu_name(),
        "runs": [],
    }
    for variant in BACKBONES:
        command = train_command(variant, args)
        start, cpu_start = time.perf_counter(), time.process_time()
        train_dense.main(command)
        results["runs"].append(
            {
                "variant": variant,
                "seed": args.seed,
                "wall_seconds": round(time.perf_counter() - start, 1),
                "cpu_seconds": round(time.process_time() - cpu_start, 1),
                "date": timestamp(),
                "command": shlex.join(["train_dense.py", *command]),
                "epochs": read_scores(args.output / variant),
            }
        )
        write_json(args.results_file, results)
    for run in results["runs"]:
        print(f"{run['variant']}: " + ", ".join(f"{key} {value:.4f}" for key, value in run["epochs"][-1].items()))
    print(f"all figures: {args.results_file}", file=sys.stderr)


if __name__ == "__main__":
    main()
