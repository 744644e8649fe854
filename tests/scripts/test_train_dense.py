"""scripts/train_dense.py on a small COCO set with masks: whole runs, a resume, the configs, errors."""

import csv
import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from dense_data import (
    BACKBONE,
    SMALL,
    SMALL_DETECTOR,
    SMALL_MASK2FORMER,
    SMALL_MASKDINO,
    boxes,
    cityscapes,
    masks,
    write_cityscapes,
    write_data,
)

from dense.args import parse_args
from dense.modules import DetectionModule
from train_dense import create_trainer, main

CONFIGS = sorted((Path(__file__).parents[2] / "scripts" / "configs" / "dense").glob("*.yaml"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four images a split, as boxes, polygons and masks."""
    return write_data(tmp_path_factory.mktemp("coco"), train=4, val=4)


@pytest.fixture(scope="module")
def config_data(data, tmp_path_factory):
    """Options that name small data for a config."""
    folder = write_cityscapes(tmp_path_factory.mktemp("cityscapes"))
    options = {"upernet": masks(data), "maskdino": masks(data), "mask2former": cityscapes(folder)}
    return lambda loaded: options.get(loaded["head"], boxes(data))


def error_of(arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    message = str(exit.value.code)
    assert message.startswith("train_dense.py: error: ")
    assert "\n" not in message
    return message


def logged(output, key):
    """The values of a column of the last run's metrics, with their steps."""
    newest = max((output / "logs").glob("version_*"), key=lambda path: int(path.name.removeprefix("version_")))
    with (newest / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[key]) for row in csv.DictReader(file) if row.get(key)}


def test_detector_trains_prints_map_and_goes_on(data, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--head", "faster_rcnn", *SMALL, *SMALL_DETECTOR, *boxes(data), "--output", str(output)]
    main(options)
    printed = capsys.readouterr()
    score = float(re.search(r"val/box_mAP (\S+),", printed.out)[1])
    assert 0 <= score <= 1
    assert "4 images for training, 4 for validation" in printed.err
    assert re.search(r"^epoch 0  update 2  loss \d+\.\d+  lr \d", printed.err, re.M)  # no bar: this is no terminal
    assert re.search(r"^epoch 0  validated  val/box_mAP ", printed.err, re.M) and "\r" not in printed.err
    assert {"last.ckpt", "best.ckpt", "args.yaml"} <= {path.name for path in output.iterdir()}
    first = torch.load(output / "last.ckpt", weights_only=True)
    assert (first["epoch"], first["global_step"]) == (0, 2)
    assert logged(output, "val/box_mAP") == {1: pytest.approx(score, abs=1e-4)}

    assert "holds a run: add --resume to go on with it" in error_of(options)

    main(["--config", str(output / "args.yaml"), "--epochs", "2", "--resume"])
    printed = capsys.readouterr()
    assert "goes on from" in printed.err and "val/box_mAP " in printed.out
    second = torch.load(output / "last.ckpt", weights_only=True)
    assert (second["epoch"], second["global_step"]) == (1, 4)
    assert logged(output, "val/box_mAP").keys() == {3}  # the first epoch is not repeated
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert any(not torch.equal(first["state_dict"][name], value) for name, value in second["state_dict"].items())


def test_scores_are_logged_on_the_device_of_the_module(data, monkeypatch):
    """NCCL, which reduces them on GPUs, takes none of a CPU, where torchmetrics computes mAP."""
    args = parse_args(["--head", "faster_rcnn", *SMALL, *boxes(data)])
    module = DetectionModule(torch.nn.Identity(), torch.nn.Identity(), args).to("meta")
    logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **options: logged.update({name: value.device.type}))
    monkeypatch.setattr(DetectionModule, "trainer", Namespace(world_size=1))
    one = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.ones(1, dtype=torch.long)}
    module.average_precision.update([{**one, "scores": torch.ones(1)}], [one])
    module.on_validation_epoch_end()
    assert logged == dict.fromkeys(("val/box_mAP", "val/box_mAP50", "val/box_mAP75"), "meta")


def test_upernet_trains_and_prints_miou(data, tmp_path, capsys):
    main(["--head", "upernet", *SMALL, *masks(data), "--output", str(tmp_path)])
    score = float(re.search(r"val/mIoU (\S+)", capsys.readouterr().out)[1])
    assert 0 <= score <= 1
    assert logged(tmp_path, "val/mIoU") == {1: pytest.approx(score, abs=1e-4)}


