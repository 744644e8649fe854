"""Folders of images: which one is a split, what its classes are numbered, what is refused."""

import os
import subprocess
import sys

import pytest
from image_files import write_images
from timm.data import create_dataset
from train_runs import SCRIPTS

from common.image_folders import FolderReader, find_split, find_split_or_root


def test_a_split_goes_by_its_synonyms(tmp_path):
    write_images(tmp_path, "training/a", "eval/a")
    assert find_split(tmp_path, "train") == tmp_path / "training"
    assert find_split(tmp_path, "validation") == tmp_path / "eval"
    assert find_split(tmp_path, ".") == tmp_path


@pytest.mark.parametrize("places", [["train/a", "train/b"], ["a", "b"], ["train/a", "test/a"]])
def test_a_missing_split_is_an_error_that_names_the_folders(tmp_path, places):
    write_images(tmp_path, *places)
    folders = sorted({place.partition("/")[0] for place in places})
    with pytest.raises(ValueError, match=f"no folder for the split validation; its folders: {', '.join(folders)}$"):
        find_split(tmp_path, "validation")


def test_a_folder_without_splits_is_one_itself_unless_one_is_asked_for(tmp_path):
    write_images(tmp_path / "flat", "cat", "dog")
    assert find_split_or_root(tmp_path / "flat", None) == tmp_path / "flat"
    with pytest.raises(ValueError, match="no folder for the split test; its folders: cat, dog"):
        find_split_or_root(tmp_path / "flat", "test")
    write_images(tmp_path / "split", "train/cat", "test/cat")
    with pytest.raises(ValueError, match="no folder for the split validation; its folders: test, train"):
        find_split_or_root(tmp_path / "split", None)
    assert find_split_or_root(tmp_path / "split", "testing") == tmp_path / "split" / "test"


def test_splits_in_capitals_or_deeper_are_not_one_set(tmp_path):
    write_images(tmp_path / "capitals", "Train/cat", "Val/cat")
    with pytest.raises(ValueError, match="no folder for the split validation; its folders: Train, Val"):
        find_split_or_root(tmp_path / "capitals", None)
    write_images(tmp_path / "deeper", "images/train/cat", "images/val/cat")
    with pytest.raises(ValueError, match=r"has a folder images/train: give .*images, which has the splits"):
        find_split_or_root(tmp_path / "deeper", None)
    assert find_split_or_root(tmp_path / "deeper", ".") == tmp_path / "deeper"
    # images and classes of such names are no splits
    write_images(tmp_path / "flat", "cat/tabby", "dog/collie")
    (tmp_path / "flat" / "cat" / "test").touch()
    assert find_split_or_root(tmp_path / "flat", None) == tmp_path / "flat"


def test_order_and_numbers_are_timms(tmp_path):
    write_images(tmp_path, "class10/x", "class2", "Class1", count=11)
    ours, theirs = FolderReader(tmp_path), create_dataset("", root=str(tmp_path)).reader
    assert ours.class_to_idx == theirs.class_to_idx
    assert ours.samples == theirs.samples
    assert ours.filename(3) == theirs.filename(3)


@pytest.mark.parametrize("seed", ["1", "2", "3", "4"])
def test_names_that_are_alike_to_timm_have_one_order(tmp_path, seed):
    """In each process: sets of strings have another order in each."""
    write_images(tmp_path, "A", "a", "01", "1", "b", "B")
    script = f"""
from pathlib import Path
from common.image_folders import FolderReader
reader = FolderReader(Path({str(tmp_path)!r}))
print(*reader.class_to_idx, *(label for _, label in reader.samples))
"""
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(SCRIPTS)}
    out = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout == "01 1 A a B b 0 1 0 1 2 3 2 3 4 5 4 5\n"


def test_classes_keep_the_numbers_they_are_given(tmp_path):
    write_images(tmp_path, "b", "c")
    reader = FolderReader(tmp_path, {"a": 0, "b": 1, "c": 2})
    assert sorted({label for _, label in reader.samples}) == [1, 2]
    assert reader.describe() == f"{tmp_path}: 4 images, 2 classes, none of 1 more (a)"
    with pytest.raises(ValueError, match=r"has 1 unknown classes: c$"):
        FolderReader(tmp_path, {"a": 0, "b": 1})


def test_hidden_copies_are_no_class_and_no_image(tmp_path):
    write_images(tmp_path, "a", "a/.ipynb_checkpoints", "b")
    (tmp_path / "b" / "._0.png").write_bytes(b"macOS")
    assert FolderReader(tmp_path).describe() == f"{tmp_path}: 4 images, 2 classes"


def test_what_is_not_read_is_counted(tmp_path):
    write_images(tmp_path, "a", "b")
    for name in ("1.heic", "2.HEIC", "a.txt", ".DS_Store", "b.txt", "c.txt", "README"):
        (tmp_path / "a" / name).touch()
    described = FolderReader(tmp_path).describe()
    assert described == f"{tmp_path}: 4 images, 2 classes, 3 .txt ignored, 2 .heic ignored, 1 without an ending ignored"


def test_images_outside_of_the_classes_are_refused(tmp_path):
    write_images(tmp_path, "a", ".")
    with pytest.raises(ValueError, match=r"2 images lie in .* itself, in no folder of a class: .*0\.png"):
        FolderReader(tmp_path)


def test_no_images_is_an_error_that_tells_what_there_is(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.heic").touch()
    with pytest.raises(ValueError, match=r"Found 0 images in .*, 1 \.heic ignored; images end in \.bmp, "):
        FolderReader(tmp_path)


def test_folders_within_those_of_classes_are_told_to_be_the_classes(tmp_path):
    described = FolderReader(write_images(tmp_path, "cat/monday", "dog/monday", "dog/friday")).describe()
    assert described == f"{tmp_path}: 6 images, 2 classes by the innermost folders (friday, monday)"
