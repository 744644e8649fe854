"""train.py, validate.py and train_dense.py in processes of their own, two steps each on images made here."""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torchvision.io import write_png

import fdconv_zoo  # noqa: F401  (registers the models)
from gpu_checks.setup import Row, Setup

SCRIPTS = Path(__file__).parents[1]
MODEL = "resnet18_fdconv"
KWARGS = {"channels": (24, 32, 48, 64), "layers": (1, 1, 1, 1), "num_bands": 8}
SIZE, CLASSES = 64, 2
LEAST_TIMEOUT = 90.0
# Of train_dense.py, which reads them before anything else.
DENSE_PACKAGES = ("lightning", "torchmetrics", "transformers", "yaml", "numpy")


def make_data(root: Path) -> None:
    """Image folders of two classes, images with masks beside them, and weights."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "val"):
        (root / "masks" / split).mkdir(parents=True)
        (root / "images" / split).mkdir(parents=True)
        for number in range(4):
            image = torch.randint(256, (3, 80, 96), generator=generator, dtype=torch.uint8)
            folder = root / "classes" / split / f"class{number % CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            write_png(image, str(folder / f"{number}.png"))
            write_png(image, str(root / "images" / split / f"{number}.png"))
            mask = torch.zeros(1, 80, 96, dtype=torch.uint8)
            mask[:, 20:60, 30:70] = 1
            write_png(mask, str(root / "masks" / split / f"{number}.png"))
    model = timm.create_model(MODEL, num_classes=CLASSES, **KWARGS)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, root / "weights.safetensors")


def command_lines(root: Path, setup: Setup) -> dict[str, list[str]]:
    """Arguments of each command."""
    kwargs = [f"{name}={value}".replace(" ", "") for name, value in KWARGS.items()]
    size, device = ["--img-size", str(SIZE)], ["--device", setup.device.type]
    half = ["--amp", "--amp-dtype", "bfloat16", "--channels-last"] if setup.on_gpu else []
    classes, model = ["--num-classes", str(CLASSES)], ["--model", MODEL, "--model-kwargs", *kwargs]
    data, output = root / "classes", ["--output", str(root / "train")]
    dense = []
    for split in ("train", "val"):
        dense += [f"--{split}-images", str(root / "images" / split), f"--{split}-masks", str(root / "masks" / split)]
    return {
        "train.py": ["--data-dir", str(data), "--val-split", "val", *model, *size, *classes, *device, *half, *output,
                     "--batch-size", "2", "--steps", "2", "--workers", "0", "--lr", "0.01"],
        "validate.py": [str(data / "val"), *model, *size, *classes, *device, *half, "--batch-size", "2", "-j", "0",
                        "--checkpoint", str(root / "weights.safetensors")],
        "train_dense.py": ["--head", "upernet", "--backbone", MODEL, "--backbone-kwargs", *kwargs, *dense, *classes,
                           "--scale-size", "64", "--crop-size", "64", "64", "--batch-size", "2", "--steps", "2",
                           "-j", "0", "--warmup-steps", "1", "--output", str(root / "dense"), *device,
                           "--precision", "bf16-mixed" if setup.on_gpu else "32-true"],
    }  # fmt: skip


def card_for_children(index: int, visible: str | None) -> str:
    """What CUDA_VISIBLE_DEVICES says for a process that is to see one card alone, given what it says in this one."""
    return visible.split(",")[index].strip() if visible else str(index)


def run(setup: Setup) -> Iterator[Row]:
    """A row for each command; they run at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_data(root)
        # Cards in exclusive mode aside, they share the device with this process.
        paths = [str(SCRIPTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if setup.on_gpu:
            # So that "cuda", all that train_dense.py knows, is this card.
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            environment["CUDA_VISIBLE_DEVICES"] = card_for_children(setup.device.index, visible)
        missing = [name for name in DENSE_PACKAGES if find_spec(name) is None]
        processes: dict[str, subprocess.Popen[bytes]] = {}
        start = time.monotonic()
        until = start + max(LEAST_TIMEOUT, setup.seconds_left)
        try:
            for name, arguments in command_lines(root, setup).items():
                if name == "train_dense.py" and missing:
                    yield {"case": name, "not run": f"this machine has no {', '.join(missing)}"}
                    continue
                with (root / f"{name}.log").open("wb") as log:
                    processes[name] = subprocess.Popen(
                        [sys.executable, str(SCRIPTS / name), *arguments],
                        stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=root,
                    )  # fmt: skip
            for name, process in processes.items():
                yield result(name, process, root / f"{name}.log", start, until)
        finally:
            for process in processes.values():
                if process.poll() is None:
                    process.kill()
                    process.wait()


def result(name: str, process: subprocess.Popen[bytes], log: Path, start: float, until: float) -> Row:
    """What became of a command."""
    try:
        code = process.wait(timeout=max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return {"case": name, "fault": f"{tail(log)}\nstill running after {time.monotonic() - start:.0f} s"}
    seconds = round(time.monotonic() - start, 1)
    if code == 0:
        return {"case": name, "seconds": seconds, "last line": tail(log).strip().splitlines()[-1:]}
    absent = re.search(r"No module named '([\w.]+)'", tail(log))
    if absent:
        return {"case": name, "not run": f"this machine has no {absent[1]}"}
    return {"case": name, "fault": f"{tail(log)}\nexit status {code}"}


def tail(log: Path) -> str:
    """The end of what a command printed."""
    return log.read_text(encoding="utf-8", errors="replace")[-6000:]
