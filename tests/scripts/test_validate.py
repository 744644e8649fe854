"""scripts/validate.py on real photos with real weights: what it measures, every flag, every mistake."""

import argparse
import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import ImageNetInfo

import fdconv_zoo  # noqa: F401, registers the models

SCRIPTS = Path(__file__).parents[2] / "scripts"
FDCONV = "mobilenetv2_100_fdconv"
STATIC = "mobilenetv2_100"
QUICK = ["--interpolation", "bilinear", "--batch-size", "10", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def scripts():
    """The scripts import each other plainly, as they do when Python runs one of them."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def validate(scripts):
    torch.set_num_threads(1)
    return importlib.import_module("validate").main


@pytest.fixture(scope="module")
def models(scripts):
    return importlib.import_module("common.models")


@pytest.fixture(scope="module")
def static_weights(scripts):
    return importlib.import_module("common.demo_data").read_static_weights()


@pytest.fixture(scope="module")
def checkpoint(static_weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "mobilenetv2.safetensors"
    save_file(static_weights, path)
    return path


@pytest.fixture(scope="module")
def photos(scripts, tmp_path_factory):
    """The 20 photos in folders named by ImageNet synsets, under val/."""
    root = tmp_path_factory.mktemp("photos")
    reader = importlib.import_module("common.demo_data").PhotoReader()
    for path, label in zip(reader.paths, reader.labels, strict=True):
        folder = root / "val" / ImageNetInfo().index_to_label_name(label)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder)
    return root


def run(*argv, **environment):
    """Run the script in a process of its own."""
    command = [sys.executable, str(SCRIPTS / "validate.py"), *map(str, argv)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def results(validate, tmp_path, *argv):
    file = tmp_path / "results.json"
    validate([*map(str, argv), *QUICK, "--results-file", str(file)])
    return json.loads(file.read_text())


def test_static_model_gets_18_and_20_of_20(photos, checkpoint, tmp_path):
    file = tmp_path / "new" / "folder" / "results.json"
    done = run(
        photos, "--model", STATIC, "--checkpoint", checkpoint, "--interpolation", "bilinear",
        "--batch-size", 5, "--workers", 2, "--results-file", file,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (told,) = done.stderr.splitlines()
    assert told.startswith(f"{photos / 'val'}: 20 images, 19 classes")
    (row,) = json.loads(file.read_text())
    assert (row["top1"], row["top5"], row["images"]) == (90.0, 100.0, 20)
    assert row["loss"] == pytest.approx(0.305, abs=0.002)
    assert (row["parameters"], row["gmacs"]) == (3_504_872, pytest.approx(0.3008, abs=1e-4))
    assert row["images_per_second"] > 0
    assert (row["input_size"], row["crop_pct"], row["interpolation"]) == ([3, 224, 224], 0.875, "bilinear")
    header, line = done.stdout.splitlines()
    assert header.split() == ["model", "top-1", "top-5", "loss", "Mparams", "GMACs", "images/s"]
    assert line.split()[:3] == [STATIC, "90.000", "100.000"]


def test_fdconv_from_a_static_checkpoint_equals_its_static_twin(validate, photos, checkpoint, tmp_path, capsys):
    file = tmp_path / "results.csv"
    validate(
        [str(photos), "--model", FDCONV, "--compare-static", "--checkpoint", str(checkpoint), *QUICK]
        + ["--results-file", str(file)]
    )
    with file.open() as lines:
        fdconv, static = csv.DictReader(lines)
    assert (fdconv["model"], static["model"].partition(".")[0]) == (FDCONV, STATIC)
    for row in (fdconv, static):
        assert (row["top1"], row["top5"], row["images"]) == ("90.0", "100.0", "20")
    assert float(fdconv["loss"]) == pytest.approx(float(static["loss"]), abs=1e-4)
    assert int(fdconv["parameters"]) > int(static["parameters"])
    assert float(fdconv["gmacs"]) > float(static["gmacs"])
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize("name", [pytest.param(STATIC, marks=pytest.mark.slow), FDCONV])
def test_precision_layout_and_compilation_keep_the_accuracy(validate, photos, checkpoint, tmp_path, name):
    (row,) = results(
        validate, tmp_path, "--data-dir", photos, "--model", name, "--checkpoint", checkpoint,
        "--amp", "--amp-dtype", "bfloat16", "--channels-last", "--torchcompile", "eager", "--num-gpu", 1,
    )  # fmt: skip
    assert row["top1"] >= 85
    assert row["top5"] == 100


def test_preprocessing_can_be_overridden(validate, photos, checkpoint, tmp_path):
    (row,) = results(
        validate, tmp_path, photos, "--model", STATIC, "--checkpoint", checkpoint, "--img-size", 160,
        "--crop-pct", 1.0, "--crop-mode", "squash", "--mean", 0.5, "--std", 0.25,
    )  # fmt: skip
    assert (row["input_size"], row["crop_pct"], row["crop_mode"]) == ([3, 160, 160], 1.0, "squash")
    assert (row["mean"], row["std"]) == ([0.5] * 3, [0.25] * 3)
    assert row["gmacs"] == pytest.approx(0.3008 * (160 / 224) ** 2, rel=0.01)
    assert row["top5"] >= 80


def test_test_size_is_the_default_and_train_size_a_choice(validate, photos, tmp_path):
    model = timm.create_model("resnet18.a1_in1k")
    save_file(model.state_dict(), tmp_path / "random.safetensors")
    for flags, size in [([], 288), (["--use-train-size"], 224)]:
        (row,) = results(
            validate, tmp_path, photos, "--model", "resnet18.a1_in1k", "--checkpoint", tmp_path / "random.safetensors",
            *flags,
        )  # fmt: skip
        assert row["input_size"] == [3, size, size]


def test_tar_files_and_class_maps(validate, photos, checkpoint, tmp_path):
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos / "val", arcname=".")
    (row,) = results(validate, tmp_path, tmp_path / "photos.tar", "--model", STATIC, "--checkpoint", checkpoint)
    assert (row["top1"], row["top5"]) == (90.0, 100.0)

    names = [f"class {index}" for index in range(1000)]
    for index, synset in enumerate(ImageNetInfo().label_names()):
        if (photos / "val" / synset).exists():
            shutil.copytree(photos / "val" / synset, tmp_path / "data" / names[index])
    (tmp_path / "classes.txt").write_text("\n".join(names))
    (row,) = results(
        validate, tmp_path, tmp_path / "data", "--model", STATIC, "--checkpoint", checkpoint,
        "--class-map", tmp_path / "classes.txt",
    )  # fmt: skip
    assert (row["top1"], row["top5"]) == (90.0, 100.0)


def test_torchvision_datasets_and_their_synsets(validate, photos, checkpoint, tmp_path, capsys):
    (row,) = results(
        validate, tmp_path, photos, "--dataset", "torch/image_folder", "--split", "val", "--model", STATIC,
        "--checkpoint", checkpoint,
    )  # fmt: skip
    assert (row["images"], row["top1"]) == (20, 90.0)
    assert "val: 20 images, 19 classes\n" in capsys.readouterr().err


def test_the_gpu_that_computes_is_waited_for(monkeypatch):
    waited = []
    monkeypatch.setattr("torch.cuda.synchronize", lambda device=None: waited.append(device))
    monkeypatch.setattr("torch.Tensor.to", lambda tensor, *args, **kwargs: tensor)
    batch = torch.zeros(2, 3, 4, 4), torch.arange(2)
    args = argparse.Namespace(device="cuda:1", channels_last=False, amp=False, amp_dtype="float16")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 5))
    assert importlib.import_module("validate").validate(model, [batch, batch], args)["images"] == 4
    assert waited == [torch.device("cuda:1")] * 4


def test_one_gpu_of_several_is_the_current_one(validate, photos, checkpoint, monkeypatch):
    """On which streams are that name none."""
    seen = []
    monkeypatch.setattr("validation.args.check_device", lambda device: None)
    monkeypatch.setattr("torch.cuda.set_device", seen.append)
    monkeypatch.setattr("validate.prepare", lambda *args, **kwargs: {}[seen.append("prepared")])
    error_of(validate, photos, "--model", STATIC, "--checkpoint", checkpoint, "--device", "cuda:1")
    assert seen == [torch.device("cuda:1"), "prepared"]


def test_averaged_weights_of_a_training_checkpoint(validate, photos, static_weights, tmp_path):
    trained = {f"module.{key}": torch.zeros_like(value) for key, value in static_weights.items()}
    torch.save(
        {"state_dict": trained, "state_dict_ema": static_weights, "args": argparse.Namespace(lr=0.1), "epoch": 3},
        tmp_path / "last.pth.tar",
    )
    argv = [photos, "--model", STATIC, "--checkpoint", tmp_path / "last.pth.tar"]
    (row,) = results(validate, tmp_path, *argv, "--use-ema")
    assert (row["top1"], row["top5"]) == (90.0, 100.0)
    (row,) = results(validate, tmp_path, *argv)
    assert row["loss"] == pytest.approx(6.908, abs=1e-3)


def test_a_trained_fdconv_checkpoint_with_other_classes(validate, photos, tmp_path):
    model = timm.create_model(FDCONV, num_classes=19)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    (row,) = results(
        validate, tmp_path, photos, "--model", FDCONV, "--checkpoint", tmp_path / "model.safetensors",
        "--num-classes", 19, "--model-kwargs", "drop_rate=0.1",
    )  # fmt: skip
    assert row["images"] == 20
    assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())


def test_no_random_classifier_is_measured(validate, photos, tmp_path):
    """Fine-tuned weights have no static twin, whose own classifier is of other classes."""
    model = timm.create_model(FDCONV, num_classes=19)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    argv = [photos, "--num-classes", 19, "--results-file", tmp_path / "r.json", "--model", FDCONV]
    message = error_of(validate, *argv, "--compare-static", "--checkpoint", tmp_path / "model.safetensors")
    assert f"no pretrained weights of 19 classes: {STATIC}." in message
    assert [row["model"] for row in json.loads((tmp_path / "r.json").read_text())] == [FDCONV]
    assert f"no pretrained weights of 19 classes: {FDCONV}'s classifier has 1000" in error_of(validate, *argv)


def test_the_hub_out_of_reach_keeps_the_results_so_far(photos, tmp_path):
    model = timm.create_model(FDCONV)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    done = run(
        photos, "--model", FDCONV, "--compare-static", "--checkpoint", tmp_path / "model.safetensors", *QUICK,
        "--results-file", tmp_path / "results.json", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 1
    told, error = done.stderr.splitlines()
    assert told.startswith(f"{photos / 'val'}: 20 images")
    assert error.startswith(f"validate.py: error: {STATIC}.")
    assert "Without a network: --checkpoint FILE" in error
    assert [row["model"] for row in json.loads((tmp_path / "results.json").read_text())] == [FDCONV]


@pytest.mark.parametrize("name", [STATIC, FDCONV])
def test_no_pretrained_weights_without_the_hub(validate, photos, name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    message = error_of(validate, photos, "--model", name, *QUICK)
    assert message.startswith(f"validate.py: error: {name}: no pretrained weights: ")
    assert message.endswith("see `python -m hub.mirror --help`")
    assert "pretrained_cfg_overlay" not in message
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_refused_connections_end_in_one_line_too(photos, tmp_path):
    done = run(photos, "--model", STATIC, *QUICK, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"validate.py: error: {STATIC}: no pretrained weights: ")
    assert done.stderr.count("\n") == 1


def error_of(validate, *argv):
    """The line that a run ends with."""
    with pytest.raises(SystemExit) as stop:
        validate([str(argument) for argument in argv])
    assert isinstance(stop.value.code, str)  # which Python prints on stderr, with exit status 1
    assert "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "say what to validate with --model"),
        (["--model", STATIC], "give a folder of images"),
        (["nowhere", "--model", STATIC], "there is no folder nowhere"),
        (["--model", STATIC, "."], r"\. is a folder, not a model: give the data before --model"),
        ([".", "--model", "mobilenetv2_101"], "unknown model mobilenetv2_101, did you mean .*mobilenetv2_100"),
        ([".", "--model", "resnet50.a1_in2k"], "unknown model resnet50.a1_in2k, did you mean .*resnet50.a1_in1k"),
        ([".", "--model", "resnot*"], r"no model with pretrained weights matches resnot\*"),
        ([".", "--model", "test_resnet_nope_*", STATIC], "no model with pretrained weights matches"),
        (
            [".", "--model", STATIC, "--results-file", "results.txt"],
            "--results-file must end in .json or .csv, got res",
        ),
        ([".", "--model", STATIC, "--checkpoint", "nowhere.pth"], "there is no checkpoint nowhere.pth"),
        ([".", "--model", STATIC, "--use-ema"], "--use-ema needs --checkpoint"),
        ([".", "--model", STATIC, "--torchcompile", "inductors"], "--torchcompile inductors: there are .*inductor"),
        ([".", "--model", STATIC, "--num-gpu", "99"], "--num-gpu 99: this machine has"),
        ([".", "--model", STATIC, "--device", "gpu"], "--device gpu: "),
        ([".", "--model", STATIC, "--compare-static"], "none of mobilenetv2_100 is an FDConv model"),
        ([".", "--demo"], "--demo brings its own"),
    ],
)
def test_mistakes_are_found_before_any_work(validate, argv, message):
    with pytest.raises(SystemExit, match=f"^validate.py: error: {message}"):
        validate(argv)


def test_several_processes_would_all_do_the_same(validate, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit, match="start it without torchrun"):
        validate([".", "--model", STATIC])


def test_checkpoints_that_do_not_fit(validate, photos, checkpoint, static_weights, tmp_path):
    argv = [photos, "--model", "resnet18", *QUICK, "--checkpoint"]
    message = error_of(validate, *argv, checkpoint)
    assert "resnet18: the checkpoint does not fit: missing keys (98): conv1.weight, " in message
    assert "unexpected keys (" in message

    argv = [photos, "--model", STATIC, *QUICK, "--checkpoint"]
    message = error_of(validate, *argv, checkpoint, "--num-classes", 7)
    assert "other shapes (2): classifier.weight (1000, 1280) instead of (7, 1280)" in message
    assert message.endswith(". Give --num-classes 1000")
    argv[2] = FDCONV
    assert error_of(validate, *argv, checkpoint, "--num-classes", 7).endswith(". Give --num-classes 1000")
    argv[2] = STATIC

    save_file(static_weights | {"blocks.9.odd": torch.zeros(3)}, tmp_path / "odd.safetensors")
    assert "unexpected keys (1): blocks.9.odd" in error_of(validate, *argv, tmp_path / "odd.safetensors")
    assert "blocks.9.odd" in error_of(
        validate, photos, "--model", FDCONV, *QUICK, "--checkpoint", tmp_path / "odd.safetensors"
    )

    (tmp_path / "text.pth").write_text("no weights in here")
    assert "cannot read checkpoint" in error_of(validate, *argv, tmp_path / "text.pth")
    shutil.copy(tmp_path / "text.pth", tmp_path / "text.safetensors")
    assert "cannot read checkpoint" in error_of(validate, *argv, tmp_path / "text.safetensors")
    assert "holds no averaged weights" in error_of(validate, *argv, checkpoint, "--use-ema")
    assert "--checkpoint is for one model" in error_of(
        validate, photos, "--model", STATIC, FDCONV, "--checkpoint", checkpoint
    )


def test_data_that_does_not_fit(validate, photos, checkpoint, tmp_path):
    argv = ["--model", STATIC, *QUICK, "--checkpoint"]
    assert f"{STATIC}: Found 0 images" in error_of(validate, tmp_path, *argv, checkpoint)

    model = timm.create_model(STATIC, num_classes=7)
    save_file(model.state_dict(), tmp_path / "seven.safetensors")
    message = error_of(validate, photos, *argv, tmp_path / "seven.safetensors", "--num-classes", 7)
    assert "19 classes in the data, 7 outputs of the model" in message


def test_wildcards(models):
    assert models.expand_names(["resnet1[89]"], True) == ["resnet18"]
    assert models.expand_names(["resnet18.*"], True) == timm.list_pretrained("resnet18.*")
    assert models.expand_names(["resnet50_fdconv.tv_*", "resnet18_fdconv", "resnet18_fdconv"], True) == [
        "resnet50_fdconv.tv_in1k_converted",
        "resnet18_fdconv",
    ]
    assert {"resnet18_fdconv", "resnet50_fdconv"} <= set(models.expand_names(["resnet*_fdconv"], True))
    assert models.expand_names(["hf-hub:someone/model"], True) == ["hf-hub:someone/model"]


def test_models_without_pretrained_weights_need_a_checkpoint(models):
    name = next(name for name in timm.list_models() if not timm.models.is_model_pretrained(name))
    with pytest.raises(ValueError, match=f"{name} has no pretrained weights: give --checkpoint"):
        models.expand_names([name], weights_needed=True)
    assert models.expand_names([name], weights_needed=False) == [name]


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (["resnet50_fdconv.tv_in1k_converted"], ["resnet50_fdconv.tv_in1k_converted", "resnet50.tv_in1k"]),
        (["resnet50_fdconv"], ["resnet50_fdconv", "resnet50.a1_in1k"]),
        (["resnet18.a1_in1k", "resnet18_fdconv"], ["resnet18.a1_in1k", "resnet18_fdconv"]),
    ],
)
def test_static_twins(models, names, listed):
    assert models.add_static_twins(names) == listed


def test_twins_are_timms_own_models(models):
    names = timm.list_pretrained("*_fdconv.*")
    assert len(names) >= 5
    assert set(models.add_static_twins(names)) - set(names) <= set(
        timm.list_pretrained("*", exclude_filters="*_fdconv*")
    )
