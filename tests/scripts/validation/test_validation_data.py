"""What validate.py measures on, and by which numbers; what it says of models and images that it leaves out."""

import csv
import json
import tarfile
from typing import ClassVar

import pytest
import timm
import torch
from image_files import write_images, write_sixteen_bits
from safetensors.torch import save, save_file
from torchvision.datasets import FakeData

from tests.fakehub import FakeHub, as_endpoint
from validate import main

QUICK = ["--batch-size", "4", "--workers", "0", "--device", "cpu", "--img-size", "32"]
NAMES = ("ant", "bee", "cow")


@pytest.fixture
def run(tmp_path):
    """A directory as train.py leaves it, of a model that says cow, whatever it sees."""
    model = timm.create_model("test_resnet", num_classes=3)
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor([0.0, 1.0, 2.0])
    folder = tmp_path / "run"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model_best.safetensors")
    (folder / "classes.txt").write_text("\n".join(NAMES))
    return folder


def measure(data, run, *options):
    results = run / "results.json"
    checkpoint = ["--checkpoint", run / "model_best.safetensors", "--num-classes", 3]
    arguments = [data, "--model", "test_resnet", *checkpoint, *QUICK, "--results-file", results, *options]
    main([str(argument) for argument in arguments])
    return json.loads(results.read_text())[0]


def error_of(*arguments):
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert "\n" not in stop.value.code
    return stop.value.code


def test_classes_without_images_do_not_shift_the_others(tmp_path, run, capsys):
    data = write_images(tmp_path / "data", "val/bee", "val/cow", count=3)
    row = measure(data, run)
    assert (row["top1"], row["images"]) == (50.0, 6)
    told = capsys.readouterr().err
    assert "warning" not in told and f"{data}/val: 6 images, 2 classes, none of 1 more (ant)\n" in told
    (run / "classes.txt").unlink()
    assert measure(data, run)["top1"] == 0  # cow is taken for the second output
    assert "3 outputs, the data 2 classes" in capsys.readouterr().err


def test_torchvision_s_folders_have_the_numbers_of_the_run(tmp_path, run):
    data = write_images(tmp_path / "data", "val/bee", "val/cow", count=3)
    named = ["--dataset", "torch/image_folder"]
    row = measure(data, run, *named)
    assert (row["top1"], row["images"]) == (50.0, 6)
    # In the order of numbers, where torchvision has that of letters.
    (run / "classes.txt").write_text("1\n2\n10\n")
    data = write_images(tmp_path / "numbers", "val/1", "val/2", "val/10", "val/10", count=2)
    assert measure(data, run, *named)["top1"] == pytest.approx(100 / 3)
    by_folder = measure(data, run)
    by_name = measure(data, run, "--dataset", "torch/folder")
    assert by_name["loss"] == pytest.approx(by_folder["loss"])
    (run / "classes.txt").write_text("1\n2\n3\n")
    with pytest.raises(SystemExit, match=r"1 classes of the data are not in .*classes\.txt: 10"):
        measure(data, run, *named)


def test_torchvision_s_other_sets_keep_their_numbers_or_are_refused(tmp_path, run, monkeypatch):
    class Three(FakeData):
        classes = NAMES
        class_to_idx: ClassVar = {name: index for index, name in enumerate(NAMES)}

    data = Three(6, (3, 32, 32), 3, transform=None)
    monkeypatch.setattr("validation.datasets.create_dataset", lambda *_, **__: data)
    named = ["--dataset", "torch/three"]
    assert measure(tmp_path, run, *named)["images"] == 6
    (run / "classes.txt").write_text("cow\nbee\nant\n")
    with pytest.raises(SystemExit, match=r"torch/three numbers its classes otherwise than .*classes\.txt"):
        measure(tmp_path, run, *named)
    (run / "classes.txt").write_text("n01440764\nn01443537\nn01484850\n")  # other names for the same, perhaps
    assert measure(tmp_path, run, *named)["images"] == 6


def test_a_published_model_has_the_numbers_of_its_label_names(tmp_path, run, capsys):
    data = write_images(tmp_path / "data", "val/bee", "val/cow", count=3)
    model = timm.create_model("test_resnet", checkpoint_path=run / "model_best.safetensors", num_classes=3)
    published = tmp_path / "published"
    timm.models.save_for_hf(model, published, {"label_names": NAMES}, safe_serialization=True)
    options = ["--model", f"local-dir:{published}", *QUICK, "--results-file", tmp_path / "results.json"]
    main([str(argument) for argument in (data, *options)])
    assert json.loads((tmp_path / "results.json").read_text())[0]["top1"] == 50
    assert "none of 1 more (ant)" in capsys.readouterr().err
    write_images(data, "val/dog")
    assert "1 classes of the data are not in the model's label_names: dog" in error_of(data, *options)


