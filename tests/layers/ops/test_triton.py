"""Starts the tests of the kernels in a process whose Triton interprets them on the CPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is for Linux")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["test_layers", "test_bands", "test_bank", "test_gates"])
def test_kernels_in_the_interpreter(name, which):
    tests = Path(__file__).parent / "triton" / f"{name}.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        str(tests),
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    print(result.stdout[-4000:])
    assert result.returncode in (0, 5), result.stdout[-4000:] + result.stderr[-2000:]
