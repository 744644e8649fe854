"""What a pass would move on a GPU: whole models within their limits, and each kernel's bytes by formula."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import benchmark
import fdconv_zoo.layers.ops.triton.bands
import fdconv_zoo.layers.ops.triton.bank
import fdconv_zoo.layers.ops.triton.conv  # noqa: F401, which registers the kernels
from benchmarking.traffic import count_traffic
from common.traffic import Counting
from fdconv_zoo import FDConv2d, static_name
from fdconv_zoo.layers.fdw import FDW

SCRIPTS = Path(__file__).parents[3] / "scripts"

# Of the static twin's bytes, and kernels, at most.
LIMITS = {
    "resnet50_fdconv": (3.0, 1300),
    "convnext_tiny_fdconv": (2.5, 900),
    "swin_tiny_fdconv": (2.0, 900),
}


@pytest.mark.parametrize("name", LIMITS)
def test_models_move_little_more_than_their_static_twins(name):
    size, batch = (3, 224, 224), 64
    static = count_traffic(timm.create_model(static_name(name)), size, batch, torch.bfloat16, False)
    found = count_traffic(timm.create_model(name), size, batch, torch.bfloat16, True)
    ratio, kernels = LIMITS[name]
    assert found.bytes.total() <= ratio * static.bytes.total()
    assert found.kernels.total() <= kernels


def test_each_kernel_reads_and_writes_what_it_must():
    """Weights once in, once out; a map once in, once out; the bank once."""
    batch, channels, filters, side, bands, positions, taps = 64, 48, 40, 14, 16, 9, 3
    layer = FDConv2d(channels, filters, 3, padding=1, bias=False, num_bands=bands)
    found = count_traffic(layer, (channels, side, side), batch, torch.bfloat16, True).bytes
    weights, places = filters * channels * positions, side * side
    gates = 4 * batch * (bands + channels + filters + positions)
    local = 4 * (batch * channels + filters * positions * taps)
    maps = 2 * batch * channels * places
    outputs = 2 * batch * filters * places
    assert found["fdconv_zoo.gated_weights.default"] == 2 * (bands + batch) * weights + gates + local
    assert found["fdconv_zoo.convolve.default"] == maps + 2 * batch * weights + outputs
    assert found["fdconv_zoo.gate_bands.default"] == 2 * maps + 2 * 3 * (batch * places + 1)
    hidden, made = 16, bands + channels + filters + positions
    parameters = made * (hidden + 1) + 4 * hidden + 2
    assert found["fdconv_zoo.gates_of_hidden.default"] == 2 * (batch * hidden + parameters) + 4 * batch * made


def test_without_a_kept_bank_it_is_made_for_large_batches_alone():
    net = nn.Sequential(FDConv2d(32, 24, 1, num_bands=8))
    large = count_traffic(net, (32, 7, 7), 8, torch.float32, False).kernels
    assert large["fdconv_zoo.gated_weights.default"] == 1
    assert large["aten.copy_.default"] + large["aten._fft_c2r.default"] > 0
    net = nn.Sequential(FDConv2d(32, 24, 1, num_bands=8))
    small = count_traffic(net, (32, 7, 7), 7, torch.float32, False).kernels
    assert small["aten.index_select.default"] > 0


def test_the_command_counts_each_way(tmp_path, capsys):
    path = tmp_path / "traffic.json"
    benchmark.main(
        ["--traffic", "bfloat16", "--batch-size", "64", "--model", "resnet18_fdconv", "--results-file", str(path)]
    )
    printed = capsys.readouterr().out
    assert "counted with fake tensors, not run" in printed
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ["banks kept", "nothing kept", "not fused"]
    assert rows[0]["ratio"] < rows[1]["ratio"] < rows[2]["ratio"]


def test_a_training_step_is_not_counted_where_kernels_are_not_interpreted():
    with pytest.raises(SystemExit, match="where TRITON_INTERPRET=1 is set"):
        benchmark.main(["--traffic", "bfloat16", "--batch-size", "4", "--model", "resnet18_fdconv", "--mode", "train"])


@pytest.mark.slow
def test_a_training_step_is_counted(tmp_path):
    """And stays what it was, a few operations more or less by PyTorch's version: it would grow unseen."""
    path = tmp_path / "traffic.json"
    options = ["--traffic", "bfloat16", "--batch-size", "64", "--model", "resnet18_fdconv", "--results-file", path]
    command = [sys.executable, SCRIPTS / "benchmark.py", *options, "--mode", "train"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert "bfloat16, train: counted with fake tensors, not run" in done.stdout, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ["nothing kept", "not fused"]
    assert rows[0]["kernels"] < 1700 and rows[0]["ratio"] < rows[1]["ratio"]
    launched = rows[0]["kernels_by_operation"]
    assert launched["fdconv_zoo.ungate.default"] == 16
    assert launched["fdconv_zoo.spread_groups.default"] == launched["fdconv_zoo.collect_groups.default"] >= 16


def test_one_batch_size(capsys):
    with pytest.raises(SystemExit) as exit:
        benchmark.main(["--traffic", "bfloat16", "--model", "resnet18_fdconv"])
    assert "one --batch-size" in str(exit.value.code)


def test_each_kernel_of_the_backward_pass():
    """The gated weights' gradient once in, those of FDW's weights and of the logits once out; sums in parts."""
    ops = torch.ops.fdconv_zoo
    batch, channels, filters, side, bands, positions, taps = 64, 48, 40, 14, 16, 9, 3
    geometry = [3, 3], [1, 1], [1, 1, 1, 1], [1, 1]
    with FakeTensorMode(), torch.no_grad():

        def fake(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="cuda")

        exact = partial(fake, dtype=torch.float32)
        gates = exact(batch, bands), exact(batch, channels), exact(batch, filters), exact(batch, positions)
        local = exact(batch, channels), exact(filters * positions, 1, taps)
        x, grad = fake(batch, channels, side, side), fake(batch, filters, side, side)
        weight = fake(batch, filters, positions, channels)
        with Counting("cuda") as counting:
            ops.grad_input(grad, weight, x, *geometry, False)
            ops.grad_weight(grad, x, *geometry)
            ops.ungate(weight, fake(bands, filters * positions, channels), *gates, *local, [3, 3], True)
            factors = ops.grad_factors(x, x, [1, 4, 1, 8])
            ops.grad_logits(factors, fake(batch, 2, side, side), fake(2))
    found = counting.traffic.bytes
    maps, outputs, weights = 2 * x.numel(), 2 * grad.numel(), 2 * weight.numel()
    assert found["fdconv_zoo.grad_input.default"] == outputs + weights + 2 * maps  # the map, for its shape
    assert found["fdconv_zoo.grad_weight.default"] == outputs + maps + weights
    small = 4 * sum(tensor.numel() for tensor in (*gates, *local))
    # Two blocks of 32 channels, and blocks of 16 rows.
    sums = 4 * batch * (2 * filters * positions + math.ceil(filters * positions / 16) * channels)
    assert found["fdconv_zoo.ungate.default"] == 3 * weights + weights // batch * bands + small + sums
    sums = 4 * batch * 3 * 3 * side * side
    assert found["fdconv_zoo.grad_factors.default"] == 2 * maps + sums
    assert (
        found["fdconv_zoo.grad_logits.default"] == sums + 2 * batch * 2 * side * side + 2 * 2 + 4 * batch * 2 * side**2
    )


@pytest.mark.parametrize("chunk", [1 << 26, 1], ids=["all at once", "a group at once"])
def test_the_bank_and_its_gradient(chunk, monkeypatch):
    """Coefficients in and all half spectra out, and back, each in one launch a chunk."""
    monkeypatch.setattr("fdconv_zoo.layers.ops.bank.CHUNK", chunk)
    groups, rows, columns = 4, 30, 18
    fdw = FDW(rows, columns, groups)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        spectrum, index, tiles = (
            torch.empty(a.shape, dtype=a.dtype, device="cuda") for a in (fdw.spectrum, fdw.gain_index, fdw.gain_tiles)
        )
        with Counting("cuda") as counting:
            bank = torch.ops.fdconv_zoo.bank(spectrum, index, tiles, groups, columns, [1, 1], torch.bfloat16)
            torch.ops.fdconv_zoo.bank_backward(bank, index, tiles, [1, 1], torch.float32)
    kernels, found = counting.traffic
    times = groups if chunk == 1 else 1
    small, halves = 4 * spectrum.numel(), 4 * groups * spectrum.numel()
    gain_map = 4 * (index.numel() + tiles.numel())
    assert found["fdconv_zoo.spread_groups.default"] == times * (small + gain_map) + halves
    assert found["fdconv_zoo.collect_groups.default"] == times * (small + gain_map) + halves
    # The transforms, and a copy each way between matrices and the bank.
    assert kernels["aten.copy_.default"] == 2 * times
    assert kernels.total() <= 8 * times
