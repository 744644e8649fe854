"""scripts/export.py: each format, its self-check, every mistake in one line."""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch

import fdconv_zoo  # noqa: F401, registers the models
from tests.compare import relative_error
from tests.models.stirring import stir
from tests.scripts.image_files import write_images

SCRIPT = Path(__file__).parents[2] / "scripts" / "export.py"
SMALL = ["--num-classes", "5", "--img-size", "64", "--model-kwargs", "layers=(1,1,1,1)", "channels=(20,24,32,40)"]


@pytest.fixture(scope="module")
def export():
    torch.set_num_threads(1)
    return importlib.import_module("export")


@pytest.fixture
def checkpoint(tmp_path):
    model = timm.create_model("resnet18_fdconv", num_classes=5, layers=(1, 1, 1, 1), channels=(20, 24, 32, 40)).eval()
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": model.state_dict()}, path)
    return model, path


@pytest.mark.parametrize(
    "ending",
    [pytest.param(".onnx", marks=pytest.mark.slow), pytest.param(".pt2", marks=pytest.mark.slow), ".torchscript"],
)
def test_file_computes_what_the_checkpoint_computes(export, checkpoint, tmp_path, capsys, ending):
    model, weights = checkpoint
    output = tmp_path / "new" / f"model{ending}"
    export.main(["resnet18_fdconv", str(output), "--checkpoint", str(weights), *SMALL])
    assert [path.name for path in output.parent.iterdir()] == [output.name]
    report = capsys.readouterr().out
    for shape in ("1 x 3 x 64 x 64", "5 x 3 x 64 x 64", "2 x 3 x 96 x 64", "2 x 3 x 64 x 125", "2 x 3 x 64 x 64"):
        assert shape in report
    assert "largest relative difference" in report
    x = torch.randn(3, 3, 72, 80)
    with torch.no_grad():
        expected = model(x)
        if ending == ".onnx":
            actual = torch.from_numpy(onnxruntime.InferenceSession(output).run(None, {"input": x.numpy()})[0])
        else:
            actual = (torch.jit.load(output) if ending == ".torchscript" else torch.export.load(output).module())(x)
    assert relative_error(actual, expected) < 1e-4


@pytest.mark.slow
def test_features_of_a_backbone(export, tmp_path, capsys):
    output = tmp_path / "features.pt2"
    flags = ["--no-weights", "--features", "--img-size", "64", "--model-kwargs", *SMALL[5:]]
    export.main(["resnet18_fdconv", str(output), *flags])
    assert [tuple(f.shape) for f in torch.export.load(output).module()(torch.randn(1, 3, 64, 96))][-1] == (1, 40, 2, 3)


def test_fixed_batch_and_size(export, tmp_path, capsys):
    export.main(
        ["resnet18_fdconv", str(tmp_path / "m.pt2"), "--no-weights", "--fixed-batch", "3", "--fixed-size", *SMALL]
    )
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line[0].isdigit()] == ["3 x 3 x 64 x 64"]


@pytest.mark.parametrize("split", ["train", "."])
def test_a_calibrated_static_model_with_its_accuracy(export, checkpoint, tmp_path, capsys, split):
    model, weights = checkpoint
    stir(model)
    torch.save({"state_dict": model.state_dict()}, weights)
    data = tmp_path / "data"
    if split == "train":
        write_images(data, *(f"train/{name}" for name in "abcde"), count=3)
        write_images(data, *(f"val/{name}" for name in "abcde"))
    else:
        write_images(data, *"abcde")
    output = tmp_path / "static.torchscript"
    flags = ["--checkpoint", str(weights), "--static", "--calibrate", str(data), "--images", "4", "--fixed-size"]
    export.main(["resnet18_fdconv", str(output), *flags, *SMALL])
    lines = capsys.readouterr().out.splitlines()
    where = data / "train" if split == "train" else data
    assert f"on 10 images, means over 4 of {where}" in lines[0]
    assert [line.split()[0] for line in lines[1:3]] == ["dynamic", "static"]
    assert all(0 <= float(number) <= 100 for line in lines[1:3] for number in line.split()[1:])
    program = torch.jit.load(output)
    assert not [name for name, _ in program.named_parameters() if "spectrum" in name]


