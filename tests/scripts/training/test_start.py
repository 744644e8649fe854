"""How a run of train.py starts: from which weights, what it records of it, and the mistakes it refuses in one line."""

import json
import logging

import pytest
import timm
import torch
import yaml
from image_files import write_images, write_sixteen_bits
from safetensors.torch import load_file, save_file

from common.checkpoint import load_state
from train import load_initial_weights, main

CONFIG = "scripts/configs/finetune_converted.yaml"
SMALL = ["--model", "test_resnet", "--img-size", "32", "-b", "2", "-j", "0", "--device", "cpu", "--epochs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("data"), "train/ant", "train/bee", "val/ant", "val/bee")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))


def start(data, output, *options, num_classes=2):
    classes = ["--num-classes", str(num_classes)] if num_classes else []
    main([*SMALL, *classes, "--data-dir", str(data), "--output", str(output), *map(str, options)])


def error_of(data, output, *options, **keywords):
    with pytest.raises(SystemExit) as stop:
        start(data, output, *options, **keywords)
    assert isinstance(stop.value.code, str)
    assert stop.value.code.startswith("train.py: error: ") and "\n" not in stop.value.code
    return stop.value.code.removeprefix("train.py: error: ")


def test_a_run_records_its_start_and_its_classes(data, tmp_path, offline):
    start(data, tmp_path / "scratch")
    assert json.loads((tmp_path / "scratch" / "start.json").read_text()) == {"from": "random"}
    assert (tmp_path / "scratch" / "classes.txt").read_text() == "ant\nbee\n"

    weights = tmp_path / "scratch" / "last.safetensors"
    # The recipe says `pretrained: true`: a file of weights means that nothing is downloaded.
    start(data, tmp_path / "tuned", "--pretrained", "--initial-checkpoint", weights, "--steps", 1)
    expected = {"from": "file", "name": "last.safetensors"}
    assert json.loads((tmp_path / "tuned" / "start.json").read_text()) == expected
    assert load_state(tmp_path / "tuned" / "last.state.pt")["start"] == expected

    # resumed with other options and into another directory, it still tells the start
    start(data, tmp_path / "moved", "--resume", tmp_path / "tuned" / "last.state.pt")
    assert json.loads((tmp_path / "moved" / "start.json").read_text()) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"initial_checkpoint": "/far/away/static.pth"}, {"from": "file", "name": "static.pth"}),
        (
            {"pretrained": True},
            {"from": "pretrained", "name": "test_resnet.r160_in1k", "repo": "timm/test_resnet.r160_in1k"},
        ),
        ({}, {"from": "unknown"}),
        (None, {"from": "unknown"}),
    ],
)
def test_the_start_of_a_run_from_before_states_told_it(data, tmp_path, offline, options, expected):
    start(data, tmp_path, "--steps", 1)
    torch.save(
        {k: v for k, v in load_state(tmp_path / "last.state.pt").items() if k != "start"}, tmp_path / "last.state.pt"
    )
    if options is None:
        (tmp_path / "args.yaml").unlink()
    else:
        recorded = yaml.safe_load((tmp_path / "args.yaml").read_text())
        (tmp_path / "args.yaml").write_text(yaml.safe_dump({**recorded, **options}))
    start(data, tmp_path, "--resume")
    assert json.loads((tmp_path / "start.json").read_text()) == expected


def test_pretrained_weights_out_of_reach_name_the_commands_own_option(data, tmp_path, offline):
    message = error_of(data, tmp_path / "run", "--model", "resnet18_fdconv", "--pretrained")
    assert message.startswith("no pretrained weights: ")
    assert "Without a network: --initial-checkpoint FILE" in message
    assert "pretrained_cfg_overlay" not in message


