"""Clock of a device: things that are compared run in turn, so that a throttled card slows all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from gpu_checks.setup import Setup

Run = Callable[[], object]
SHORTEST = 0.01  # seconds; what takes less is called several times in a measurement
FEWEST, MOST = 3, 20  # measurements of each


def seconds(run: Run, calls: int, setup: Setup) -> float:
    """Seconds of a call: by events on a GPU, with what it waits for the host; by a clock elsewhere."""
    if not setup.on_gpu:
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    setup.synchronize()
    begin.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / calls


def time_in_alternation(runs: Mapping[str, Run], setup: Setup, limit: float) -> dict[str, list[float]]:
    """Time several things in turn: a, b, a, b, ... They have been called before.

    Args:
        runs: What to time, by name.
        setup: The device.
        limit: Seconds after which no round starts, once there are enough.

    Returns:
        Seconds a call of every measurement, by name.
    """
    calls = {name: max(1, math.ceil(SHORTEST / max(seconds(run, 1, setup), 1e-6))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.monotonic()
    for number in range(MOST):
        if number >= FEWEST and time.monotonic() - start > limit:
            break
        for name, run in runs.items():
            times[name].append(seconds(run, calls[name], setup))
    return times


def median_seconds(run: Run, setup: Setup, limit: float = 0.2) -> float:
    """Median seconds of a call, after two."""
    run()
    run()
    return statistics.median(time_in_alternation({"": run}, setup, limit)[""])