def test_a_static_model_at_gates_of_one(export, checkpoint, tmp_path, capsys):
    model, weights = checkpoint
    output = tmp_path / "static.torchscript"
    export.main(["resnet18_fdconv", str(output), "--checkpoint", str(weights), "--static", *SMALL])
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(torch.jit.load(output)(x), model(x)) < 1e-4
    with pytest.raises(SystemExit, match="resnet18 is static as it is: leave out --static"):
        export.main(["resnet18", str(output), "--no-weights", "--static", *SMALL])


def test_numbers_that_are_none_are_no_small_difference(export, tmp_path, monkeypatch):
    outputs = iter([torch.full((1, 5), torch.nan), *[torch.zeros(9, 5)] * 9])
    monkeypatch.setattr(export, "load_file", lambda path: lambda x: [next(outputs)[: len(x)]])
    monkeypatch.setattr(export, "as_list", lambda output: [torch.zeros_like(output) + 1e-9])
    with pytest.raises(SystemExit, match="largest relative difference nan, above"):
        export.main(["resnet18_fdconv", str(tmp_path / "m.torchscript"), "--no-weights", *SMALL])


def test_a_file_that_differs_does_not_replace_one_that_passed(export, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "load_file", lambda path: lambda x: [torch.zeros(len(x), 5)])
    output = tmp_path / "m.torchscript"
    output.write_bytes(b"passed before")
    with pytest.raises(SystemExit, match=r"largest relative difference 1\.0e\+00, above the tolerance"):
        export.main(["resnet18_fdconv", str(output), "--no-weights", *SMALL])
    assert output.read_bytes() == b"passed before"
    assert (tmp_path / "m.unchecked.torchscript").exists()


