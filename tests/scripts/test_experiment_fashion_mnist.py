"""scripts/experiment_fashion_mnist.py on a small set in the idx format: whole runs, a kill, errors; the scaling."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from experiment_fashion_mnist import EXAMPLES, METHODS, VARIANTS, create_model, main, use_official_scaling
from experiments.fashion_data import FILES, read_idx
from fdconv_zoo import FDConv2d
from fdconv_zoo.choice import named_dynamic_layers, named_fd_layers
from fdconv_zoo.cost import count_parameters

SCRIPT = Path(__file__).parents[2] / "scripts" / "experiment_fashion_mnist.py"
OPTIONS = ["--epochs", "1", "--batch-size", "8", "--train-images", "16", "--threads", "1", "--device", "cpu"]


def write_idx(path, values):
    sizes = b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, values.dim()]) + sizes + values.numpy().tobytes()))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty images a split whose brightness tells the class."""
    folder = tmp_path_factory.mktemp("fashion")
    labels = torch.arange(20, dtype=torch.uint8) % 10
    images = (labels[:, None, None] * 20 + torch.randint(0, 50, (20, 28, 28))).to(torch.uint8)
    for images_file, labels_file in FILES.values():
        write_idx(folder / images_file, images)
        write_idx(folder / labels_file, labels)
    return folder


def command(data, results, *options):
    return [*OPTIONS, "--data-dir", str(data), "--results-file", str(results), *options]


def test_the_example_of_drawn_layers_makes_the_committed_runs():
    (names,) = re.findall(r"--variants ([\w ]+) --start drawn", EXAMPLES)
    runs = json.loads((SCRIPT.parents[1] / "results" / "fashion_mnist" / "drawn.json").read_text())["runs"]
    assert sorted(names.split()) == sorted({run["variant"] for run in runs})


