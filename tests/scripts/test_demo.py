"""`validate.py --demo`: real weights, real photos, the picture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from common import demo_data
from validate import main

SCRIPTS = Path(__file__).parents[2] / "scripts"


# What other extras than `demo` bring: `make demo` installs none of them.
OTHERS = (
    "datasets", "hypothesis", "lightning", "onnx", "onnxruntime", "onnxscript", "pandas",
    "pycocotools", "pytest", "scipy", "segmentation_models_pytorch", "sklearn", "tensorboard", "torchmetrics",
    "transformers", "webdataset",
)  # fmt: skip


def test_the_demo_prints_both_models_and_draws_the_picture(tmp_path):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({OTHERS!r}))\n")
    paths = os.pathsep.join(filter(None, [str(tmp_path / "only"), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "validate.py"), "--demo", "--device", "cpu", "--results-file", "demo.csv"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    for line, name in zip(lines[1:3], ("mobilenetv2_100_fdconv", "mobilenetv2_100"), strict=True):
        assert line.split()[:3] == [name, "90.000", "100.000"]
    difference = next(line for line in lines if line.startswith("largest logit difference"))
    assert float(difference.split()[3]) < 1e-3
    photos = [line for line in lines if line.startswith("imagenet_")]
    assert len(photos) == 20
    assert sum(line.count(" ok ") for line in photos) == 36
    assert next(line for line in lines if line.startswith("right")).count("top-1 18/20, top-5 20/20") == 2
    assert len((tmp_path / "demo.csv").read_text().splitlines()) == 3
    (picture,) = (tmp_path / "outputs" / "demo").iterdir()
    with Image.open(picture) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 800
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 24)) > 1000


def test_missing_wheel_is_one_line_of_the_command(monkeypatch):
    monkeypatch.setattr(demo_data, "WEIGHTS", "weights/absent.pth")
    with pytest.raises(SystemExit, match=r"^validate.py: error: mobilenetv2_100_fdconv: the demo needs weights/absent"):
        main(["--demo"])
