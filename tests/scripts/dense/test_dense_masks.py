"""Images with masks for scripts/train_dense.py: classes that are not there."""

import shutil

import pytest
import torch
from dense_data import SMALL, masks, write_data
from torchvision.io import write_png

from dense.masks import MaskFolders
from train_dense import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images a split, as boxes, polygons and masks."""
    return write_data(tmp_path_factory.mktemp("coco"), train=4, val=4)


def test_mask_of_an_unknown_class_is_refused(data):
    options = {
        "ignore_index": 255, "mean": (0.5,) * 3, "std": (0.5,) * 3, "scale_size": 96, "crop_size": None,
        "scale": (1.0, 1.0), "image_suffix": "", "mask_suffix": ".png", "mask_values": [],
    }  # fmt: skip
    folders = data / "val", data / "val_masks"
    with pytest.raises(ValueError, match=r"has classes \[2\], allowed are 0 to 1 and 255"):
        MaskFolders(*folders, num_classes=2, reduce_zero_label=False, **options)[0]
    mask = MaskFolders(*folders, num_classes=2, reduce_zero_label=True, **options)[0][1]
    assert mask.unique().tolist() == [0, 1, 255]


@pytest.mark.parametrize("fault", ["class", "size", "no mask"])
def test_all_masks_are_checked_before_the_training(data, tmp_path, fault):
    shutil.copytree(data / "train_masks", tmp_path / "masks")
    bad = tmp_path / "masks" / "3.png"
    if fault == "class":
        write_png(torch.full((1, 96, 96), 9, dtype=torch.uint8), str(bad))
    elif fault == "size":
        write_png(torch.zeros(1, 50, 96, dtype=torch.uint8), str(bad))
    else:
        bad.write_text("no mask")
    output = tmp_path / "run"
    options = ["--head", "upernet", *SMALL, *masks(data), "--train-masks", str(tmp_path / "masks")]
    with pytest.raises(SystemExit, match=r"3\.png") as stop:
        main([*options, "--output", str(output)])
    assert "\n" not in stop.value.code
    assert not output.exists()
