"""Images with boxes and masks of a COCO json for scripts/train_dense.py: labels, mirror, objects that are left out."""

import json

import numpy as np
import pytest
import torch
from dense_data import write_data
from image_files import write_sixteen_bits
from PIL import Image
from torch.utils.data import DataLoader

from common.images import UnusableImagesError
from dense.coco import coco_boxes, collate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images a split, as boxes, polygons and masks."""
    return write_data(tmp_path_factory.mktemp("coco"), train=4, val=4)


def test_categories_become_labels_in_the_order_of_their_ids(data):
    dataset = coco_boxes(data / "train", data / "train.json", with_masks=True, train=False)
    image, target = dataset[0]
    assert (image.shape, image.dtype) == ((3, 96, 80), torch.float32)
    assert target["labels"].tolist() == [1, 2]
    for channel, ((x1, y1, x2, y2), mask) in enumerate(
        zip(target["boxes"].int().tolist(), target["masks"], strict=True)
    ):
        assert (image[channel, y1:y2, x1:x2] > 0.8).all()
        assert mask[y1:y2, x1:x2].all() and mask.sum() == 900


def test_mirror_moves_boxes_and_masks_with_the_image(data):
    dataset = coco_boxes(data / "train", data / "train.json", with_masks=True, train=True)
    torch.manual_seed(0)
    seen = set()
    for _ in range(12):
        image, target = dataset[1]
        (x1, y1, x2, y2), mask = target["boxes"][0].int().tolist(), target["masks"][0]
        assert (image[0, y1:y2, x1:x2] > 0.8).all() and mask[y1:y2, x1:x2].all()
        seen.add(x1)
    assert len(seen) == 2


@pytest.fixture
def odd(data, tmp_path):
    """A json whose first image has a crowd, the second a box without width, the third no object."""
    content = json.loads((data / "train.json").read_text())
    content["annotations"][0]["iscrowd"] = 1
    content["annotations"][2]["bbox"][2] = 0
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] != 2]
    for entry in content["annotations"][4:]:
        del entry["iscrowd"], entry["area"]
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(content))
    return path


def test_crowds_and_empty_images_are_for_validation_only(data, odd):
    train, val = (coco_boxes(data / "train", odd, with_masks=True, train=train) for train in (True, False))
    assert [target["labels"].tolist() for _, target in map(train.__getitem__, range(3))] == [[2], [2], [1, 2]]
    assert [target["labels"].tolist() for _, target in map(val.__getitem__, range(4))] == [[1, 2], [2], [], [1, 2]]
    assert (len(train), len(val)) == (3, 4)
    assert val[0][1]["iscrowd"].tolist() == [1, 0]


def test_what_is_left_out_is_counted(data, odd):
    content = json.loads(odd.read_text())
    content["annotations"][1]["image_id"] = 77
    odd.write_text(json.dumps(content))
    train, val = (coco_boxes(data / "train", odd, with_masks=True, train=train) for train in (True, False))
    assert train.describe() == (
        f"{odd}: 2 images, 2 categories, left out 1 crowds, 1 objects of images that are not listed, "
        "1 objects without an area, 2 images without objects"
    )
    assert val.describe() == (
        f"{odd}: 4 images, 2 categories, left out 1 objects of images that are not listed, 1 objects without an area"
    )
    whole = data / "train.json"
    described = coco_boxes(data / "train", whole, with_masks=True, train=True).describe()
    assert described == f"{whole}: 4 images, 2 categories"


@pytest.mark.parametrize("sizes", [True, False])
def test_boxes_beyond_their_image_are_cut_off_or_left_out(data, tmp_path, sizes):
    content = json.loads((data / "train.json").read_text())
    # images of 96 x 80, then 96 x 96 pixels; the ids are all alike, as in many a json made by hand
    boxes = [[60, 80, 30, 30], [80, 10, 5, 5], [-10, -5, 30.5, 20], [66.3, 66, 30.5, 30]]
    for entry, box in zip(content["annotations"], boxes, strict=False):
        entry.update(bbox=box, area=900, id=1)
    if not sizes:
        for image in content["images"]:
            del image["width"], image["height"]
    path = tmp_path / "beyond.json"
    path.write_text(json.dumps(content))
    dataset = coco_boxes(data / "train", path, with_masks=True, train=False)
    assert dataset.describe() == (
        f"{path}: 4 images, 2 categories, left out 1 objects outside of their image, "
        "2 boxes cut off at the edge of their image"
    )
    dataset.check(slice(None), 1)
    first, second = dataset[0][1], dataset[1][1]
    assert (first["boxes"].tolist(), first["area"].tolist()) == ([[60, 80, 80, 96]], [320])
    assert second["boxes"].flatten().tolist() == pytest.approx([0, 0, 20.5, 15, 66.3, 66, 96.8, 96])  # rounded


def test_boxes_between_0_and_1_are_refused(data, tmp_path):
    content = json.loads((data / "train.json").read_text())
    for entry in content["annotations"]:
        entry["bbox"] = [value / 100 for value in entry["bbox"]]
    path = tmp_path / "shares.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="all boxes lie between 0 and 1, but those of COCO are in pixels"):
        coco_boxes(data / "train", path, with_masks=False, train=True)


def test_images_of_another_size_than_the_json_says_are_refused(data, tmp_path):
    for path in (data / "train").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    dataset = coco_boxes(tmp_path, data / "train.json", with_masks=False, train=True)
    dataset.check(slice(None), 2)
    Image.new("RGB", (96, 80)).save(tmp_path / "2.png")
    with pytest.raises(ValueError, match=r"2\.png is 96 x 80 pixels, by .*train\.json 80 x 96: "):
        dataset.check(slice(None), 2)
    dataset.check(slice(1, None, 2), 2)
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(ValueError, match=r"can't read .*1\.png"):
        dataset.check(slice(None), 2)


def test_sixteen_bits_become_eight_and_floats_are_refused(data, tmp_path):
    for path in (data / "train").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_sixteen_bits(tmp_path / "0.png", 257 * 100)
    Image.fromarray(np.ones((96, 96), np.float32)).save(tmp_path / "1.tiff")
    (tmp_path / "1.tiff").rename(tmp_path / "1.png")
    dataset = coco_boxes(tmp_path, data / "train.json", with_masks=False, train=False)
    assert torch.allclose(dataset[0][0], torch.tensor(100 / 255))
    with pytest.raises(UnusableImagesError, match=r"1\.png has floating-point pixels"):
        dataset[1]
    (tmp_path / "2.png").write_bytes((data / "train" / "2.png").read_bytes()[:300])
    with pytest.raises(ValueError, match=r"can't read .*2\.png: "):
        dataset[2]


@pytest.mark.parametrize("segmentation", ["none", "empty"])
def test_masks_are_learnt_from_segmentations_only(data, tmp_path, segmentation):
    content = json.loads((data / "train.json").read_text())
    content["annotations"][5]["segmentation"] = []
    if segmentation == "none":
        del content["annotations"][5]["segmentation"]
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="object 6 has no segmentation, from which mask_rcnn learns"):
        coco_boxes(data / "train", path, with_masks=True, train=True)
    assert len(coco_boxes(data / "train", path, with_masks=False, train=True)) == 4


@pytest.mark.parametrize("bbox", [None, [1, 2, 3]])
def test_an_object_without_a_box_is_named(data, tmp_path, bbox):
    content = json.loads((data / "train.json").read_text())
    content["annotations"][2]["bbox"] = bbox
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"object 3 has the bbox .*, not \[x, y, width, height\]"):
        coco_boxes(data / "train", path, with_masks=False, train=True)


def test_targets_are_plain_tensors_with_and_without_objects(data, odd):
    dataset = coco_boxes(data / "train", odd, with_masks=True, train=False)
    for index, count in ((2, 0), (3, 2)):
        image, target = dataset[index]
        assert {type(value) for value in (image, *target.values())} == {torch.Tensor}
        assert {name: tuple(value.shape) for name, value in target.items()} == {
            "boxes": (count, 4),
            "labels": (count,),
            "iscrowd": (count,),
            "area": (count,),
            "masks": (count, *image.shape[1:]),
        }
        assert (target["boxes"].dtype, target["labels"].dtype) == (torch.float32, torch.int64)
    # what the json does not say: no crowds, and the area of the box
    assert (target["iscrowd"].tolist(), target["area"].tolist()) == ([0, 0], [900, 900])


def test_loader_processes_that_do_not_share_memory_read_the_same(data):
    dataset = coco_boxes(data / "train", data / "train.json", with_masks=False, train=False)
    loader = DataLoader(dataset, 4, num_workers=1, multiprocessing_context="spawn", collate_fn=collate)
    ((images, targets),) = loader
    for number in range(4):
        image, target = dataset[number]
        assert images[number].equal(image) and targets[number]["boxes"].equal(target["boxes"])


@pytest.mark.parametrize(
    ("content", "expected"), [(None, "can't read .*No such file"), ("[]", "is no COCO file of boxes: .*list")]
)
def test_file_that_is_none_is_named(content, expected, data, tmp_path):
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=expected) as error:
        coco_boxes(data / "train", path, with_masks=False, train=True)
    assert str(path) in str(error.value)
