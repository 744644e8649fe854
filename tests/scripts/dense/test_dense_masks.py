"""Images with masks for scripts/train_dense.py: classes that are not there."""

import pytest
from dense_data import write_data

from dense.masks import MaskFolders


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
