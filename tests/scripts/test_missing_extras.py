"""Commands without the extra that brings what they need: one line says what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
WITHOUT = """
import runpy, sys
for name in ("torchmetrics", "segmentation_models_pytorch", "lightning", "onnx_ir"):
    sys.modules[name] = None
sys.path.insert(0, {scripts!r})
sys.argv = {argv!r}
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["experiment_fashion_mnist.py", "--help"], "torchmetrics", "experiments"),
        (["experiment_finetune.py", "--help"], "segmentation_models_pytorch", "experiments,dense"),
        (["experiment_landcover.py", "--help"], "segmentation_models_pytorch", "experiments,dense"),
        (["experiment_deepforest.py", "--help"], "lightning", "dense"),
        (["export.py", "resnet18_fdconv", "out.onnx", "--no-weights"], "onnx_ir", "onnx"),
        (["benchmark.py", "--model", "resnet18_fdconv", "--engines", "openvino"], "onnx_ir", "onnx"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_one_line_says_what_to_install(command, package, extra, tmp_path):
    program = WITHOUT.format(scripts=str(SCRIPTS), script=str(SCRIPTS / command[0]), argv=command)
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, cwd=tmp_path)
    assert done.returncode in (1, 2), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"{command[0]}: error: ") and f"{package}: pip install -e '.[{extra}]'" in last
    assert "Traceback" not in done.stderr
