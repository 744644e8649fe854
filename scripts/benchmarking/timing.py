"""Clock for things to be compared: they run in turn, so that a busy or throttled machine slows all alike."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

SHORTEST = 0.02  # seconds; what takes less is called several times in a measurement


def time_in_alternation(
    runs: Mapping[str, Callable[[], None]],
    repeats: Mapping[str, int],
    warmup: Mapping[str, int],
    synchronize: Callable[[], None],
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time several things in turn: a, b, a, b, ...

    Args:
        runs: What to time, by name, in the order of each round.
        repeats: Measurements of each; it sits out the rounds after its last one.
        warmup: Calls of each before the clock starts.
        synchronize: Waits for the device.
        clock: Seconds.

    Returns:
        Seconds a call of every measurement, by name.
    """

    def seconds(run: Callable[[], None], calls: int) -> float:
        synchronize()
        start = clock()
        for _ in range(calls):
            run()
        synchronize()
        return (clock() - start) / calls

    calls = dict.fromkeys(runs, 1)
    for name, run in runs.items():
        once = math.inf
        for _ in range(warmup[name]):
            once = seconds(run, 1)
        calls[name] = max(1, math.ceil(SHORTEST / max(once, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(max(repeats.values())):
        for name, run in runs.items():
            if turn < repeats[name]:
                times[name].append(seconds(run, calls[name]))
    return times


def median_ratio(times: Sequence[float], base_times: Sequence[float]) -> float:
    """Return the median of the ratios of measurements of the same round, as far as both have one."""
    return statistics.median(a / b for a, b in zip(times, base_times, strict=False))


def eval_pass(model: nn.Module, images: Tensor, autocast: AbstractContextManager) -> None:
    """A forward pass without gradients."""
    with torch.no_grad(), autocast:
        model(images)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    target: Tensor,
    autocast: AbstractContextManager,
) -> None:
    """Forward, backward, step of the optimiser, gradients freed."""
    with autocast:
        loss = cross_entropy(model(images), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
