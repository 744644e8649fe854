"""The clock of scripts/benchmark.py: order and arithmetic on fakes; nothing is timed."""

import pytest

from benchmarking import timing


class FakeClock:
    """A clock that runs move: each call of a fake takes the next of its durations, the last one for good."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def run(self, name, *durations):
        left = list(durations)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


def time_fakes(repeats, warmup, **durations):
    clock = FakeClock()
    runs = {name: clock.run(name, *times) for name, times in durations.items()}
    times = timing.time_in_alternation(
        runs, dict.fromkeys(runs, 1) | repeats, dict.fromkeys(runs, warmup), lambda: None, clock
    )
    return clock.calls, times


def test_runs_take_turns_after_their_warm_ups():
    calls, times = time_fakes({"static": 3, "fdconv": 3}, 2, static=[9, 9, 1, 2, 3], fdconv=[9, 9, 4, 5, 6])
    assert calls == ["static"] * 2 + ["fdconv"] * 2 + ["static", "fdconv"] * 3
    assert times == {"static": [1, 2, 3], "fdconv": [4, 5, 6]}


def test_a_slow_run_sits_out_the_later_rounds():
    calls, times = time_fakes({"static": 3, "fdconv": 3, "literal": 1}, 0, static=[1], fdconv=[2], literal=[60])
    assert calls == ["static", "fdconv", "literal", "static", "fdconv", "static", "fdconv"]
    assert times == {"static": [1, 1, 1], "fdconv": [2, 2, 2], "literal": [60]}


def test_short_runs_are_called_often_enough_for_the_clock_and_counted_once():
    quick = timing.SHORTEST / 8
    calls, times = time_fakes({"static": 2, "fdconv": 2}, 1, static=[quick], fdconv=[1])
    assert calls == ["static", "fdconv"] + (["static"] * 8 + ["fdconv"]) * 2
    assert times["static"] == pytest.approx([quick, quick])


def test_the_device_is_waited_for_on_both_sides_of_every_measurement():
    events = []
    timing.time_in_alternation(
        {"static": lambda: events.append("run")},
        {"static": 2},
        {"static": 1},
        lambda: events.append("wait"),
        clock=iter(range(100)).__next__,
    )
    assert events == ["wait", "run", "wait"] * 3


def test_ratio_is_the_median_over_rounds():
    # the second round was disturbed as a whole, the third in one half only
    assert timing.median_ratio([2, 20, 9, 4, 2.2], [1, 10, 1, 2, 1]) == 2
    assert timing.median_ratio([30], [10, 1, 1]) == 3
