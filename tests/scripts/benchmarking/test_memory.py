"""Memory in scripts/benchmark.py against known sizes."""

import multiprocessing
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import nn

from benchmarking import memory

PEAK_SIZE = 64 * 2**20  # bytes


def test_saved_bytes_count_each_storage_once_without_parameters():
    x = torch.randn(4, 8)
    # a Linear layer saves its input; the second one's is the ReLU's output, which the ReLU saves too
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    assert memory.saved_for_backward(model, x) == (4 * 8 + 4 * 16) * 4
    model.requires_grad_(False)
    assert memory.saved_for_backward(model, x) == 0


def test_saved_bytes_count_whole_storages_of_views():
    class Half(nn.Module):
        def forward(self, x):
            wide = x * 2
            return wide[:, :2].square().sum() + wide[:, 2:].square().sum()

    assert memory.saved_for_backward(Half(), torch.randn(3, 8, requires_grad=True)) == 3 * 8 * 4


def test_saved_bytes_of_resnet50_are_those_of_the_published_table():
    model = timm.create_model("resnet50").train()
    half = memory.saved_for_backward(model, torch.randn(2, 3, 224, 224))  # the table's batch is 4
    assert 2 * half / 2**20 == pytest.approx(328, abs=0.5)


def allocate_thrice():
    for _ in range(3):
        torch.ones(PEAK_SIZE // 4).add_(1)


def test_peak_is_what_was_in_use_at_once():
    # In a process of its own: the peak is that of a process, and earlier tests leave threads and memory in this one.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(memory.measure_peak, (allocate_thrice, torch.device("cpu")))
    if memory.RESET_PEAK.exists():
        assert PEAK_SIZE * 0.95 < peak.growth < PEAK_SIZE * 1.5
        assert peak.total > peak.growth
    else:
        assert peak is None


def test_cuda_memory_is_that_of_its_allocator(monkeypatch):
    in_use = SimpleNamespace(now=100, peak=0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: in_use.now)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: in_use.peak)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    peak = memory.measure_peak(lambda: setattr(in_use, "peak", 170), torch.device("cuda"))
    assert peak == (70, 170)
