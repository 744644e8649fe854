"""Weights that a run of train.py left: built and fed as the run did, by validate.py, export.py and visualize.py."""

import argparse
import csv
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from train_runs import photo_folder

import export
import train
import validate
from common.run_options import resolve_preprocessing

RUN = ["--img-size", 96, "--crop-pct", 0.6, "--mean", 0.2, "--std", 0.4, "--interpolation", "bilinear"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


def measure(photos, weights, *options):
    results = weights.parent / "results.json"
    model = ["--model", "test_resnet", "--checkpoint", weights, "--num-classes", 2, "--workers", 0, "--device", "cpu"]
    validate.main([str(option) for option in (photos, *model, "--results-file", results, *options)])
    return json.loads(results.read_text())[0]


@pytest.mark.parametrize("channels", [3, 1])
def test_the_run_and_validate_measure_one_number(photos, tmp_path, channels):
    given = [] if channels == 3 else ["--model-kwargs", f"in_chans={channels}"]
    options = ["--model", "test_resnet", "--num-classes", 2, "--in-chans", channels, "-b", 4, "-j", 0, "--epochs", 1]
    options += ["--data-dir", photos, "--device", "cpu", "--lr", 0.05, "--output", tmp_path, *RUN]
    train.main([str(option) for option in options])
    (row,) = csv.DictReader((tmp_path / "summary.csv").open())
    found = measure(photos, tmp_path / "last.safetensors", *given)
    assert (found["input_size"], found["crop_pct"], found["mean"]) == ([channels, 96, 96], 0.6, [0.2] * channels)
    assert (found["loss"], found["top1"]) == pytest.approx((float(row["eval_loss"]), float(row["eval_top1"])), rel=1e-4)
    # what the command says counts more, and weights elsewhere are of no run
    assert measure(photos, tmp_path / "last.safetensors", "--crop-pct", 1, *given)["loss"] != found["loss"]
    (tmp_path / "args.yaml").unlink()
    assert measure(photos, tmp_path / "last.safetensors", *given)["input_size"] == [channels, 160, 160]


def test_the_models_options_are_the_runs(photos, tmp_path, monkeypatch):
    model = ["--model", "resnet18_fdconv"]
    options = ["channels=(20,24,28,32)", "layers=(1,1,1,1)", "num_bands=8", "ksm=False"]
    given = ["--num-classes", 2, "--data-dir", photos, "--device", "cpu", "--output", tmp_path, *RUN, "-b", 4, "-j", 0]
    train.main([str(option) for option in (*model, *given, "--steps", 1, "--model-kwargs", *options)])
    weights, results = tmp_path / "last.safetensors", tmp_path / "results.json"
    known = [*model, "--checkpoint", weights]
    validate.main([str(o) for o in (photos, *known, "--workers", 0, "--device", "cpu", "--results-file", results)])
    (row,) = csv.DictReader((tmp_path / "summary.csv").open())
    assert json.loads(results.read_text())[0]["loss"] == pytest.approx(float(row["eval_loss"]), rel=1e-4)
    export.main(
        ["resnet18_fdconv", str(tmp_path / "m.pt2"), *map(str, known[2:]), "--fixed-size", "--fixed-batch", "1"]
    )
    with pytest.raises(SystemExit, match="does not fit"):  # what is said counts more
        validate.main([str(o) for o in (photos, *known, "--model-kwargs", "ksm=True", "--device", "cpu")])


def test_size_for_testing_is_not_for_the_weights_of_a_run(tmp_path):
    model = timm.create_model("resnet18.a1_in1k")
    for run, size in [(False, 288), (True, 224)]:
        if run:
            (tmp_path / "args.yaml").write_text("model: resnet18_fdconv\nimg_size: null\n")
        config = resolve_preprocessing(model, {"img_size": None}, tmp_path / "a.safetensors", test_size=True)
        assert config["input_size"] == (3, size, size)


def test_a_file_is_for_images_as_the_run_had_them(tmp_path):
    (tmp_path / "args.yaml").write_text("model: test_resnet\nimg_size: 96\nmean: [0.2]\n")
    model = timm.create_model("test_resnet")
    args = argparse.Namespace(checkpoint=tmp_path / "a.safetensors", img_size=None, model_kwargs={})
    assert export.prepare_input(model, args)["input_size"] == (3, 96, 96)
    args.img_size = [64, 80]
    config = export.prepare_input(model, args)
    assert (config["input_size"], config["mean"]) == ((3, 64, 80), (0.2, 0.2, 0.2))


def test_a_published_model_s_channels_are_kept_at_another_size(tmp_path):
    timm.models.save_for_hf(timm.create_model("test_resnet", in_chans=1), tmp_path, safe_serialization=True)
    model = timm.create_model(f"local-dir:{tmp_path}")
    for size in (None, 64):
        assert resolve_preprocessing(model, {"img_size": size}, None)["input_size"][0] == 1
    model = timm.create_model("test_resnet")
    assert resolve_preprocessing(model, {"img_size": 64}, None)["input_size"] == (3, 64, 64)


def test_calibration_sees_images_as_the_run_did(photos, tmp_path, monkeypatch):
    """Less a mean beside which photos are nothing, each number is the same."""
    seen = []
    model = timm.create_model("resnet18_fdconv", num_classes=2)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "args.yaml").write_text("model: resnet18_fdconv\nimg_size: 64\nmean: [1000.0]\nstd: [1000.0]\n")
    monkeypatch.setattr(
        "exporting.calibration.to_static",
        lambda model, loader: seen.extend(images for images, _ in loader) or model,
    )
    flags = ["--checkpoint", tmp_path / "model.safetensors", "--num-classes", 2, "--static", "--calibrate", photos]
    export.main([str(flag) for flag in ("resnet18_fdconv", tmp_path / "m.torchscript", *flags, "--fixed-size")])
    (images,) = seen
    assert images.shape == (20, 3, 64, 64)
    torch.testing.assert_close(images, torch.full_like(images, -1), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("text", "told"), [("a: [", "can't read the options of the run"), ("- 1", "has no options")])
def test_options_that_cannot_be_read_are_one_line(photos, tmp_path, text, told):
    save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "m.safetensors")
    (tmp_path / "args.yaml").write_text(text)
    with pytest.raises(SystemExit, match=told) as stop:
        measure(photos, tmp_path / "m.safetensors")
    assert "\n" not in stop.value.code