def test_weights_of_wrappers_and_training_states(tmp_path):
    static = timm.create_model("resnet18", num_classes=2).state_dict()
    torch.save({"weights": {"last": static}, "progress": {}}, tmp_path / "last.state.pt")
    torch.save({"state_dict": {f"model.{key}": value for key, value in static.items()}}, tmp_path / "lightning.ckpt")
    averaged = {f"module._orig_mod.{key}": value for key, value in static.items()}
    torch.save({**averaged, "n_averaged": torch.tensor(3)}, tmp_path / "averaged.pt")
    for name in ("last.state.pt", "lightning.ckpt", "averaged.pt"):
        model = timm.create_model("resnet18", num_classes=2)
        load_initial_weights(model, tmp_path / name)
        assert all(torch.equal(value, static[key]) for key, value in model.state_dict().items()), name


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (lambda: timm.create_model("resnet34", num_classes=2).state_dict(), "another width or depth"),
        (lambda: timm.create_model("mobilenetv2_100", num_classes=2).state_dict(), "another architecture's"),
        (lambda: timm.create_model("resnet18_fdconv", num_classes=2).state_dict(), "weights of an FDConv model"),
        (lambda: {"features.0.0.weight": torch.zeros(3), "features.1.weight": torch.zeros(1)}, "torchvision's"),
    ],
)
def test_weights_that_do_not_fit_tell_the_likely_cause(tmp_path, content, cause):
    save_file(content(), tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=cause) as caught:
        load_initial_weights(timm.create_model("resnet18", num_classes=2), tmp_path / "weights.safetensors")
    message = str(caught.value)
    assert str(tmp_path / "weights.safetensors") in message
    assert message.count("weight") + message.count("running") < 12 and len(message) < 600


def test_a_training_state_without_weights(tmp_path):
    torch.save({"optimizer": {"state": {}}, "epoch": 3}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="holds no weights, only optimizer, epoch: is it a training state"):
        load_initial_weights(timm.create_model("resnet18"), tmp_path / "state.pt")


def test_averaged_weights_alone_need_no_asking(tmp_path):
    static = timm.create_model("resnet18", num_classes=2).state_dict()
    torch.save({"state_dict_ema": static, "epoch": 1}, tmp_path / "ema.pt")
    model = timm.create_model("resnet18", num_classes=2)
    load_initial_weights(model, tmp_path / "ema.pt")
    assert all(torch.equal(value, static[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer"),
        (b"", "it is empty"),
        (b"hello", "neither torch nor safetensors knows it"),
        (None, "it is a pickle of more than tensors, such as a whole model: save its state_dict"),
    ],
)
@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_files_that_are_no_weights(tmp_path, content, cause, ending):
    path = tmp_path / f"weights.{ending}"
    if content is not None:
        path.write_bytes(content)
    elif ending == "pth":
        torch.save(torch.nn.Linear(2, 2), path)
    else:
        cause = "No such file"
    with pytest.raises(ValueError, match=f"cannot read checkpoint .*{cause}") as caught:
        load_initial_weights(timm.create_model("test_resnet"), path)
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)


def test_mistakes_are_one_line(data, tmp_path):
    output = tmp_path / "run"
    assert error_of(data, output, "--model", "resnet18_fdconf").startswith(
        "unknown model resnet18_fdconf, did you mean"
    )
    assert "2 classes, the model 1000 outputs: give --num-classes 2" in error_of(data, output, num_classes=None)
    message = error_of(data, output, "--model", "swin_tiny_patch4_window7_224", "--model-kwargs", "depths=[1,1,1,1]")
    assert "takes 224 x 224 images, not 32 x 32: give --model-kwargs img_size=32" in message
    if not torch.cuda.is_available():
        assert error_of(data, output, "--device", "cuda").startswith("--device cuda: ")
    one = write_images(tmp_path / "one", "train/ant", "val/ant")
    assert "one class only, ant" in error_of(one, output)
    assert not output.exists()


