"""Images with masks for scripts/train_dense.py: classes that are not there."""

import shutil

import numpy as np
import pytest
import torch
from dense_data import SMALL, masks, write_data
from image_files import write_sixteen_bits
from PIL import Image
from torchvision.io import write_png

from common.images import UnusableImagesError
from dense.masks import MaskFolders
from train_dense import main


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images a split, as boxes, polygons and masks."""
    return write_data(tmp_path_factory.mktemp("coco"), train=4, val=4)


def open_folders(images, masks, **options):
    defaults = {
        "num_classes": 2, "reduce_zero_label": True, "ignore_index": 255, "mean": (0.5,) * 3, "std": (0.5,) * 3,
        "scale_size": 96, "crop_size": None, "scale": (1.0, 1.0), "image_suffix": "", "mask_suffix": ".png",
        "mask_values": [],
    }  # fmt: skip
    return MaskFolders(images, masks, **{**defaults, **options})


def test_masks_beside_the_images_are_no_images(data, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    for path in (data / "train").iterdir():
        Image.open(path).save(both / f"{path.stem}.jpg")
        shutil.copy(data / "train_masks" / path.name, both / f"{path.stem}.png")
    assert [(image.suffix, mask.suffix) for image, mask in open_folders(both, both).pairs] == [(".jpg", ".png")] * 4
    with pytest.raises(ValueError, match="would be its own mask: --image-suffix and --mask-suffix"):
        open_folders(data / "train", data / "train")


def test_masks_without_a_class_are_told(data, tmp_path, capsys):
    """Masks of 0 and 255, as painting tools write them: 255 is no class, and nothing would be learnt."""
    for split in ("train", "val"):
        shutil.copytree(data / split, tmp_path / split)
        (tmp_path / f"{split}_masks").mkdir()
        for path in (tmp_path / split).iterdir():
            mask = np.full((Image.open(path).height, Image.open(path).width), 255, dtype=np.uint8)
            mask[:8] = 0
            Image.fromarray(mask).save(tmp_path / f"{split}_masks" / f"{path.stem}.png")
    options = ["--head", "upernet", *SMALL, *masks(tmp_path), "--output", str(tmp_path / "run")]
    message = f"no pixel of class 1 in {tmp_path / 'train_masks'}; 255 is no class (--ignore-index, --mask-values)"
    with pytest.raises(SystemExit, match=r"train_dense\.py: error: ") as caught:
        main([*options, "--num-classes", "2"])
    assert message in str(caught.value)
    with pytest.raises(SystemExit, match="fewer than a batch"):
        main([*options, "--num-classes", "2", "--mask-values", "0", "255", "--batch-size", "99"])
    assert "no pixel" not in capsys.readouterr().err
    folders = open_folders(tmp_path / "train", tmp_path / "train_masks", num_classes=4, reduce_zero_label=False)
    assert folders.check(slice(None), workers=2)[1:] == [0, 0, 0]
    assert folders.check(slice(99, None), workers=2) == [0] * folders.num_classes  # a rank without an image


def test_mask_of_an_unknown_class_is_refused(data):
    folders = data / "val", data / "val_masks"
    with pytest.raises(ValueError, match=r"has classes \[2\], allowed are 0 to 1 and 255"):
        open_folders(*folders, reduce_zero_label=False)[0]
    mask = open_folders(*folders)[0][1]
    assert mask.unique().tolist() == [0, 1, 255]


@pytest.fixture
def pair(tmp_path):
    """A folder of images and one of masks, still empty."""
    folders = tmp_path / "images", tmp_path / "masks"
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bits_become_eight_and_other_files_are_counted(pair, ending):
    images, masks = pair
    write_sixteen_bits(images / f"a{ending}", 257 * 100)
    Image.new("L", (32, 32), 1).save(masks / "a.png")
    (images / "notes.txt").touch()
    folders = open_folders(*pair, scale_size=32)
    assert folders.describe() == f"{images}: 1 images, 1 .txt ignored"
    assert torch.allclose(folders[0][0], torch.tensor((100 / 255 - 0.5) / 0.5))


@pytest.mark.parametrize(
    ("pixels", "place", "message"),
    [
        (np.ones((32, 32), np.float32), "images", r"images/a\.tif has floating-point pixels"),
        (np.ones((32, 32), np.float32), "masks", r"masks/a\.tif has floating-point values: a mask has integers"),
        (np.full((32, 32), -1, np.int32), "masks", r"masks/a\.tif has the negative class -1"),
    ],
)
@pytest.mark.parametrize("mask_values", [[], [3, 7]])
def test_pixels_that_mean_nothing_are_refused_before_the_training(pair, pixels, place, message, mask_values):
    for folder in pair:
        Image.fromarray(np.full((32, 32), 1, np.uint8)).save(folder / "a.tif")
    Image.fromarray(pixels).save(pair[0].parent / place / "a.tif")
    folders = open_folders(*pair, mask_suffix=".tif", mask_values=mask_values)
    with pytest.raises((ValueError, UnusableImagesError), match=message):
        folders.check(slice(None), workers=1)
    with pytest.raises((ValueError, UnusableImagesError), match=message):
        folders[0]


@pytest.mark.parametrize("reduce_zero_label", [False, True])
def test_ignored_pixels_may_be_negative_beside_values_of_masks(pair, reduce_zero_label):
    Image.fromarray(np.full((32, 32), 1, np.uint8)).save(pair[0] / "a.tif")
    pixels = np.full((32, 32), 7, np.int32)
    pixels[:8], pixels[8:12] = -1, 11
    Image.fromarray(pixels).save(pair[1] / "a.tif")
    options = {"mask_values": [7, 11], "ignore_index": -1, "reduce_zero_label": reduce_zero_label}
    folders = open_folders(*pair, mask_suffix=".tif", **options)
    expected = [4 * 32, 0] if reduce_zero_label else [20 * 32, 4 * 32]
    assert list(folders.check(slice(None), workers=1)) == expected
    assert (folders[0][1] == -1).sum() >= 8 * 32


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
