"""scripts/visualize.py: its figures from real weights and a real photo, its page in a real browser, every mistake."""

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image, ImageStat
from safetensors.torch import save_file

SCRIPTS = Path(__file__).parents[2] / "scripts"
FIGURES = ["similarity", "spectrum", "responses", "tsne", "gates", "layers", "bands_1", "feature_spectrum_1"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STATIC = "test_resnet"  # timm's own for tests: 3x3 and 1x1 convolutions of 32 to 128 channels, images of 160 pixels


@pytest.fixture(scope="module")
def main():
    return importlib.import_module("visualize").main


@pytest.fixture(scope="module")
def photo():
    return importlib.import_module("common.demo_data").PhotoReader().paths[13]


@pytest.fixture(scope="module")
def report(photo, tmp_path_factory):
    """What `visualize.py --demo` writes and prints, with one photo and its gates stirred."""
    folder = tmp_path_factory.mktemp("visualize")
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "visualize.py"), "--demo", "--stir-gates", "0", "--device", "cpu", str(photo)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return folder / "outputs" / "visualize", done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "static.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model(STATIC).state_dict(), path)
    return path


def browse(page, tmp_path, *options):
    """Run Chromium on a page, with a profile of its own and without asking anybody anything."""
    if CHROMIUM is None:
        if "CI" not in os.environ:
            pytest.skip("needs a browser: apt-get install chromium")
        pytest.fail("CI needs a browser: apt-get install chromium")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"]
    command += ["--disable-dev-shm-usage", f"--user-data-dir={tmp_path / 'profile'}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_report_has_all_figures_and_says_what_they_are(report, photo):
    folder, done = report
    assert done.stderr == "drawing ...\n"
    lines = done.stdout.splitlines()
    assert lines[0] == "mobilenetv2_100_fdconv, stem converted, layer conv_stem"
    assert float(re.match(r"largest \|cosine\| between the weights of two groups: (\S+),", lines[1])[1]) < 1e-6
    assert "Gates at random, not trained" in lines[3]
    assert "(--stir-gates 0)" in lines[3]
    assert lines[4] == str(Path("outputs", "visualize", "index.html"))
    html = (folder / "index.html").read_text()
    assert re.findall(r'<img src="(.*?)\.png"', html) == FIGURES
    for said in ("conv_stem: FDConv2d(3, 32", photo.name, "torch ", "Fig. 6", "Gates at random, not trained"):
        assert said in html
    assert len(re.findall(r"<figcaption>[^<]+\. [^<]+\.</figcaption>", html)) == len(FIGURES)


def test_report_needs_no_network(report):
    html = (report[0] / "index.html").read_text()
    assert "//" not in html
    assert not re.search(r"<(script|link|iframe)\b|url\(|@import", html)


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_not_blank(report, name):
    with Image.open(report[0] / f"{name}.png") as image:
        assert image.format == "PNG"
        assert image.width >= 1200
        picture = image.convert("RGB")
    assert max(ImageStat.Stat(picture).stddev) > 15
    assert len(picture.getcolors(maxcolors=1 << 24)) > 100


def test_a_browser_loads_every_figure(report, tmp_path):
    # Scripts of its own the report has none: the count is taken by one in a copy.
    copy = shutil.copytree(report[0], tmp_path / "copy") / "index.html"
    count = "Array.from(document.images).filter(image => image.complete && image.naturalWidth > 1000).length"
    tell = f"<script>onload = () => document.body.setAttribute('data-loaded', {count})</script>"
    copy.write_text(copy.read_text().replace("</body>", f"{tell}</body>"))
    page = browse(copy, tmp_path, "--dump-dom")
    assert f'data-loaded="{len(FIGURES)}"' in page


def test_a_browser_shows_the_page(report, tmp_path):
    shot = tmp_path / "shot.png"
    browse(report[0] / "index.html", tmp_path, f"--screenshot={shot}", "--window-size=1250,4600")
    with Image.open(shot) as image:
        assert image.size == (1250, 4600)
        screens = [image.convert("L").crop((0, top, 1250, top + 1150)) for top in range(0, 4600, 1150)]
    # text alone has a deviation of about 20
    assert all(ImageStat.Stat(screen).stddev[0] > 30 for screen in screens)


def test_converted_model_is_said_to_rest(main, checkpoint, photo, tmp_path, capsys):
    """A static checkpoint, converted; a layer without FBM; two photos."""
    argv = ["--model", STATIC, "--convert", "--checkpoint", checkpoint, "--layer", "layer3.0.conv1", "--device", "cpu"]
    main([*map(str, argv), "--output", str(tmp_path), str(photo), str(photo)])
    out = capsys.readouterr().out
    assert "Every gate of every layer is exactly 1" in out
    html = (tmp_path / "index.html").read_text()
    assert "Every gate of every layer is exactly 1" in html
    assert re.findall(r'<img src="(.*?)\.png"', html) == ["similarity", "spectrum", "tsne", "gates", "layers"]
    assert f"{photo.name}, {photo.name}, at 160 x 160" in html


def test_a_grey_photo(main, photo, tmp_path, capsys):
    """A model of one channel, whose usual mean and deviation are of three."""
    torch.manual_seed(0)
    kwargs = {"in_chans": 1, "num_classes": 4}
    save_file(timm.create_model("resnet18_fdconv", **kwargs).state_dict(), tmp_path / "one.safetensors")
    argv = ["--model", "resnet18_fdconv", "--checkpoint", tmp_path / "one.safetensors", "--img-size", 64, photo]
    options = [f"{key}={value}" for key, value in kwargs.items()]
    main([*map(str, argv), "--output", str(tmp_path / "page"), "--device", "cpu", "--model-kwargs", *options])
    with Image.open(tmp_path / "page/bands_1.png") as image:
        # The upper left panel.
        red, green, blue = image.convert("RGB").crop((40, 60, 240, 260)).split()
    assert ImageStat.Stat(red).stddev[0] > 30
    assert red.tobytes() == green.tobytes() == blue.tobytes()


def test_lists_the_layers_of_a_local_model(main, tmp_path, capsys):
    model = timm.create_model("resnet18_fdconv", num_classes=3)
    timm.models.save_for_hf(model, tmp_path)
    main(["--model", f"local-dir:{tmp_path}", "--list-layers"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 16
    assert lines[0] == "layer1.0.conv1"


@pytest.mark.parametrize("options", [["resnet18_fdconv"], ["resnet18.a1_in1k", "--convert"]])
def test_lists_the_layers_without_the_weights(main, tmp_path, capsys, monkeypatch, options):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    main(["--list-layers", "--model", *options])
    assert len(capsys.readouterr().out.splitlines()) == 16


def test_mistakes_are_one_line(main, checkpoint, photo, tmp_path):
    (tmp_path / "page.jpg").write_text("<html>")
    static = ["--model", STATIC, "--checkpoint", checkpoint]
    swin = tmp_path / "swin.safetensors"
    save_file(timm.create_model("swin_tiny_fdconv").state_dict(), swin)
    for argv, message in (
        ([photo], "say what to draw with --model (or try --demo)"),
        (["--model", "resnet50_fdconv"], "give a photo (or try --demo)"),
        (["--demo", "--model", STATIC], "--demo brings its own model and weights"),
        (["--demo", tmp_path / "none.jpg"], f"there is no photo {tmp_path / 'none.jpg'}"),
        (["--demo", tmp_path / "page.jpg"], f"cannot read photo {tmp_path / 'page.jpg'}: cannot identify image file"),
        (["--demo", "--layer", "conv"], "no FDConv layer conv, there are: conv_stem, blocks.1.0.conv_pwl,"),
        (["--demo", "--output", photo], "is a file, not a folder"),
        (["--demo", "--use-ema"], "--use-ema needs --checkpoint"),
        (["--demo", "--device", "abacus"], "--device abacus"),
        (["--demo", "--img-size", "0"], "--img-size must be at least 1, got 0"),
        (["--model", "resnet50_fdcon", photo], "unknown model resnet50_fdcon, did you mean resnet50_fdconv"),
        ([*static, photo], "the model has no dynamic layers: take a model that has them, or --convert a static one"),
        ([*static, "--method", "odconv", photo], "--method odconv says what --convert converts to"),
        (
            [*static, "--convert", "--method", "odconv", "--layer", "conv", photo],
            "no ODConv layer conv, there are: layer1.0.conv1,",
        ),
        (["--model", STATIC, "--checkpoint", tmp_path / "none.pt", photo], "there is no checkpoint"),
        (
            ["--model", "swin_tiny_fdconv", "--checkpoint", swin, "--img-size", "64", photo],
            "takes 224 x 224 images, not 64 x 64: give --model-kwargs img_size=64",
        ),
        (
            ["--model", "resnet18_fdconv", "--checkpoint", checkpoint, photo],
            "the weights are another architecture's",
        ),
        (
            ["--model", STATIC, "--checkpoint", checkpoint, "--convert", "--num-classes", "2", photo],
            "The classifier only: the weights are of a model with other classes, or without a classifier. "
            "Give --num-classes 1000",
        ),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main([*map(str, argv)])
        assert str(exit_info.value).startswith("visualize.py: error: ")
        assert message in str(exit_info.value)
        assert "\n" not in str(exit_info.value)


def test_missing_libraries_are_one_line(main, photo, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib scikit-learn"):
        main(["--demo", str(photo)])


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        importlib.import_module("pictures.args").parse_args(["--help"])
    assert "visualize.py --model resnet50_fdconv photo.jpg" in capsys.readouterr().out
