"""FDConv beside its static twin, PyTorch's operations and kept banks: medians in alternation, memory, traffic.

Cases come in the order of their importance, so that what the budget cuts is the least important.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.traffic import traffic_of
from gpu_checks.builds import (
    Spec,
    fdconv_model,
    images_and_labels,
    specs,
    static_twin,
    unfused,
    with_kept_banks,
)
from gpu_checks.clock import Run, time_in_alternation
from gpu_checks.setup import Row, Setup, dtype_name

# How far each choice puts a case back.
MODELS = (0, 2, 2.5)
WORKLOADS = {("eval", 64): 0, ("train", 64): 1, ("eval", 1): 2, ("eval", 8): 3, ("eval", 256): 3.5, ("train", 128): 4}
DTYPES = {torch.bfloat16: 0.0, torch.float32: 3.2}
# Expected seconds of a case beside it: a compiler is not started for what the budget cuts anyway.
ENGINES = {"eager": (0.0, 5), "graph": (1.6, 5), "compile": (2.6, 50), "compile reduce-overhead": (2.7, 50)}
LEARNING_RATE = 1e-5  # noise has nothing to teach


class Case(NamedTuple):
    """What is measured."""

    spec: Spec
    mode: str
    batch: int
    dtype: torch.dtype
    engine: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """What runs in alternation; a compiler is started for the two that are compared."""
        kinds = ("static", "fdconv")
        if self.engine == "eager":
            kinds += ("unfused",)
        return (*kinds, "kept") if self.mode == "eval" and not self.engine.startswith("compile") else kinds

    def __str__(self) -> str:
        return f"{self.spec.name} {self.mode} {self.batch} {dtype_name(self.dtype)} {self.engine}"


def cases(setup: Setup) -> list[Case]:
    """All cases, the most important first."""
    if setup.small:
        spec = specs(small=True)[0]
        return [Case(spec, mode, 4, torch.float32, engine) for mode, engine in
                (("eval", "eager"), ("train", "eager"), ("eval", "compile"))]  # fmt: skip
    found = []
    for (number, spec), workload, dtype, engine in product(enumerate(specs(False)), WORKLOADS, DTYPES, ENGINES):
        if engine == "graph" and workload[0] == "train":
            continue  # torch.compile captures steps, in its own way
        slow = 1 if workload[0] == "train" and engine.startswith("compile") else 0
        back = slow + MODELS[number] + WORKLOADS[workload] + DTYPES[dtype] + ENGINES[engine][0]
        found.append((back, Case(spec, *workload, dtype, engine)))
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def run(setup: Setup) -> Iterator[Row]:
    """A row for each case."""
    models: dict[tuple[str, str], nn.Module] = {}
    copy_rate = None if setup.small else measured_copy(setup)
    left_out = []
    for case in cases(setup):
        if setup.seconds_left < ENGINES[case.engine][1]:
            left_out.append(str(case))
            continue
        yield setup.attempt(str(case), partial(measure, setup, case, models, copy_rate))
    if left_out:
        yield {"case": "for want of time", "left out": left_out}


def measured_copy(setup: Setup) -> float:
    """Bytes a second of a copy on this device, beside which others are seen."""
    from gpu_checks.facts import copy_rate

    return copy_rate(setup)["bytes_per_second"]


def model_of(kind: str, case: Case, models: dict[tuple[str, str], nn.Module], setup: Setup) -> nn.Module:
    """A model of a kind on the device, channels_last where it is in 16 bits; made once."""
    base = "static" if kind == "static" else "unfused" if kind == "unfused" else "fdconv"
    if (case.spec.name, base) not in models:
        if base == "unfused":
            made = unfused(model_of("fdconv", case, models, setup))
        else:
            made = (static_twin if base == "static" else fdconv_model)(case.spec)
        models[case.spec.name, base] = made.to(setup.device)
    model = models[case.spec.name, base].to(memory_format=layout_of(case))
    return with_kept_banks(model, case.dtype) if kind == "kept" else model.train(case.mode == "train")


def layout_of(case: Case) -> torch.memory_format:
    """channels_last in 16 bits, contiguous in float32."""
    return torch.contiguous_format if case.dtype == torch.float32 else torch.channels_last


def autocast_of(case: Case, setup: Setup) -> Any:
    """Autocast for 16 bits; without its cache, which a captured graph must not refer to."""
    if case.dtype == torch.float32:
        return nullcontext()
    return torch.autocast(setup.device.type, case.dtype, cache_enabled=case.mode == "train")


def eval_pass(model: nn.Module, images: Tensor, case: Case, setup: Setup) -> None:
    """A forward pass without gradients."""
    if case.engine.endswith("reduce-overhead"):
        torch.compiler.cudagraph_mark_step_begin()
    with torch.no_grad(), autocast_of(case, setup):
        model(images)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, case: Case, setup: Setup
) -> None:
    """Forward, backward, step of SGD, gradients freed."""
    if case.engine.endswith("reduce-overhead"):
        torch.compiler.cudagraph_mark_step_begin()
    with autocast_of(case, setup):
        loss = cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def captured(run: Run, setup: Setup) -> Run:
    """A pass as a CUDA graph: without the host's time."""
    stream = torch.cuda.Stream(setup.device)
    stream.wait_stream(torch.cuda.current_stream(setup.device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(setup.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def make_pass(case: Case, model: nn.Module, images: Tensor, labels: Tensor, setup: Setup) -> Callable[[], None]:
    """One pass of a model, the thing to be timed."""
    if case.engine.startswith("compile"):
        options = {"mode": case.engine.partition(" ")[2] or "default"} if setup.on_gpu else {"backend": "aot_eager"}
        model = torch.compile(model, **options)
    if case.mode == "train":
        optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
        return partial(train_step, model, optimizer, images, labels, case, setup)
    run = partial(eval_pass, model, images, case, setup)
    return captured(run, setup) if case.engine == "graph" else run


def peak_bytes(run: Run, setup: Setup) -> dict[str, int]:
    """Peak of a pass above what is loaded, and of all tensors; nothing where the device does not tell."""
    if not setup.on_gpu:
        return {}
    setup.synchronize()
    before = torch.cuda.memory_allocated(setup.device)
    torch.cuda.reset_peak_memory_stats(setup.device)
    run()
    setup.synchronize()
    total = torch.cuda.max_memory_allocated(setup.device)
    return {"peak_growth_bytes": total - before, "peak_bytes": total}


def measure(setup: Setup, case: Case, models: dict[tuple[str, str], nn.Module], copy_rate: float | None) -> Row:
    """Times of all kinds in alternation; a kind that fails is left out, with its traceback, unless it is FDConv."""
    setup.seed()
    torch._dynamo.reset()
    gc.collect()  # what the last case compiled, captured and kept
    if setup.on_gpu:
        torch.cuda.empty_cache()
    figures: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    static = model_of("static", case, models, setup)
    images, labels = images_and_labels(case.spec, case.batch, static, setup.device)
    images = images.contiguous(memory_format=layout_of(case))
    for kind in case.kinds:
        start = time.monotonic()
        try:
            model = model_of(kind, case, models, setup)
            runs[kind] = make_pass(case, model, images, labels, setup)
            for _ in range(3):  # torch.compile's CUDA graphs are recorded in the second pass
                runs[kind]()
            setup.synchronize()
            figures[kind] = {"first_seconds": round(time.monotonic() - start, 2), **peak_bytes(runs[kind], setup)}
            if case.mode == "eval" and case.engine == "eager":
                traffic = traffic_of(runs[kind], setup.device.type)
                figures[kind] |= {"kernels": traffic.kernels.total(), "moved_bytes": traffic.bytes.total()}
        except Exception:  # of memory, compilers, capture: no common base
            if kind == "fdconv":
                raise
            setup.check_alive()
            runs.pop(kind, None)
            figures[kind] = {"fault": traceback.format_exc()}
    times = time_in_alternation(runs, setup, limit=1.5)
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    for kind, seconds in medians.items():
        figures[kind] |= {"seconds": seconds, "images_per_second": case.batch / seconds}
        if "static" in medians:
            pairs = zip(times[kind], times["static"], strict=True)
            figures[kind]["ratio"] = statistics.median(a / b for a, b in pairs)
        if "moved_bytes" in figures[kind]:
            figures[kind]["bytes_per_second"] = figures[kind]["moved_bytes"] / seconds
    return {
        "layout": str(layout_of(case)),
        "copy_bytes_per_second": copy_rate,
        **figures,
        "summary": ", ".join(summary(kind, figures[kind], copy_rate) for kind in figures),
    }


def summary(kind: str, figures: dict[str, Any], copy_rate: float | None) -> str:
    """`fdconv 12.3 ms (1.85x, 40 % of copy, 3.1 GB)`."""
    if "seconds" not in figures:
        return f"{kind} failed: {figures['fault'].strip().splitlines()[-1][:80]}"
    notes = [f"{figures['ratio']:.2f}x"] if "ratio" in figures else []
    if copy_rate and "bytes_per_second" in figures:
        notes.append(f"{100 * figures['bytes_per_second'] / copy_rate:.0f} % of copy")
    if "peak_bytes" in figures:
        notes.append(f"{figures['peak_bytes'] / 1e9:.1f} GB")
    return f"{kind} {1000 * figures['seconds']:.2f} ms ({', '.join(notes)})"
