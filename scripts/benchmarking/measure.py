"""One measurement of ``benchmark.py``: a pair on one workload, with every engine, in time and memory."""

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from benchmarking.engines import deploy
from benchmarking.memory import measure_peak, saved_for_backward
from benchmarking.models import Pair, literal_model
from benchmarking.report import Row
from benchmarking.timing import eval_pass, median_ratio, time_in_alternation, train_step

LEARNING_RATE = 1e-4  # small: noise has nothing to teach


def make_pass(
    model: nn.Module, images: Tensor, target: Tensor, mode: str, args: argparse.Namespace
) -> Callable[[], None]:
    """Return one pass of a model over the images, the thing to be timed."""
    autocast = torch.autocast(images.device.type, getattr(torch, args.amp_dtype)) if args.amp else nullcontext()
    if mode == "eval":
        return partial(eval_pass, model, images, autocast)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    return partial(train_step, model, optimizer, images, target, autocast)


def measure(pair: Pair, batch_size: int, mode: str, threads: int, args: argparse.Namespace) -> list[Row]:
    """Measure a pair on one workload, every engine in the same alternation.

    Returns:
        A row for each engine.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(args.seed)
    device = torch.device(args.device)
    memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    images = torch.randn(batch_size, *pair.input_size).to(device, memory_format=memory_format)
    target = torch.randint(getattr(pair.static, "num_classes", 1), (batch_size,), device=device)
    models = {"static": pair.static, "fdconv": pair.fdconv}
    passes: dict[tuple[str, str], Callable[[], None]] = {}
    saved: dict[str, int] = {}
    for kind, model in models.items():
        model.to(device, memory_format=memory_format).train(mode == "train")
        passes["eager", kind] = make_pass(model, images, target, mode, args)
        if mode == "train":
            with torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp):
                saved[kind] = saved_for_backward(model, images)
    if args.compile or "compile" in args.engines:
        torch.compiler.reset()  # else the second shape of a model would be compiled for any shape
        for kind, model in models.items():
            compiled = torch.compile(model, dynamic=False, mode=args.compile_mode)
            passes["compile", kind] = make_pass(compiled, images, target, mode, args)
    if args.engines:
        for kind, model in models.items():
            for engine, run in deploy(model, images, threads, args.engines).items():
                passes[engine, kind] = run
    repeats, warmup = dict.fromkeys(passes, args.repeats), dict.fromkeys(passes, args.warmup)
    difference = None
    if args.reference and mode == "eval":
        literal = literal_model(pair.fdconv)
        print("  literal equations: the first pass can take minutes", file=sys.stderr, flush=True)
        with torch.no_grad():
            expected = literal(images)
            difference = ((pair.fdconv(images) - expected).norm() / expected.norm()).item()
        passes["eager", "literal"] = make_pass(literal, images, target, mode, args)
        repeats["eager", "literal"], warmup["eager", "literal"] = args.reference_repeats, 0
    synchronize = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    clock = time.process_time if args.cpu_time else time.perf_counter
    times = time_in_alternation(passes, repeats, warmup, synchronize, clock)

    rows = []
    for engine in dict.fromkeys(engine for engine, _ in passes):
        row: Row = {
            "model": pair.name,
            "static_model": pair.static_name,
            "mode": mode,
            "batch_size": batch_size,
            "img_size": pair.input_size[1],
            "threads": threads,
            "engine": engine,
            "ratio": median_ratio(times[engine, "fdconv"], times[engine, "static"]),
        }
        if engine != "eager":
            row["ratio_to_eager_static"] = median_ratio(times[engine, "fdconv"], times["eager", "static"])
        for kind in models:
            peak = measure_peak(passes[engine, kind], device)
            row[kind] = {
                "seconds": median(times[engine, kind]),
                "times": times[engine, kind],
                "peak_bytes": peak.growth if peak else None,
                "process_bytes": peak.total if peak else None,
                "saved_bytes": saved.get(kind) if engine == "eager" else None,
            }
        if (engine, "literal") in times:
            row["literal"] = {
                "seconds": median(times[engine, "literal"]),
                "times": times[engine, "literal"],
                "ratio_to_static": median_ratio(times[engine, "literal"], times[engine, "static"]),
                "ratio_to_fdconv": median_ratio(times[engine, "literal"], times[engine, "fdconv"]),
                "relative_difference_of_fdconv": difference,
            }
        rows.append(row)
    return rows
