"""Checkpoint files: complete or untouched, read without running code, random states included."""

import os
import random
import resource
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from timm.models import load_state_dict

from common.checkpoint import (
    CheckpointError,
    copy_weights,
    load_state,
    random_state,
    save_state,
    save_weights,
    set_random_state,
)


def in_child(function):
    """Run ``function`` in a child process and return its exit status, or the signal that ended it as negative."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("save", ["state", "weights"])
def test_full_disk_keeps_the_earlier_file_and_leaves_no_other(tmp_path, save):
    path = tmp_path / "last"

    def write(value):
        tensor = torch.full((1000, 1000), value)
        if save == "state":
            save_state({"progress": {}, "tensor": tensor}, path)
        else:
            save_weights({"tensor": tensor}, path, {})

    write(1.0)
    before = path.read_bytes()

    def write_on_full_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))  # a file can't grow beyond 1 MiB: EFBIG
        with pytest.raises(CheckpointError, match=r"can't write .*last: .*; the previous last is intact"):
            write(2.0)

    assert in_child(write_on_full_disk) == 0
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_kill_while_writing_keeps_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "last.state.pt"
    save_state({"progress": 1}, path)

    def killed(file_descriptor):
        os.kill(os.getpid(), signal.SIGKILL)

    def write():
        monkeypatch.setattr(os, "fsync", killed)
        save_state({"progress": 2}, path)

    assert in_child(write) == -signal.SIGKILL
    assert load_state(path) == {"progress": 1}
    save_state({"progress": 3}, path)  # what the killed one left is no obstacle
    assert load_state(path) == {"progress": 3}
    assert list(tmp_path.iterdir()) == [path]


def test_first_checkpoint_that_fails_says_there_is_none(tmp_path):
    with pytest.raises(CheckpointError, match="there was no earlier one"):
        save_state({}, tmp_path / "missing" / "last.state.pt")


def test_weights_are_what_timm_reads_whatever_their_layout(tmp_path):
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    save_weights({"conv.weight": weight}, tmp_path / "last.safetensors", {"update": "7"})
    copy_weights(tmp_path / "last.safetensors", tmp_path / "model_best.safetensors")
    assert load_state_dict(tmp_path / "model_best.safetensors")["conv.weight"].equal(weight)
    with safe_open(tmp_path / "last.safetensors", "pt") as file:
        assert file.metadata() == {"update": "7"}


def test_random_states_go_through_a_file_without_pickled_code(tmp_path):
    def draw():
        return random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), torch.rand(1).item()

    draw()  # gauss and normal make two numbers and keep one: part of the state
    save_state({"progress": {}, "random": random_state(torch.device("cpu"))}, tmp_path / "s.pt")
    expected = [draw() for _ in range(3)]
    set_random_state(load_state(tmp_path / "s.pt")["random"], torch.device("cpu"))
    assert [draw() for _ in range(3)] == expected


class Code:
    def __reduce__(self):
        return os.mkdir, ("was_run",)


def test_state_with_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"progress": Code()}, "evil.state.pt")
    with pytest.raises(CheckpointError, match=r"can't resume from evil.state.pt"):
        load_state("evil.state.pt")
    assert not (tmp_path / "was_run").exists()
