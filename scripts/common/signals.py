"""An orderly end when a scheduler or a user asks for it (pre-emption, Ctrl-C)."""

import signal

import torch
import torch.distributed as dist


class StoppedError(RuntimeError):
    """A stop signal ended the run after it was saved; ``signum`` is the signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class StopSignals:
    """Turns SIGTERM and SIGINT, while in use, into a request that the loop answers after its current update.

    A second SIGINT (Ctrl-C twice) ends the process at once; a SIGTERM after it does not, as torchrun sends one.
    """

    def __init__(self) -> None:
        self.signum = 0

    def __enter__(self) -> "StopSignals":
        self._previous = {signum: signal.signal(signum, self._receive) for signum in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _receive(self, signum: int, frame: object) -> None:
        self.signum = signum
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def any_process(self, group: dist.ProcessGroup | None = None) -> int:
        """The signal that this or another process of the run received, or 0.

        Args:
            group: Of all processes, if the run's own does not take tensors of a CPU.
        """
        if not dist.is_initialized():
            return self.signum
        signum = torch.tensor(self.signum)
        dist.all_reduce(signum, dist.ReduceOp.MAX, group=group)
        return int(signum)
