"""Examples without the extra that brings their library: one line says what to install."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
WITHOUT = """
import runpy, sys
for name in ("segmentation_models_pytorch", "transformers", "ultralytics"):
    sys.modules[name] = None
sys.argv = [{script!r}, "--help"]
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "package", "extra"),
    [
        ("smp_segmentation.py", "segmentation_models_pytorch", "dense"),
        ("transformers_heads.py", "transformers", "dense"),
        ("maskdino.py", "transformers", "dense"),
        ("ultralytics_yolo.py", "ultralytics", "ultralytics"),
    ],
)
def test_one_line_says_what_an_example_needs(script, package, extra):
    program = WITHOUT.format(script=str(EXAMPLES / script))
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith(f"{script}: error: ")
    assert package in line and f"pip install -e '.[{extra}]'" in line