def test_unknown_classes_are_refused(tmp_path, run):
    data = write_images(tmp_path / "data", "cow", "dog")
    with pytest.raises(SystemExit, match=r"1 classes of the data are not in .*classes\.txt: dog"):
        measure(data, run)
    (tmp_path / "map.txt").write_text("cow\n")
    with pytest.raises(SystemExit, match=r"1 classes of the data are not in .*map\.txt: dog"):
        measure(data, run, "--class-map", tmp_path / "map.txt")


def test_a_tar_file_has_the_formats_and_numbers_of_a_folder(tmp_path, run):
    data = write_images(tmp_path / "data", "bee", "cow", count=3, ending=".webp")
    write_sixteen_bits(data / "cow" / "deep.tif", 40000)
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(data, ".")
    for source in (data, tmp_path / "data.tar"):
        row = measure(source, run)
        assert (row["images"], row["top1"]) == (7, pytest.approx(100 * 4 / 7))


def test_a_missing_split_is_an_error(tmp_path, run):
    data = write_images(tmp_path / "data", "train/cow", "test/cow")
    with pytest.raises(SystemExit, match=r"no folder for the split validation; its folders: test, train\. Choose one"):
        measure(data, run)
    assert measure(data, run, "--split", "test")["images"] == 2
    flat = write_images(tmp_path / "flat", "ant", "cow")
    assert measure(flat, run)["images"] == 4
    with pytest.raises(SystemExit, match="no folder for the split test; its folders: ant, cow"):
        measure(flat, run, "--split", "test")


def test_images_that_cannot_be_read_are_left_out_and_listed_once(tmp_path, run, capsys):
    data = write_images(tmp_path / "data", "ant", "cow", count=3)
    (data / "cow" / "1.png").write_text("no image")
    (data / "cow" / "notes.md").touch()
    row = measure(data, run)
    assert (row["top1"], row["images"], row["corrupt_images"]) == (40.0, 5, 1)
    told = capsys.readouterr().err
    assert told.count("cow/1.png") == 1 and "left out 1 images" in told
    assert "6 images, 2 classes, none of 1 more (bee), 1 .md ignored" in told
    for image in data.rglob("*.png"):
        image.write_text("no image")
    with pytest.raises(SystemExit, match="test_resnet: no image can be read"):
        measure(data, run)


def test_models_that_are_not_to_be_had_are_told_at_the_end(tmp_path, monkeypatch, capsys):
    data = write_images(tmp_path / "data", "ant", "bee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    model = timm.create_model("test_resnet")
    arguments = [data, "--model", "test_convnext*", "test_resnet", *QUICK, "--results-file", tmp_path / "results.json"]
    with as_endpoint(FakeHub()) as hub:
        hub.add("timm/test_resnet.r160_in1k", {"model.safetensors": save(model.state_dict())})
        message = error_of(*arguments)
    count = len(timm.list_models("test_convnext*", pretrained=True))
    assert f"{count} of {count + 1} models were not measured: test_convnext: no pretrained weights" in message
    assert [row["model"] for row in json.loads((tmp_path / "results.json").read_text())] == ["test_resnet"]


def test_rows_name_the_weights_that_were_used(tmp_path, capsys):
    data = write_images(tmp_path / "data", "ant", "bee")
    checkpoint, results = tmp_path / "w.safetensors", tmp_path / "results.csv"
    arguments = ["mobilenetv2_100_fdconv.ra_in1k_converted", "--compare-static", "--checkpoint", checkpoint]
    save_file(timm.create_model("mobilenetv2_100", num_classes=2).state_dict(), checkpoint)
    main([str(a) for a in (data, "--model", *arguments, "--num-classes", 2, *QUICK, "--results-file", results)])
    with results.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["model"], row["checkpoint"]) for row in rows] == [
        ("mobilenetv2_100_fdconv", str(checkpoint)),
        ("mobilenetv2_100", str(checkpoint)),
    ]
    assert "ra_in1k" not in capsys.readouterr().out


def test_images_of_a_size_that_the_model_does_not_take(tmp_path):
    name, checkpoint = "swin_tiny_patch4_window7_224", tmp_path / "w.safetensors"
    options = {"depths": [1, 1, 1, 1], "num_classes": 2}
    save_file(timm.create_model(name, **options).state_dict(), checkpoint)
    data = write_images(tmp_path / "data", "ant", "bee")
    arguments = [data, "--model", name, "--checkpoint", checkpoint, "--num-classes", 2, *QUICK, "--model-kwargs"]
    message = error_of(*arguments, "depths=[1,1,1,1]")
    assert "takes 224 x 224 images, not 32 x 32: give --model-kwargs img_size=32" in message