def error_of(arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    message = str(exit.value.code)
    assert message.startswith("experiment_fashion_mnist.py: error: ")
    assert "\n" not in message
    return message


def outcomes(results):
    """What was trained and came out, without times."""
    runs = json.loads(results.read_text())["runs"]
    return {(run["variant"], run["seed"]): run["epochs"] for run in runs}


def test_variants_and_seeds_in_one_command(data, tmp_path, capsys):
    results = tmp_path / "results" / "results.json"
    main(command(data, results, "--variants", "static", "fdconv_official_scaling", "--seeds", "3", "4"))
    found = json.loads(results.read_text())
    assert [(run["variant"], run["seed"]) for run in found["runs"]] == [
        ("static", 3), ("fdconv_official_scaling", 3), ("static", 4), ("fdconv_official_scaling", 4),
    ]  # fmt: skip
    for run in found["runs"]:
        assert run["command"].startswith("experiment_fashion_mnist.py --epochs 1 ")
        assert {"torch", "timm", "python", "fdconv_zoo"} == run["versions"].keys()
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?|unknown", run["commit"])
        (epoch,) = run["epochs"]
        assert epoch["epoch"] == 1 and 0 < epoch["train_loss"] < 10 and 0 <= epoch["accuracy"] <= 1
    assert found["data_sha256"].keys() == {name for names in FILES.values() for name in names}
    assert (found["settings"]["train_images"], found["settings"]["lr"]) == (16, 0.05)
    printed = capsys.readouterr()
    assert [line.split("|")[1].strip() for line in printed.out.splitlines()[2:]] == [
        "static",
        "fdconv_official_scaling",
    ]
    assert "fdconv_official_scaling, seed 4, epoch 1" in printed.err
    with Image.open(results.with_suffix(".png")) as picture:
        assert min(picture.size) > 400


def test_killed_experiment_goes_on_with_what_is_missing(data, tmp_path):
    whole, killed = tmp_path / "whole.json", tmp_path / "killed.json"
    options = ["--variants", "fdw", "static", "--seeds", "0"]
    main(command(data, whole, *options))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command(data, killed, *options)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not killed.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    first = json.loads(killed.read_text())["runs"][0]
    main(command(data, killed, *options))
    assert json.loads(killed.read_text())["runs"][0] == first
    assert outcomes(killed) == outcomes(whole)
    main(command(data, killed, *options))  # nothing is missing now
    assert outcomes(killed) == outcomes(whole)


def test_results_of_other_settings_are_refused(data, tmp_path):
    results = tmp_path / "results.json"
    main(command(data, results, "--variants", "static", "--seeds", "0"))
    before = results.read_bytes()
    assert "lr 0.05, not 0.1: choose another --results-file" in error_of(command(data, results, "--lr", "0.1"))
    assert results.read_bytes() == before
    results.write_text("{}")
    assert "is no results file" in error_of(command(data, results))


def test_missing_data_names_the_package(tmp_path):
    message = error_of(command(tmp_path, tmp_path / "results.json"))
    assert f"no train-images-idx3-ubyte.gz in {tmp_path}: run `apt-get install dataset-fashion-mnist`" in message


@pytest.mark.parametrize(
    "content",
    [b"no gzip", gzip.compress(b"\0\0\x08\x01\0\0\0\x05ab"), gzip.compress(b""), gzip.compress(b"text")],
    ids=["no_gzip", "too_short", "empty", "text"],  # gzip's header has the time, and pytest-xdist compares names
)
def test_broken_files_are_refused(content, tmp_path):
    (tmp_path / "file.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.gz"):
        read_idx(tmp_path / "file.gz")


def test_options_without_use_are_refused(data, tmp_path):
    assert error_of(command(data, tmp_path / "results.json", "--mixup", "0.5", "--model-ema")).endswith(
        "no use for: mixup, model_ema"
    )


def test_too_large_rate_is_one_line(data, tmp_path):
    options = ["--variants", "static", "--lr", "1e30", "--warmup-epochs", "0", "--seeds", "0"]
    assert "the loss is not finite in epoch 1" in error_of(command(data, tmp_path / "results.json", *options))


def test_variants_of_a_seed_start_as_the_same_function():
    images = torch.randn(2, 1, 28, 28)
    with torch.no_grad():
        expected = create_model("static", 7).eval()(images)
        for variant in VARIANTS.keys() - {"static_wide"}:
            torch.testing.assert_close(create_model(variant, 7).eval()(images), expected, rtol=1e-4, atol=1e-4)


def test_variants_have_the_parts_they_are_called_by():
    found = {}
    for variant in VARIANTS:
        layers = [layer for _, layer in named_fd_layers(create_model(variant, 0))]
        found[variant] = {(layer.fdw.num_bands, layer.ksm.modulate_weight, layer.fbm is not None) for layer in layers}
        assert len(layers) == (0 if variant.startswith("static") else 4)
    assert found == {
        "static": set(),
        "static_wide": set(),
        "fdconv": {(16, True, True)},
        "fdconv_official_scaling": {(16, True, True)},
        "fdw": {(16, False, False)},
        "fdw_ksm": {(16, True, False)},
        "fdw_fbm": {(16, False, True)},
        "fdconv_1_band": {(1, True, True)},
        "fdconv_4_bands": {(4, True, True)},
        "fdconv_64_bands": {(64, True, True)},
    }


def test_wide_static_network_has_the_parameters_of_fdconv():
    wide, fdconv = (count_parameters(create_model(variant, 0)) for variant in ("static_wide", "fdconv"))
    assert abs(wide / fdconv - 1) < 0.02


@pytest.mark.parametrize(("in_channels", "out_channels"), [(6, 8), (7, 4)])
def test_official_scaling_trains_as_the_official_parameter(in_channels, out_channels):
    """Against a convolution whose only parameter is S / (min(Cin, Cout) // 2), with momentum and weight decay."""
    layer = FDConv2d(
        in_channels, out_channels, 3, bias=False, num_bands=4, ksm=False, fbm=False, dtype=torch.float64
    ).eval()
    divisor = min(in_channels, out_channels) // 2
    matrix = layer.fdw.matrix().detach()
    official = torch.nn.Parameter(torch.view_as_real(torch.fft.rfft2(matrix) / divisor))
    start = layer.static_twin().weight.detach().clone()
    use_official_scaling(layer)
    torch.testing.assert_close(layer.fdw.parametrizations.spectrum.original, official)

    options = {"lr": 1.0, "momentum": 0.9, "weight_decay": 0.1}
    ours = torch.optim.SGD(layer.fdw.parameters(), **options)
    theirs = torch.optim.SGD([official], **options)
    x = torch.randn(3, in_channels, 9, 9, dtype=torch.float64)
    target = torch.randn(3, out_channels, 7, 7, dtype=torch.float64)
    for _ in range(4):
        rows, columns = matrix.shape
        spatial = torch.fft.irfft2(torch.view_as_complex(official) * divisor, s=(rows, columns))
        weight = spatial.view(out_channels, 3, in_channels, 3).transpose(1, 2)
        for out, optimizer in ((layer(x), ours), (torch.nn.functional.conv2d(x, weight), theirs)):
            optimizer.zero_grad()
            (out - target).square().mean().backward()
            optimizer.step()
    trained = layer.static_twin().weight
    assert (trained - start).abs().max() > 1e-3
    spatial = torch.fft.irfft2(torch.view_as_complex(official) * divisor, s=(rows, columns))
    torch.testing.assert_close(trained, spatial.view(out_channels, 3, in_channels, 3).transpose(1, 2))


def test_official_scaling_moves_the_weight_by_its_factor():
    """DESIGN's factor 2 (min(Cin, Cout) // 2)^2 / (R C), but for the columns that are their own mirror image."""
    conv = torch.nn.Conv2d(20, 20, 3, bias=False, dtype=torch.float64)
    layer = use_official_scaling(FDConv2d.from_conv(conv, num_bands=4, ksm=False, fbm=False).eval())
    x = torch.randn(2, 20, 8, 8, dtype=torch.float64)
    moves = []
    for module in (conv, layer):
        before = (conv if module is conv else layer.static_twin()).weight.detach().clone()
        optimizer = torch.optim.SGD(module.parameters() if module is conv else layer.fdw.parameters(), lr=1.0)
        module(x).square().mean().backward()
        optimizer.step()
        moves.append((conv if module is conv else layer.static_twin()).weight.detach() - before)
    spectra = [torch.fft.rfft2(move.transpose(1, 2).reshape(60, 60)) for move in moves]
    torch.testing.assert_close(spectra[1][:, 1:-1], spectra[0][:, 1:-1] / 18)
    torch.testing.assert_close(spectra[1][:, [0, -1]], spectra[0][:, [0, -1]] / 36)


def test_other_methods_take_their_temperatures_and_save_their_weights(data, tmp_path):
    results = tmp_path / "methods.json"
    main(command(data, results, "--variants", "odconv", "kw", "--seeds", "0", "--save-models"))
    runs = {run["variant"]: run for run in json.loads(results.read_text())["runs"]}
    assert runs["odconv"]["temperature"] == [30, 1, 0.1]
    assert runs["kw"]["temperature"] == [1, 0, 1 / 15]
    assert (tmp_path / "odconv_0.safetensors").exists() and (tmp_path / "kw_0.safetensors").exists()


@pytest.mark.parametrize("variant", METHODS)
def test_other_methods_start_as_the_same_function(variant):
    x = torch.randn(2, 1, 28, 28)
    static, model = create_model("static", 0).eval(), create_model(variant, 0).eval()
    torch.testing.assert_close(model(x), static(x), rtol=1e-4, atol=1e-5)
    assert len(list(named_dynamic_layers(model))) == 4


def test_what_trained_layers_mix_is_compared(data, tmp_path):
    """Converted kernels of ODConv start equal and drawn ones orthogonal; FDConv's groups share no frequency at all."""
    similar = {}
    for start in ("converted", "drawn"):
        results, pictures = tmp_path / start / "results.json", tmp_path / start / "mixed"
        arguments = command(data, results, "--variants", "static", "fdconv", "odconv", "odconv_1x", "--seeds", "0")
        main([*arguments, "--start", start, "--draw-mixed", str(pictures), "--lr", "0.001"])
        runs = {run["variant"]: run for run in json.loads(results.read_text())["runs"]}
        assert "similarity" not in runs["static"] and "similarity" not in runs["odconv_1x"]
        similar[start] = runs["odconv"]["similarity"]
        assert all(abs(value) < 1e-3 for value in runs["fdconv"]["similarity"].values())
        assert sorted(path.name for path in pictures.iterdir()) == ["fdconv_0.png", "odconv_0.png"]
        with Image.open(pictures / "odconv_0.png") as picture:
            assert picture.size[0] > 1000
    assert len(similar["drawn"]) == 4
    assert min(similar["converted"].values()) > 0.99 and max(map(abs, similar["drawn"].values())) < 0.1


def test_runs_of_another_start_are_refused(data, tmp_path):
    """The two starts are other runs of one name."""
    arguments = command(data, tmp_path / "results.json", "--variants", "odconv", "--seeds", "0")
    main(arguments)
    assert "start None, not drawn" in error_of([*arguments, "--start", "drawn"])
