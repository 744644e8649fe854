"""A small data set for scripts/train_dense.py, and the options that name it."""

import json
from pathlib import Path

import torch
from torchvision.io import write_png

BACKBONE = ["--backbone", "resnet18_fdconv", "--backbone-kwargs", "channels=(24,32,48,64)", "layers=(1,1,1,1)"]
BACKBONE += ["num_bands=8"]
SMALL = [*BACKBONE, "--batch-size", "2", "-j", "0", "--warmup-steps", "2", "--device", "cpu", "--epochs", "1"]
SMALL_DETECTOR = ["--head-kwargs", "rpn_post_nms_top_n_train=200", "rpn_post_nms_top_n_test=50"]
SMALL_DETECTOR += ["box_batch_size_per_image=64"]
SMALL_MASK2FORMER = ["--head-kwargs", "num_queries=5", "train_num_points=256", "num_attention_heads=4"]
SMALL_MASK2FORMER += ["encoder_layers=1", "decoder_layers=2"]
for name in ("feature_size", "mask_feature_size", "hidden_dim", "encoder_feedforward_dim", "dim_feedforward"):
    SMALL_MASK2FORMER.append(f"{name}=32")
SMALL_MASKDINO = ["--head-kwargs", "num_queries=5", "num_points=64", "denoising_queries=6", "encoder_layers=1"]
SMALL_MASKDINO += ["decoder_layers=2"]
for name in ("hidden_dim", "mask_dim", "encoder_ffn_dim", "decoder_ffn_dim"):
    SMALL_MASKDINO.append(f"{name}=32")


def write_data(root: Path, **counts: int) -> Path:
    """Write images of 96 x 80 or 96 pixels, each with a red and a green square, as boxes, polygons and masks.

    Args:
        root: Where to: images in `train`, masks in `train_masks`, boxes in `train.json`.
        **counts: Images of each split.
    """
    generator = torch.Generator().manual_seed(0)
    side = 30
    for split, count in counts.items():
        (root / split).mkdir()
        (root / f"{split}_masks").mkdir()
        images, annotations = [], []
        for number in range(count):
            height, width = 96, 80 + 16 * (number % 2)
            image = torch.randint(0, 60, (3, height, width), generator=generator, dtype=torch.uint8)
            mask = torch.zeros(1, height, width, dtype=torch.uint8)
            for color, category in enumerate((3, 7)):
                x, y = int(torch.randint(0, width - side, (), generator=generator)), 8 + 44 * color
                image[color, y : y + side, x : x + side] = 220
                mask[:, y : y + side, x : x + side] = color + 1
                corners = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": number, "category_id": category, "iscrowd": 0,
                        "bbox": [x, y, side, side], "area": side * side, "segmentation": [corners],
                    }
                )  # fmt: skip
            write_png(image, str(root / split / f"{number}.png"))
            write_png(mask, str(root / f"{split}_masks" / f"{number}.png"))
            images.append({"id": number, "file_name": f"{number}.png", "height": height, "width": width})
        categories = [{"id": 7, "name": "green"}, {"id": 3, "name": "red"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(content))
    return root


def boxes(data: Path) -> list[str]:
    options = ["--min-size", "96", "--max-size", "128"]
    for split in ("train", "val"):
        options += [f"--{split}-images", str(data / split), f"--{split}-annotations", str(data / f"{split}.json")]
    return options


def masks(data: Path) -> list[str]:
    options = ["--num-classes", "3", "--scale-size", "96", "--crop-size", "64", "64"]
    for split in ("train", "val"):
        options += [f"--{split}-images", str(data / split), f"--{split}-masks", str(data / f"{split}_masks")]
    return options


def write_cityscapes(root: Path) -> Path:
    """Write two images of 48 x 96 pixels a split in Cityscapes' folders: road (id 7), car (26), a rim without class.

    Returns:
        The folder that has leftImg8bit and gtFine.
    """
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for kind in ("leftImg8bit", "gtFine"):
            (root / kind / split / city).mkdir(parents=True)
        for number in range(2):
            labels = torch.full((1, 48, 96), 7, dtype=torch.uint8)
            labels[:, 10:30, 20 + number : 60] = 26
            labels[:, :4] = 3
            name = f"{city}_000000_00000{number}"
            image = labels.expand(3, -1, -1) * 9
            write_png(image, str(root / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png"))
            folder = root / "gtFine" / split / city
            write_png(labels, str(folder / f"{name}_gtFine_labelIds.png"))
            train_ids = torch.full_like(labels, 255)
            train_ids[labels == 7], train_ids[labels == 26] = 0, 13
            write_png(train_ids, str(folder / f"{name}_gtFine_labelTrainIds.png"))
            # Cityscapes has this beside them
            write_png(labels.expand(3, -1, -1), str(folder / f"{name}_gtFine_color.png"))
    return root


def cityscapes(data: Path) -> list[str]:
    options = ["--scale-size", "48", "--crop-size", "32", "64"]
    for split in ("train", "val"):
        options += [f"--{split}-images", str(data / "leftImg8bit" / split)]
        options += [f"--{split}-masks", str(data / "gtFine" / split)]
    return options