def test_a_file_that_does_not_run_is_one_line_and_leaves_nothing(export, tmp_path, monkeypatch):
    def one_size(x):
        if x.shape[2] != 32:
            raise AssertionError("Guard failed: x.size()[2] <= 32")
        return [model(x)]

    model = timm.create_model("test_resnet", num_classes=5).eval()
    monkeypatch.setattr(export, "create_model", lambda args: model)

    def broken(model, x, path, args):
        path.write_bytes(b"half a file")
        raise KeyError("a fault\nin many\nlines")

    monkeypatch.setattr(export, "load_file", lambda path: one_size)
    monkeypatch.setattr(export, "export_file", lambda model, x, path, args: path.touch())
    arguments = ["resnet18_fdconv", str(tmp_path / "m.torchscript"), "--no-weights", "--img-size", "32"]
    with pytest.raises(SystemExit, match=r"does not run from the file at all .* Guard failed.*--fixed-size$") as stop:
        export.main(arguments)
    assert "\n" not in str(stop.value)
    monkeypatch.setattr(export, "export_file", broken)
    with pytest.raises(SystemExit, match="resnet18_fdconv does not export: KeyError: 'a fault"):
        export.main(arguments)
    monkeypatch.setattr(export, "export_file", lambda *_: signal.raise_signal(signal.SIGINT))
    # A job in the background, as a suite may be one, starts with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        export.main(arguments)
    signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_images_of_32_pixels_export_or_say_what_to_do(export, tmp_path, capfd):
    # FDConv layers on maps of two and one pixels a side only: an exporter's time is that of the number of layers.
    small = [*SMALL[:2], "--img-size", "32", *SMALL[4:6], "channels=(16,16,24,40)"]
    for ending, options in ((".pt2", []), (".onnx", ["--fixed-size"])):
        output = tmp_path / f"m{ending}"
        arguments = ["resnet18_fdconv", str(output), "--no-weights", *small, *options]
        try:
            export.main(arguments)
        except SystemExit as stop:
            assert "--fixed-size" in str(stop) and "\n" not in str(stop)
            assert not list(tmp_path.iterdir())
    shown = capfd.readouterr().err
    assert "[W:onnxruntime" not in shown and "\x1b[" not in shown
    assert output.exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["resnet18_fdconv", "m.bin"], r"m\.bin must end in one of \.onnx, \.pt2, \.torchscript"),
        (["resnet18_fdconf", "m.pt2"], "unknown model resnet18_fdconf, did you mean .*resnet18_fdconv"),
        (["resnet18_fdconv", "m.pt2", "--checkpoint", "nowhere.pth"], "there is no checkpoint nowhere.pth"),
        (["resnet18_fdconv", "m.pt2", "--calibrate", "."], "--calibrate is for --static"),
        (["resnet18_fdconv", "m.pt2", "--static", "--calibrate", "nowhere"], "there is no folder nowhere"),
        (["resnet18_fdconv", "m.pt2", "--static", "--calibrate", ".", "--features"], "which --features have none of"),
        (["resnet18_fdconv", "m.pt2", "--static", "--images", "0"], "--images 0: at least 1"),
        (["resnet18_fdconv", "m.pt2", "--no-weights", "--static", "--calibrate", "."], "Found 0 images in"),
        (["resnet18_fdconv", "m.pt2", "--use-ema"], "--use-ema needs --checkpoint"),
        (["resnet18_fdconv", "m.pt2", "--opset", "18"], "--opset is for .onnx"),
        (["resnet18_fdconv", "m.pt2", "--no-weights", "--img-size", "0"], "--img-size takes one or two positive"),
        (["resnet18_fdconv", "m.pt2", "--no-weights", "--fixed-batch", "0"], "--fixed-batch 0: at least 1"),
        (["resnet18_fdconv", "m.pt2", "--tolerance", "0"], "--tolerance 0.0: above 0"),
        (["resnet18_fdconv", "m.pt2", "--no-weights", "--model-kwargs", "bands=3"], "bands"),
        (
            ["swin_tiny_fdconv", "m.pt2", "--no-weights", "--model-kwargs", "depths=(1,1,1,1)", "embed_dim=24"],
            "takes 224 x 224 images only: add --fixed-size",
        ),
        (
            ["swin_tiny_fdconv", "m.pt2", "--no-weights", "--img-size", "64", "--model-kwargs", "depths=(1,1,1,1)"],
            "takes 224 x 224 images, not 64 x 64: give --model-kwargs img_size=64",
        ),
        (
            ["resnet18_odconv", "m.pt2", "--no-weights", "--static"],
            "resnet18_odconv has layers of ODConv, and --static is for those of FDConv: leave out --static",
        ),
        (
            ["resnet50_kw", "m.torchscript", "--no-weights", "--model-kwargs", "layers=(1,1,1,1)"],
            r"resnet50_kw: KernelWarehouse is not for TorchScript: export to \.onnx or \.pt2",
        ),
        (["resnet18_fdconv", "m.pt2", "--num-classes", "3"], "no pretrained weights of 3 classes: resnet18_fdconv's"),
    ],
)
def test_mistakes_end_in_one_line(export, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message) as error:
        export.main(argv)
    assert str(error.value).startswith("export.py: error: ")
    assert "\n" not in str(error.value)
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_fit(export, checkpoint, tmp_path):
    with pytest.raises(SystemExit, match=r"does not fit: .*: the weights are (another architecture's|of a model of)"):
        export.main(["resnet50_fdconv", str(tmp_path / "m.pt2"), "--checkpoint", str(checkpoint[1]), *SMALL])


def test_help_teaches():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    text = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True, env=environment
    )
    for word in ("examples:", "model:", "static:", "input:", "check:", ".onnx", ".pt2", ".torchscript"):
        assert word in text.stdout
