"""scripts/experiment_deepforest.py: boxes in tiles, and scenes as COCO files that train_dense.py reads."""

import json

import pytest
import torch
from PIL import Image

from dense.args import parse_args as parse_train_dense
from dense.coco import coco_boxes
from experiment_deepforest import BACKBONES, boxes_in_tile, parse_args, read_boxes, train_command, write_split

BOXES = [(10, 10, 30, 40), (95, 20, 115, 30), (40, 90, 50, 130), (150, 150, 170, 180)]


@pytest.fixture
def scene(tmp_path):
    """A scene of 230 x 210 pixels whose boxes are white."""
    picture = Image.new("RGB", (230, 210))
    lines = []
    for x1, y1, x2, y2 in BOXES:
        picture.paste((255, 255, 255), (x1, y1, x2, y2))
        corners = f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax>"
        lines.append(f"<object><name>Tree</name><bndbox>{corners}</bndbox></object>")
    picture.save(tmp_path / "scene.png")
    (tmp_path / "scene.xml").write_text(f"<annotation>{''.join(lines)}</annotation>")
    return tmp_path / "scene.png", tmp_path / "scene.xml"


def test_boxes_are_read(scene, tmp_path):
    assert read_boxes(scene[1]) == BOXES
    broken = tmp_path / "broken.xml"
    for content in ("no xml", "<a><bndbox><xmin>1</xmin></bndbox></a>"):
        broken.write_text(content)
        with pytest.raises(ValueError, match=r"can't read .*broken\.xml"):
            read_boxes(broken)


def test_boxes_at_least_half_inside_are_clipped_to_the_tile():
    assert boxes_in_tile(BOXES, 0, 0, 100) == [(10, 10, 30, 40)]
    assert boxes_in_tile(BOXES, 100, 0, 100) == [(0, 20, 15, 30)]
    assert boxes_in_tile(BOXES, 0, 100, 100) == [(40, 0, 50, 30)]


def test_scenes_become_tiles_that_train_dense_reads(scene, tmp_path):
    assert write_split([scene, scene], 100, tmp_path / "data", "train") == {"tiles": 8, "boxes": 8}
    content = json.loads((tmp_path / "data" / "train.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [f"{index:04}.png" for index in range(8)]
    assert len({entry["id"] for entry in content["annotations"]}) == 8
    dataset = coco_boxes(tmp_path / "data" / "train", tmp_path / "data" / "train.json", with_masks=False, train=False)
    for image, target in dataset:
        inside = torch.zeros(100, 100, dtype=torch.bool)
        for x1, y1, x2, y2 in target["boxes"].int().tolist():
            inside[y1:y2, x1:x2] = True
        assert (image[:, inside] == 1).all()
        assert inside.any()


@pytest.mark.parametrize("variant", list(BACKBONES))
def test_commands_are_of_train_dense(variant, tmp_path):
    args = parse_args(["--output", str(tmp_path), "--epochs", "5", "--tile", "300"])
    parsed = parse_train_dense(train_command(variant, args))
    assert (parsed.backbone, parsed.epochs, parsed.min_size) == (BACKBONES[variant][0], 5, [300])
    assert parsed.backbone_kwargs["channels"] == (24, 32, 48, 64)
    assert parsed.val_annotations == tmp_path / "data" / "val.json"
