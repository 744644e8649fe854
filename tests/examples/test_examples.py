"""Each example trains a step and infers, with the backbones that its head takes; full size in `make test-all`."""

import math
import subprocess
import sys
from pathlib import Path

import maskdino
import pytest
import smp_segmentation
import torchvision_detection
import transformers_heads

from tests.dense_models import MODELS, NARROW
from tests.scripts.train_runs import photos

EXAMPLES = Path(__file__).parents[2] / "examples"
HEADS = {
    "torchvision_detection.py": ("faster_rcnn", "mask_rcnn", "retinanet"),
    "smp_segmentation.py": ("upernet", "unet", "deeplabv3plus"),
    "transformers_heads.py": ("mask2former", "maskformer", "upernet", "detr"),
}
CASES = [(script, head, model) for script, heads in HEADS.items() for head in heads for model in MODELS]
CASES.remove(("smp_segmentation.py", "deeplabv3plus", "swin_tiny_fdconv"))  # Swin has no dilation
RESULTS = ("scores: (2, 3, 96, 96)", "instances: boxes (10, 4), masks (10, 96, 96)", "segments: (96, 96), classes [")


def narrow(name):
    return ["--model-kwargs", *(f"{key}={value}" for key, value in NARROW[name].items())]


@pytest.mark.parametrize(("head", "model"), [*zip(HEADS["torchvision_detection.py"], MODELS, strict=True)])
def test_torchvision(head, model, capsys):
    torchvision_detection.main(["--head", head, "--model", model, "--size", "96", *narrow(model)])
    printed = capsys.readouterr().out
    assert f"{head}, {model}, image (3, 96, 128)" in printed
    losses = printed.splitlines()[1].removeprefix("losses: ").split(", ")
    assert all(math.isfinite(float(loss.split()[1])) for loss in losses)
    assert "detections: boxes (" in printed
    assert ("masks (" in printed) == (head == "mask_rcnn")


def test_segmentation_models_pytorch(capsys):
    main = smp_segmentation.main
    main(["--head", "deeplabv3plus", "--model", "resnet50_fdconv", "--size", "96", *narrow("resnet50_fdconv")])
    assert "logits: (2, 5, 96, 96)" in capsys.readouterr().out


@pytest.mark.parametrize(("head", "output"), [("mask2former", "masks_queries_logits"), ("detr", "pred_boxes")])
def test_transformers(head, output, capsys, tmp_path):
    arguments = ["--head", head, "--model", "narrow_resnet50_fdconv", "--size", "96", "--save", str(tmp_path)]
    transformers_heads.main(arguments)
    assert f"{output} (2, " in capsys.readouterr().out
    assert (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("task", "model", "printed"), zip(("semantic", "instance", "panoptic"), MODELS, RESULTS, strict=True)
)
def test_maskdino(task, model, printed, capsys):
    maskdino.main(["--task", task, "--model", model, "--size", "96", *narrow(model)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{task}, {model}, images (2, 3, 96, 96)"
    assert math.isfinite(float(lines[1].removeprefix("loss: "))) and lines[2].startswith(printed)


@pytest.mark.parametrize(
    ("main", "options"),
    [
        (torchvision_detection.main, narrow("resnet50_fdconv")),
        (smp_segmentation.main, narrow("resnet50_fdconv")),
        (transformers_heads.main, ["--head", "upernet", "--model", "narrow_resnet50_fdconv"]),
        (maskdino.main, narrow("resnet50_fdconv")),
    ],
)
def test_a_photo(main, options, capsys):
    main(["--image", str(photos()[0]), "--size", "96", *options])
    assert "resnet50_fdconv, image" in capsys.readouterr().out


@pytest.mark.parametrize("example", [torchvision_detection, smp_segmentation, transformers_heads, maskdino])
def test_missing_photo_is_one_line(example, capsys):
    with pytest.raises(SystemExit, match="2"):
        example.main(["--image", "nowhere.jpg"])
    assert capsys.readouterr().err.splitlines()[-1].endswith("error: --image nowhere.jpg is not a file")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["semantic", "instance", "panoptic"])
def test_maskdino_full_size(task):
    command = [sys.executable, EXAMPLES / "maskdino.py", "--task", task, "--size", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("script", "head", "model"), CASES)
def test_full_size(script, head, model):
    command = [sys.executable, EXAMPLES / script, "--head", head, "--model", model, "--size", "128"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