def test_a_run_does_not_go_on_with_other_classes(tmp_path):
    data = write_images(tmp_path / "data", "train/ant", "train/bee", "val/ant", "val/bee")
    start(data, tmp_path / "run")
    for split in ("train", "val"):
        (data / split / "ant").rename(data / split / "cow")
    message = error_of(data, tmp_path / "run", "--epochs", 2, "--resume")
    assert message.startswith("output 0 is ant by ") and "bee by the data of now" in message
    assert (tmp_path / "run" / "classes.txt").read_text() == "ant\nbee\n"


def test_requests_to_the_hub_are_no_part_of_the_log(data, tmp_path, caplog):
    caplog.set_level("INFO")
    start(data, tmp_path / "run", "--steps", 1)
    for client in ("httpx", "httpx2"):
        logging.getLogger(client).info("HTTP Request: GET https://huggingface.co/")
    assert "2 classes" in caplog.text and "HTTP Request" not in caplog.text


def test_an_unknown_optimiser_is_refused_with_what_it_may_mean(data, tmp_path, capsys):
    with pytest.raises(SystemExit):
        start(data, tmp_path / "run", "--opt", "adamv")
    assert "unknown optimiser adamv, did you mean adam" in capsys.readouterr().err


def test_corrupt_validation_images_are_left_out_counted_once_and_listed(tmp_path, caplog):
    data = write_images(tmp_path / "data", "train/ant", "train/bee", "val/ant", "val/bee", count=3)
    (data / "val" / "bee" / "0.png").write_text("no image")
    start(data, tmp_path / "run", "--epochs", 3, "--lr", 0)
    assert caplog.text.count("left 1 corrupt image out of validation") == 1
    assert (tmp_path / "run" / "corrupt_val_images.txt").read_text() == "bee/0.png\n"
    # five images are measured: a replacement would have made it six
    accuracy = float((tmp_path / "run" / "summary.csv").read_text().splitlines()[-1].split(",")[3])
    assert accuracy * 5 / 100 == pytest.approx(round(accuracy * 5 / 100), abs=1e-3)
    for image in (data / "val").rglob("*.png"):
        image.write_text("no image")
    assert "no image of the validation set can be read: " in error_of(data, tmp_path / "blind", "--epochs", 1)


def test_an_image_of_unknown_range_ends_the_run_in_one_line(tmp_path):
    from PIL import Image

    data = write_images(tmp_path / "data", "train/ant", "train/bee", "val/ant", "val/bee")
    write_sixteen_bits(data / "train" / "ant" / "0.png", 30000)
    image = Image.new("F", (32, 32), 0.5)
    # its ending does not tell that it is a TIFF
    image.save(data / "val" / "bee" / "float.png", format="TIFF")
    assert error_of(data, tmp_path / "run", "-j", 1).startswith("bee/float.png has floating-point pixels")
    assert load_file(tmp_path / "run" / "last.safetensors")  # the epoch before was saved


@pytest.mark.parametrize("dataset", ["", "torch/image_folder"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_tiff_of_unknown_range_is_told_before_the_first_step(tmp_path, split, dataset):
    from PIL import Image

    data = write_images(tmp_path / "data", "train/ant", "train/bee", "val/ant", "val/bee", ending=".tif")
    (data / "train" / "ant" / "cut.tif").write_text("no image")  # left out later, as all that can't be read
    path = data / split / "bee" / "float.TIFF"
    Image.new("F", (32, 32), 0.5).save(path)
    assert error_of(data, tmp_path / "run", "--dataset", dataset).startswith(f"{path} has floating-point pixels")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("place", "told"), [("nowhere", "there is no data directory"), (".", "no folder for the split")]
)
def test_data_are_looked_at_before_weights_are_downloaded(place, told, tmp_path, offline):
    options = ["--model", "resnet18_fdconv", "--pretrained"]
    assert told in error_of(tmp_path / place, tmp_path / "run", *options)
    data = write_images(tmp_path / "data", "train/ant", "train/bee", "val/ant", "val/cat")
    assert "unknown classes: cat" in error_of(data, tmp_path / "run", *options)