class Falling(L.LightningModule):
    """Its score is best after the first epoch, and it breaks in the fourth."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, index):
        if self.current_epoch == 3:
            raise RuntimeError("stopped here")
        return self.layer(batch).sum()

    def validation_step(self, batch, index):
        self.log("val/mIoU", 0.5**self.current_epoch)


def test_last_checkpoint_is_of_the_last_whole_epoch(data, tmp_path):
    args = parse_args(["--head", "upernet", *SMALL, *masks(data), "--epochs", "5", "--output", str(tmp_path)])
    loader = torch.utils.data.DataLoader(torch.zeros(4, 1), 2)
    with pytest.raises(RuntimeError, match="stopped here"):
        create_trainer(args).fit(Falling(), loader, loader)
    epochs = {name: torch.load(tmp_path / name, weights_only=True)["epoch"] for name in ("best.ckpt", "last.ckpt")}
    assert epochs == {"best.ckpt": 0, "last.ckpt": 2}


@pytest.mark.slow
@pytest.mark.parametrize("head", ["mask_rcnn", "retinanet", "unet", "deeplabv3plus"])
def test_other_heads_train(head, data, tmp_path, capsys):
    detection = head in ("mask_rcnn", "retinanet")
    main(["--head", head, *SMALL, *(boxes if detection else masks)(data), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert ("val/box_mAP" if detection else "val/mIoU") in printed
    assert ("val/mask_mAP" in printed) == (head == "mask_rcnn")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_is_parsed_whole(config, config_data):
    loaded = yaml.safe_load(config.read_text())
    args = parse_args([*config_data(loaded), "--config", str(config)])
    overridden = {"num_classes", "scale_size", "crop_size", "min_size", "max_size"}
    for key, value in loaded.items():
        if key not in overridden:
            assert getattr(args, key) == value, key


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_config_runs_one_batch(config, config_data, tmp_path, capsys):
    loaded = yaml.safe_load(config.read_text())
    options = [*BACKBONE, "--no-pretrained", "-j", "0", "--device", "cpu", "--limit-batches", "1", "--epochs", "1"]
    options += ["--steps", "1"] if "steps" in loaded else []
    options += {"mask2former": SMALL_MASK2FORMER, "maskdino": SMALL_MASKDINO}.get(loaded["head"], [])
    main(["--config", str(config), *options, *config_data(loaded), "--output", str(tmp_path)])
    assert "val/" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def broken(name):
    """A json that can't be used, as a function of the right one."""

    def change(content):
        if name == "no json":
            return content[:40]
        loaded = json.loads(content)
        if name == "no categories":
            del loaded["categories"]
        elif name == "no image_id":
            del loaded["annotations"][0]["image_id"]
        elif name == "unknown category":
            loaded["annotations"][0]["category_id"] = 99
        elif name == "gone image":
            loaded["images"][0]["file_name"] = "gone.png"
        elif name == "other categories":
            loaded["categories"].append({"id": 9, "name": "blue"})
        elif name == "other names":
            loaded["categories"][0]["name"], loaded["categories"][1]["name"] = "red", "green"
        return json.dumps(loaded)

    return change


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no json", "can't read {path}"),
        ("no categories", "{path} is no COCO file of boxes: it has no categories"),
        ("no image_id", "{path} is no COCO file of boxes: an entry has no 'image_id'"),
        ("unknown category", "{path} has objects of unknown category_id [99]"),
        ("gone image", "1 of 4 images of {path} are not in"),
        ("other categories", "has other categories than {path}: id 9 is not the same in both"),
        ("other names", "has other categories than {path}: id 3 is not the same in both"),
    ],
)
def test_bad_json_is_one_line(name, expected, data, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(broken(name)((data / "train.json").read_text()))
    output = tmp_path / "run"
    options = [*SMALL, *boxes(data), "--train-annotations", str(path), "--output", str(output)]
    assert expected.format(path=path) in error_of(options)
    assert not output.exists()


def test_broken_image_is_one_line(data, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(b"no image")
    options = [*SMALL, *boxes(data), "--train-images", str(folder), "--output", str(tmp_path / "run")]
    assert f"can't read {folder}" in error_of(options).replace("\\n", "")


def test_missing_masks_are_one_line(data, tmp_path):
    empty = tmp_path / "masks"
    empty.mkdir()
    options = ["--head", "upernet", *SMALL, *masks(data), "--train-masks", str(empty)]
    message = error_of([*options, "--output", str(tmp_path / "run")])
    assert f"4 of 4 images in {data / 'train'} have no mask: {empty / '0.png'} of" in message


def test_a_backbone_that_is_not_to_be_had_is_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    options = ["--head", "upernet", *SMALL, *masks(data), "--output", str(tmp_path / "run")]
    assert "unknown model resnet18_fdconf, did you mean" in error_of([*options, "--backbone", "resnet18_fdconf"])
    if not torch.cuda.is_available():
        assert "--device cuda: " in error_of([*options, "--device", "cuda"])
    assert "cudaa" in error_of([*options, "--device", "cudaa"])
    detector = ["--head", "faster_rcnn", *SMALL, *boxes(data), "--output", str(tmp_path / "run"), "--pretrained"]
    message = error_of([*detector, "--backbone-kwargs", "num_bands=8"])
    assert "Without a network: --initial-checkpoint FILE" in message and "pretrained_cfg_overlay" not in message


HELP_WITHOUT = """
import runpy, sys
sys.modules["lightning"] = None
sys.path.insert(0, {scripts!r})
sys.argv = ["train_dense.py", *{arguments!r}]
runpy.run_path({script!r}, run_name="__main__")
"""


def test_help_without_lightning(data):
    script = CONFIGS[0].parents[2] / "train_dense.py"
    for arguments, code, message in (
        (["--help"], 0, "go on after a stop"),
        (boxes(data), 1, "train_dense.py: error: needs lightning: pip install -e '.[dense]'"),
    ):
        program = HELP_WITHOUT.format(scripts=str(script.parent), script=str(script), arguments=arguments)
        done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
        assert (done.returncode, message in done.stdout + done.stderr) == (code, True), done.stderr
        assert "Traceback" not in done.stderr


def test_missing_options_are_named(data, capsys):
    for arguments, message in (
        (["--head", "mask_rcnn", "--train-images", "a"], "mask_rcnn needs --train-annotations, --val-images"),
        (["--head", "upernet", *boxes(data)], "upernet needs --train-masks, --val-masks"),
        ([*boxes(data), "--epochs", "0"], "--epochs is 0, it must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            parse_args(arguments)
        assert message in capsys.readouterr().err
