"""Runs of train.py that break off: they end, their loader processes with them, and so do the other ranks."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from train_runs import ENVIRONMENT, SCRIPTS, command, photo_folder

RUN = ["--model", "test_resnet", "--num-classes", 2, "--img-size", 32, "-b", 2, "-j", 2, "--device", "cpu"]
RUN += ["--log-interval", 1, "--epochs", 1000]
BROKEN = """
import os, sys
sys.path.insert(0, {scripts!r})
import train
from training import run
def broken(self):
    if os.environ.get("RANK", "1") == "1":
        raise KeyError("a fault of the program")
run.Run._follow_update = broken
train.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return photo_folder(tmp_path_factory.mktemp("photos"))


def group_members(group):
    """Processes that are in the process group and not yet waited for."""
    states = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            states[int(stat.parent.name)] = fields[0]
    return states


def start(arguments):
    """Start a run in a process group of its own, its output in one pipe."""
    return subprocess.Popen(
        arguments, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(process, seconds=60):
    """Exit code and output of a run that must end by itself, leaving no process behind."""
    try:
        output, _ = process.communicate(timeout=seconds)
        deadline = time.monotonic() + 10
        while group_members(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not group_members(process.pid)
    finally:
        if group_members(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_uncaught_error_ends_the_run_its_workers_and_the_other_ranks(photos, tmp_path, processes):
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN.format(scripts=str(SCRIPTS)))
    arguments = command(*RUN, "--data-dir", photos, "--output", tmp_path / "run", processes=processes, script=broken)
    code, output = finish(start(arguments))
    assert code == 1
    assert "a fault of the program" in output


def test_an_error_in_a_worker_ends_the_run(photos, tmp_path):
    data = photo_folder(tmp_path / "data")
    for image in (data / "train").rglob("*.jpg"):
        image.unlink()
        image.write_text("no image")
    code, output = finish(start(command(*RUN, "--data-dir", data, "--output", tmp_path / "run")))
    assert code == 1
    assert "in a row" in output or "consecutive samples" in output


def test_a_second_interrupt_ends_the_run_at_once(photos, tmp_path):
    # The first is answered after the update, which takes a minute here.
    slow = tmp_path / "slow.py"
    slow.write_text(
        f"import sys, time\nsys.path.insert(0, {str(SCRIPTS)!r})\nimport train\nfrom training import run\n"
        "def wait(self):\n    print('waiting', flush=True)\n    time.sleep(60)\n"
        "run.Run._follow_update = wait\ntrain.main(sys.argv[1:])\n"
    )
    process = start(command(*RUN, "--data-dir", photos, "--output", tmp_path / "run", script=slow))
    for line in process.stdout:
        if "waiting" in line:
            break
    begin = time.monotonic()
    for _ in range(2):  # as a terminal does: to all processes of the group
        os.killpg(process.pid, signal.SIGINT)
        time.sleep(0.5)
    code, output = finish(process, 30)
    assert time.monotonic() - begin < 30
    assert code == 128 + signal.SIGINT
    assert "ended at once; --resume goes on" in output
