"""Loader processes that end with the run, whatever ends it."""

import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def ignore_stops(worker_id: int = 0) -> None:
    """Makes a loader process leave the stop signals of its process group to the run, which saves what it has first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def workers_end() -> Iterator[None]:
    """End all processes that :mod:`multiprocessing` starts inside, however the block is left.

    Python ends what is left of them at its own exit with SIGTERM, and waits. Loader processes ignore SIGTERM, so that
    a run can save what it has when its whole process group gets one: it would wait for ever.
    """
    before = set(multiprocessing.active_children())
    try:
        yield
    finally:
        started = [process for process in multiprocessing.active_children() if process not in before]
        # torch's handler would raise an error for each loader process that is killed
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            for process in started:
                process.kill()
            for process in started:
                process.join()
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)
