"""Both splits of train.py's data: the right images, the same numbers for the same classes."""

import tarfile

import pytest
from image_files import write_images
from timm.data import ImageNetInfo
from torchvision.datasets import FakeData

from training.args import parse_args
from training.datasets import check_classes, check_same_classes, class_names, create_datasets

SPLITS = ("train/a", "train/b", "train/c")


def open_sets(root, *options):
    return create_datasets(parse_args(["--data-dir", str(root), *options]))


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("places", [SPLITS, ("a", "b"), (*SPLITS, "test/a")])
def test_a_missing_split_is_an_error_not_the_whole_root(tmp_path, dataset, places):
    write_images(tmp_path, *places)
    with pytest.raises(ValueError, match=r"no folder for the split .*; its folders: .*--train-split and --val-split"):
        open_sets(tmp_path, "--dataset", dataset)


def test_a_tar_file_cannot_be_both_splits(tmp_path):
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(write_images(tmp_path / "data", "a"), ".")
    with pytest.raises(ValueError, match="is one file, which can't be both splits"):
        open_sets(tmp_path / "data.tar")


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_validation_has_the_numbers_of_training(tmp_path, dataset):
    write_images(tmp_path, *SPLITS, "val/b", "val/c")
    train, val = open_sets(tmp_path, "--dataset", dataset)
    assert [train[i][1] for i in range(len(train))] == [0, 0, 1, 1, 2, 2]
    assert [val[i][1] for i in range(len(val))] == [1, 1, 2, 2]
    assert class_names(train, 3) == ["a", "b", "c"]


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
def test_unknown_classes_in_validation_are_refused(tmp_path, dataset):
    write_images(tmp_path, *SPLITS, "val/b", "val/d")
    with pytest.raises(ValueError, match=r"unknown classes: d|classes that training has not: d"):
        open_sets(tmp_path, "--dataset", dataset)


def test_a_class_map_numbers_both_and_must_have_all(tmp_path):
    write_images(tmp_path, *SPLITS, "val/c")
    (tmp_path / "map.txt").write_text("c\nb\na\n")
    train, val = open_sets(tmp_path, "--class-map", "map.txt")
    assert ([train[i][1] for i in range(len(train))], val[0][1]) == ([2, 2, 1, 1, 0, 0], 0)
    (tmp_path / "map.txt").write_text("c\na\n")
    with pytest.raises(ValueError, match="unknown classes: b"):
        open_sets(tmp_path, "--class-map", "map.txt")
    with pytest.raises(ValueError, match=r"can't read --class-map nowhere\.txt"):
        open_sets(tmp_path, "--class-map", "nowhere.txt")


def test_some_of_imagenets_classes_keep_their_outputs(tmp_path):
    """As validate.py takes them, where all outputs are kept."""
    synsets = ImageNetInfo().label_names()
    write_images(tmp_path, *(f"{split}/{synsets[number]}" for split in ("train", "val") for number in (7, 99)))
    for count, numbers in ((1000, [7, 99]), (2, [0, 1])):
        train, val = create_datasets(parse_args(["--data-dir", str(tmp_path), "--num-classes", str(count)]))
        assert [sorted({label for _, label in each.reader.samples}) for each in (train, val)] == [numbers] * 2
        assert class_names(train, count)[numbers[1]] == synsets[99]
    assert class_names(train, 5) == [synsets[7], synsets[99]]  # of the first outputs


def test_each_split_is_told_in_a_line(tmp_path, caplog):
    caplog.set_level("INFO", "train")
    write_images(tmp_path, *SPLITS, "val/b")
    (tmp_path / "train" / "a" / "x.gif").touch()
    open_sets(tmp_path)
    assert f"{tmp_path / 'train'}: 6 images, 3 classes, 1 .gif ignored" in caplog.text
    assert f"{tmp_path / 'val'}: 2 images, 1 class, none of 2 more (a, c)" in caplog.text


def test_one_class_or_too_many_outputs_are_refused(tmp_path, caplog):
    write_images(tmp_path / "one", "train/a", "val/a")
    with pytest.raises(ValueError, match="one class only, a: a classifier needs two"):
        check_classes(open_sets(tmp_path / "one")[0], 1000, chosen=True)
    train, _ = open_sets(write_images(tmp_path / "three", *SPLITS, "val/a"))
    with pytest.raises(ValueError, match=r"3 classes, the model 1000 outputs: give --num-classes 3"):
        check_classes(train, 1000, chosen=False)
    check_classes(train, 3, chosen=False)
    check_classes(FakeData(4, (3, 8, 8), 10), 1000, chosen=False)
    check_classes(train, 5, chosen=True)
    assert "3 classes, the model 5 outputs" in caplog.text
    assert class_names(train, 5) == ["a", "b", "c"]  # of the first outputs: validate.py goes by them


def test_a_resumed_run_has_the_classes_it_had(tmp_path):
    path = tmp_path / "classes.txt"
    check_same_classes(path, ["ant", "bee"])
    path.write_text("ant\nbee\n")
    for names in (["ant", "bee"], []):
        check_same_classes(path, names)
    with pytest.raises(ValueError, match=r"output 1 is bee by .*classes\.txt and cow by the data of now"):
        check_same_classes(path, ["ant", "cow"])
