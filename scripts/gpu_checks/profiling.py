"""The ten longest kernels of an eval pass and of a training step, by PyTorch's profiler."""

from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gpu_checks.builds import fdconv_model, images_and_labels, specs
from gpu_checks.clock import Run
from gpu_checks.setup import Row, Setup
from gpu_checks.speed import Case, layout_of, make_pass

KERNELS = 10


def run(setup: Setup) -> Iterator[Row]:
    """A row for each model and mode, ResNet-50 first."""
    for spec in specs(setup.small):
        model = fdconv_model(spec).to(setup.device)
        for mode in ("eval", "train"):
            case = Case(spec, mode, 4 if setup.small else 64, setup.half_dtype, "eager")
            model = model.to(memory_format=layout_of(case)).train(mode == "train")
            images, labels = images_and_labels(spec, case.batch, model, setup.device)
            images = images.contiguous(memory_format=layout_of(case))
            one_pass = make_pass(case, model, images, labels, setup)
            yield setup.attempt(str(case), partial(profile, setup, one_pass))


def profile(setup: Setup, one_pass: Run) -> Row:
    """Kernels of one pass by the sum of their times; operators where there are no kernels."""
    for _ in range(2):
        one_pass()
    setup.synchronize()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.on_gpu else [])]
    with torch.profiler.profile(activities=activities) as profiler:
        one_pass()
        setup.synchronize()
    times: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in profiler.events():
        # Spans that someone named, as an optimiser's step, hold kernels that are there by themselves.
        if setup.on_gpu and (event.device_type != DeviceType.CUDA or getattr(event, "is_user_annotation", False)):
            continue
        times[event.name] += event.time_range.elapsed_us() if setup.on_gpu else event.self_cpu_time_total
        calls[event.name] += 1
    longest = sorted(times, key=times.__getitem__, reverse=True)[:KERNELS]
    total = sum(times.values())
    found = [{"name": name[:120], "calls": calls[name], "ms": round(times[name] / 1000, 4)} for name in longest]
    return {
        "launches": sum(calls.values()),
        "total_ms": total / 1000,
        "longest": found,
        "summary": f"{sum(calls.values())} launches, {total / 1000:.2f} ms; " + "; ".join(
            f"{row['name'][:40]} {row['calls']}x {row['ms']:.2f} ms" for row in found[:5]
        ),
    }  # fmt: skip
