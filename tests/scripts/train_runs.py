"""Real runs of scripts/train.py and train_dense.py, for the tests that start, stop and kill them."""

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

SCRIPTS = Path(__file__).parents[2] / "scripts"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def photos() -> list[Path]:
    """The twenty ImageNet photos that the foolbox wheel brings."""
    found = sorted((Path(find_spec("foolbox").origin).parent / "data").glob("imagenet_*.jpg"))
    assert len(found) == 20
    return found


def photo_folder(root: Path) -> Path:
    """The photos as an image folder of two classes that serves as both splits."""
    for i, photo in enumerate(photos()):
        for split in ("train", "val"):
            target = root / split / f"class{i % 2}" / photo.name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(photo)
    return root


def command(*args: object, processes: int = 1, script: Path = SCRIPTS / "train.py") -> list[str]:
    """The command line of a run, under torchrun where it has several processes."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*start, str(script), *map(str, args)]


def run(*args: object, expect: int = 0, **options: Any) -> str:
    """Run to the end and return what it printed, after checking its exit code; ``options`` as for ``command``."""
    done = subprocess.run(
        command(*args, **options),
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300,
    )  # fmt: skip
    assert done.returncode == expect, done.stdout
    return done.stdout


def run_until(line: str, signum: int, *args: object, **options: Any) -> tuple[int, str]:
    """Start a run, send it a signal when it prints ``line``; returns the exit code and the output.

    ``options`` as for ``command``.
    """
    process = subprocess.Popen(
        command(*args, **options),
        env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = []
    for text in process.stdout:
        output.append(text)
        if line in text:
            process.send_signal(signum)
            break
    output.append(process.stdout.read())
    return process.wait(timeout=60), "".join(output)


def assert_same_weights(one: Path, other: Path, names: Iterable[str] = ("last", "last_ema")) -> None:
    """Check that the weights of two runs are equal to the last bit."""
    for name in names:
        first, second = (load_file(output / f"{name}.safetensors") for output in (one, other))
        assert first.keys() == second.keys()
        different = [key for key in first if not first[key].equal(second[key])]
        assert not different, f"{name}: {different[:5]}"
